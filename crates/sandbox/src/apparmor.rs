//! AppArmor of the host (Documentation/admin-guide/LSM/apparmor.rst), as shown by securityfs: the
//! loaded profiles and the compiled policy that each was loaded from. A pod's guest kernel loads
//! that policy; nothing is compiled here.
//!
//! ```text
//! apparmor/profiles                      "name (mode)" a line, a child as "parent//child"
//! apparmor/policy/profiles/<name>.<n>/   name, raw_data (CONFIG_SECURITY_APPARMOR_EXPORT_BINARY)
//!                          .../profiles/ its children, in the same form
//! ```

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Policy of one container, bytes: it is sent in one message with the container's spec, and the
/// guest kernel needs as much memory for it.
const MAX_POLICY: usize = 2 << 20;
/// Longest profile name, bytes; the kernel's limit is a page.
const MAX_NAME: usize = 4095;
/// Deepest nesting of a profile; the kernel limits the name only ([`MAX_NAME`]).
const MAX_DEPTH: usize = 8;
const CHILD: &str = "//";

#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    #[error("AppArmor is not enabled on this host; boot with apparmor=1 or use Unconfined")]
    Off,
    #[error("{name:?} is not a valid profile name")]
    Name { name: String },
    #[error("{name:?} is in an AppArmor namespace; only the host's root namespace is supported")]
    Namespace { name: String },
    #[error("no profile {name:?} is loaded on this host; load it with apparmor_parser")]
    NotLoaded { name: String },
    #[error(
        "the host's kernel does not export the policy of profile {name:?} \
         (CONFIG_SECURITY_APPARMOR_EXPORT_BINARY), so it cannot be loaded in the pod's VM"
    )]
    NotExported { name: String },
    #[error(
        "the policy of profile {name:?} is larger than {limit} bytes, too large for a pod's VM"
    )]
    TooLarge { name: String, limit: usize },
    #[error("read {}: {error}; is securityfs mounted?", path.display())]
    Read { path: PathBuf, error: io::Error },
}

/// AppArmor's files of a kernel.
#[derive(Debug, Clone)]
pub struct AppArmor {
    enabled: PathBuf,
    directory: PathBuf,
}

impl AppArmor {
    pub fn of_host() -> Self {
        Self::at(
            Path::new("/sys/module/apparmor/parameters/enabled"),
            Path::new("/sys/kernel/security/apparmor"),
        )
    }

    /// With the given paths, for tests.
    pub fn at(enabled: &Path, directory: &Path) -> Self {
        Self { enabled: enabled.to_owned(), directory: directory.to_owned() }
    }

    pub fn runs(&self) -> bool {
        fs::read_to_string(&self.enabled).is_ok_and(|enabled| enabled.starts_with('Y'))
    }

    /// Whether a profile is loaded.
    pub fn has(&self, name: &str) -> Result<bool, AppArmorError> {
        check_name(name)?;
        let path = self.directory.join("profiles");
        let profiles =
            fs::read_to_string(&path).map_err(|error| AppArmorError::Read { path, error })?;
        let mut names = profiles.lines().filter_map(|line| Some(line.rsplit_once(" (")?.0));
        Ok(names.any(|known| known == name))
    }

    /// Fails if the profile cannot be used.
    pub fn check(&self, name: &str) -> Result<(), AppArmorError> {
        if !self.runs() {
            return Err(AppArmorError::Off);
        }
        match self.has(name)? {
            true => Ok(()),
            false => Err(AppArmorError::NotLoaded { name: name.to_owned() }),
        }
    }

    /// The compiled policy with the profile, parents first: for the kernel's `.replace` file.
    pub fn policy(&self, name: &str) -> Result<Vec<Vec<u8>>, AppArmorError> {
        self.check(name)?;
        let mut directory = self.directory.join("policy/profiles");
        let mut policies: Vec<Vec<u8>> = Vec::new();
        let mut left = MAX_POLICY;
        for part in name.split(CHILD) {
            let Some(entry) = find(&directory, part)? else {
                // It was unloaded just now, or the kernel exports no policy directories.
                return Err(AppArmorError::NotExported { name: name.to_owned() });
            };
            let policy = match read(&entry.join("raw_data"), left) {
                Ok(Some(policy)) => policy,
                Ok(None) => {
                    return Err(AppArmorError::TooLarge { name: name.into(), limit: MAX_POLICY });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(AppArmorError::NotExported { name: name.to_owned() });
                }
                Err(error) => {
                    return Err(AppArmorError::Read { path: entry.join("raw_data"), error });
                }
            };
            // Profiles of one source file usually share one policy.
            if !policies.contains(&policy) {
                left -= policy.len();
                policies.push(policy);
            }
            directory = entry.join("profiles");
        }
        Ok(policies)
    }
}

/// Names are written to `/proc/<pid>/attr/apparmor/exec` and to log lines.
fn check_name(name: &str) -> Result<(), AppArmorError> {
    if name.starts_with(':') {
        return Err(AppArmorError::Namespace { name: name.to_owned() });
    }
    let parts = name.split(CHILD);
    let valid = name.len() <= MAX_NAME
        && !name.chars().any(char::is_control)
        && parts.clone().all(|part| !part.is_empty())
        && parts.count() <= MAX_DEPTH;
    if valid { Ok(()) } else { Err(AppArmorError::Name { name: name.chars().take(80).collect() }) }
}

/// Directory of a profile. Its file name is mangled and numbered; the file `name` in it has the
/// real name.
fn find(profiles: &Path, name: &str) -> Result<Option<PathBuf>, AppArmorError> {
    let entries = match fs::read_dir(profiles) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(AppArmorError::Read { path: profiles.to_owned(), error }),
    };
    for entry in entries.flatten() {
        // Unreadable: unloaded meanwhile.
        let known = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if known.strip_suffix('\n').unwrap_or(&known) == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// None if larger than `limit`.
fn read(path: &Path, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    File::open(path)?.take(limit as u64 + 1).read_to_end(&mut content)?;
    Ok(Some(content).filter(|content| content.len() <= limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel with profiles `web` (child `web//worker`, same policy), `/usr/bin/x` and
    /// `late//child`, whose policies were loaded separately.
    fn kernel(directory: &Path) -> AppArmor {
        let profile = |path: &str, name: &str, policy: &[u8]| {
            let dir = directory.join("policy/profiles").join(path);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("name"), format!("{name}\n")).unwrap();
            fs::write(dir.join("raw_data"), policy).unwrap();
        };
        profile("web.1", "web", b"one");
        profile("web.1/profiles/worker.2", "worker", b"one");
        profile("usr.bin.x.3", "/usr/bin/x", b"two");
        profile("late.4", "late", b"three");
        profile("late.4/profiles/child.5", "child", b"four");
        profile("huge.6", "huge", &vec![0; MAX_POLICY + 1]);
        profile("unexported.7", "unexported", b"");
        fs::remove_file(directory.join("policy/profiles/unexported.7/raw_data")).unwrap();
        let list = "web (enforce)\nweb//worker (enforce)\n/usr/bin/x (complain)\nlate (kill)\n\
                    late//child (enforce)\nhuge (enforce)\nunexported (enforce)\n\
                    two words (enforce)\n:ns://a (enforce)\n";
        fs::write(directory.join("profiles"), list).unwrap();
        fs::write(directory.join("enabled"), "Y\n").unwrap();
        AppArmor::at(&directory.join("enabled"), directory)
    }

    #[test]
    fn the_policy_of_a_profile_is_found_by_its_whole_name() {
        let directory = tempfile::tempdir().unwrap();
        let host = kernel(directory.path());
        let policy = |name: &str| {
            let policies = host.policy(name).unwrap();
            policies.iter().map(|p| String::from_utf8(p.clone()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(policy("web"), ["one"]);
        assert_eq!(policy("web//worker"), ["one"]);
        assert_eq!(policy("/usr/bin/x"), ["two"]);
        assert_eq!(policy("late//child"), ["three", "four"]);
        assert!(host.has("two words").unwrap() && !host.has("two").unwrap());
    }

    #[test]
    fn an_unusable_profile_is_refused_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let host = kernel(directory.path());
        for (name, words) in [
            ("we", "apparmor_parser"),
            ("worker", "no profile \"worker\" is loaded"),
            (":ns://a", "namespace"),
            ("", "not a valid profile name"),
            ("a\nb", "not a valid profile name"),
            ("web////x", "not a valid profile name"),
            ("huge", "larger than"),
            ("unexported", "EXPORT_BINARY"),
        ] {
            let error = host.policy(name).unwrap_err().to_string();
            assert!(error.contains(words), "{name:?}: {error}");
        }
    }

    #[test]
    fn a_host_without_apparmor_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let host = kernel(directory.path());
        fs::write(directory.path().join("enabled"), "N\n").unwrap();
        assert!(matches!(host.check("web"), Err(AppArmorError::Off)));
        let nowhere = directory.path().join("nowhere");
        assert!(!AppArmor::at(&nowhere, &nowhere).runs());
        fs::write(directory.path().join("enabled"), "Y\n").unwrap();
        let unmounted = AppArmor::at(&directory.path().join("enabled"), &nowhere);
        assert!(unmounted.check("web").unwrap_err().to_string().contains("securityfs"));
    }
}
