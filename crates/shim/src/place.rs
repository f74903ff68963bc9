//! Where a shim's files are. `key` stands for namespace and id, which are too long for the path of a
//! socket:
//! ```text
//! <state>/<key>/   shim.sock, pid, sockets of the pod      gone after a reboot
//! <state>/uids/    one file for each uid of a VMM
//! <root>/<key>/    journal, scratch disk, logs of the VMM
//! <root>/originals formatted scratch disks
//! ```

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::settings::Settings;

/// Characters of a key: 128 bits, so that two never meet.
pub(crate) const KEY: usize = 32;
/// VMMs of shims run as these uids; nacelled's are 0x7000_0000 and the 65536 after it.
const UIDS: std::ops::Range<u32> = 0x7001_0000..0x7002_0000;

/// A name for a container or pod of a namespace: letters and digits, [`KEY`] of them.
pub(crate) fn key(namespace: &str, id: &str) -> String {
    let digest = Sha256::digest(format!("{namespace}/{id}"));
    let mut text: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(KEY);
    text
}

#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) key: String,
    pub(crate) state: PathBuf,
    pub(crate) root: PathBuf,
    uids: PathBuf,
    pub(crate) originals: PathBuf,
}

impl Place {
    pub(crate) fn new(settings: &Settings, namespace: &str, pod: &str) -> Self {
        let key = key(namespace, pod);
        Self {
            state: settings.state.join(&key),
            root: settings.root.join(&key),
            uids: settings.state.join("uids"),
            originals: settings.root.join("originals"),
            key,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.state.join("shim.sock")
    }

    pub(crate) fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    pub(crate) fn make(&self) -> Result<()> {
        for folder in [&self.state, &self.root, &self.uids] {
            // The VMM, another user, reaches its own files through them.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(folder)
                .with_context(|| format!("making {}", folder.display()))?;
        }
        Ok(())
    }

    /// Exists once the shim has accepted Shutdown, so that `delete` lets it end by itself.
    pub(crate) fn ending(&self) -> PathBuf {
        self.state.join("ending")
    }

    /// Whether a shim of the pod answers.
    pub(crate) fn is_alive(&self) -> bool {
        UnixStream::connect(self.socket()).is_ok()
    }

    /// Says which process serves.
    pub(crate) fn write_pid(&self) -> io::Result<()> {
        let pid = std::process::id();
        fs::write(self.state.join("pid"), format!("{pid} {}", started(pid)?))
    }

    /// The process that serves, unless its pid has become another one's.
    pub(crate) fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.state.join("pid")).ok()?;
        let (pid, at) = text.split_once(' ')?;
        let (pid, at): (u32, u64) = (pid.parse().ok()?, at.parse().ok()?);
        (started(pid).ok()? == at).then_some(pid)
    }

    /// A uid for the pod's VMM which no other pod has; the same one when asked again.
    pub(crate) fn take_uid(&self) -> Result<u32> {
        let first = u32::from_str_radix(&self.key[..4], 16).unwrap_or_default();
        for n in 0..UIDS.len() as u32 {
            let uid = UIDS.start + (first + n) % UIDS.len() as u32;
            let path = self.uids.join(uid.to_string());
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(mut file) => {
                    file.write_all(self.key.as_bytes())
                        .with_context(|| format!("writing {}", path.display()))?;
                    return Ok(uid);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if fs::read_to_string(&path).is_ok_and(|holder| holder == self.key) {
                        return Ok(uid);
                    }
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("creating {}", path.display()));
                }
            }
        }
        bail!("all {} uids of VMMs are taken ({})", UIDS.len(), self.uids.display())
    }

    /// Removes all files of the pod. Goes on past failures.
    pub(crate) fn clear(&self) -> Result<()> {
        let mut result = Ok(());
        for entry in fs::read_dir(&self.uids).into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path()).is_ok_and(|holder| holder == self.key) {
                result = result.and(absent_is_fine(fs::remove_file(entry.path()), &entry.path()));
            }
        }
        for folder in [&self.state, &self.root] {
            result = result.and(absent_is_fine(fs::remove_dir_all(folder), folder));
        }
        result
    }
}

fn absent_is_fine(result: io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Start time of a process, clock ticks since boot (proc_pid_stat(5), field 22).
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program, in parentheses, may hold spaces.
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let field = rest.split_whitespace().nth(19).and_then(|text| text.parse().ok());
    field.ok_or_else(|| ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(dir: &Path, id: &str) -> Place {
        let (state, root) = (dir.join("state"), dir.join("root"));
        Place::new(&Settings { state, root, ..Settings::default() }, "default", id)
    }

    #[test]
    fn two_pods_have_different_uids_and_a_removed_one_frees_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (place(dir.path(), "a"), place(dir.path(), "b"));
        one.make().unwrap();
        two.make().unwrap();
        let uid = one.take_uid().unwrap();
        assert!(UIDS.contains(&uid));
        assert_eq!(one.take_uid().unwrap(), uid);
        // Another key that begins with the same characters wants the same uid.
        let rival = Place { key: format!("{}{}", &one.key[..4], &two.key[4..]), ..two.clone() };
        assert_ne!(rival.take_uid().unwrap(), uid);
        one.clear().unwrap();
        assert!(!one.state.exists() && !one.root.exists() && two.state.exists());
        assert_eq!(one.uids.read_dir().unwrap().count(), 1);
        one.clear().unwrap();
    }

    #[test]
    fn the_path_of_every_socket_is_short_enough() {
        let settings = Settings::default();
        let place = Place::new(&settings, &"n".repeat(76), &"i".repeat(76));
        let longest = place.state.join("pods").join("0".repeat(KEY)).join("control.sock");
        // sun_path (unix(7)).
        assert!(longest.as_os_str().len() < 108, "{}", longest.display());
    }

    #[test]
    fn a_pid_that_was_given_again_is_not_taken_for_the_shim() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path(), "a");
        place.make().unwrap();
        assert_eq!(place.pid(), None);
        place.write_pid().unwrap();
        assert_eq!(place.pid(), Some(std::process::id()));
        fs::write(place.state.join("pid"), format!("{} 1", std::process::id())).unwrap();
        assert_eq!(place.pid(), None);
    }
}
