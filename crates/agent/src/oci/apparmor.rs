//! AppArmor profiles (kernel Documentation/admin-guide/LSM/apparmor.rst). The guest has no profiles
//! and no compiler: it loads the compiled policy of the host, which the host sends with a
//! container. A privileged container may load more.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Context, Error, Result};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const SECURITYFS: &str = "/sys/kernel/security";
/// A write of one compiled policy replaces the profiles of the same names.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";
/// One line `name (mode)` for each loaded profile.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Whether AppArmor is enabled in the kernel.
pub fn is_enabled() -> bool {
    fs::read_to_string(ENABLED).is_ok_and(|enabled| enabled.starts_with('Y'))
}

/// Mounts securityfs, in which the list of profiles is, if AppArmor is enabled.
pub fn mount_securityfs() -> Result<()> {
    if !is_enabled() || Path::new(PROFILES).exists() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("securityfs"), SECURITYFS, Some("securityfs"), flags, None::<&str>)
        .context(|| format!("mount {SECURITYFS}"))
}

/// Loads policies from the host. A policy is loaded again with each container: the newest replaces
/// the older one also for running processes, as on the host.
pub fn load(policies: &[Vec<u8>]) -> Result<()> {
    if !policies.is_empty() && !is_enabled() {
        return Err(Error::Precondition(
            "AppArmor is not enabled in the pod's kernel, as it was not when the pod started; \
             recreate the pod"
                .to_owned(),
        ));
    }
    policies.iter().try_for_each(|policy| write(policy).map_err(|error| refused(&error)))
}

fn write(policy: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(REPLACE)?;
    match file.write(policy)? {
        taken if taken == policy.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn refused(error: &io::Error) -> Error {
    let reason = match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::EPROTO) => {
            "; it was compiled for a newer kernel than the pod's, so compile it for an older one \
             (apparmor_parser --policy-features, or an abi rule in the profile)"
        }
        _ => "",
    };
    Error::Precondition(format!(
        "the pod's kernel refuses the AppArmor policy of the host: {error}{reason}"
    ))
}

pub(super) fn is_loaded(profile: &str) -> bool {
    contains_profile(&fs::read_to_string(PROFILES).unwrap_or_default(), profile)
}

fn contains_profile(profiles: &str, profile: &str) -> bool {
    profiles.lines().any(|line| line.rsplit_once(" (").is_some_and(|(name, _)| name == profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_an_unsupported_abi_is_reported_with_advice() {
        let text = |number| refused(&io::Error::from_raw_os_error(number)).to_string();
        assert!(text(libc::EPROTONOSUPPORT).contains("--policy-features"));
        assert!(!text(libc::ENOENT).contains("--policy-features"));
        assert!(load(&[]).is_ok());
    }

    #[test]
    fn profiles_are_found_by_their_full_name() {
        let text = "/usr/bin/man (enforce)\ndocker-default (enforce)\nmy prof (complain)\n";
        assert!(contains_profile(text, "docker-default") && contains_profile(text, "my prof"));
        assert!(
            !contains_profile(text, "docker")
                && !contains_profile(text, "")
                && !contains_profile("", "x")
        );
    }
}
