//! AppArmor profiles (kernel Documentation/admin-guide/LSM/apparmor.rst). The guest has none of its
//! own and no compiler for them: it loads the policy that comes with a container, as the host's
//! kernel has it. A privileged container may load more.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Doing, Error, Result};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const SECURITYFS: &str = "/sys/kernel/security";
/// Takes compiled policy, one in a write, in the place of what it had by the same names.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";
/// `name (mode)` a line.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Whether the kernel was started with it.
pub fn runs() -> bool {
    fs::read_to_string(ENABLED).is_ok_and(|enabled| enabled.starts_with('Y'))
}

/// Mounts what its profiles are seen in, if it runs.
pub fn set_up() -> Result<()> {
    if !runs() || Path::new(PROFILES).exists() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("securityfs"), SECURITYFS, Some("securityfs"), flags, None::<&str>)
        .doing(|| format!("mount {SECURITYFS}"))
}

/// Gives the kernel policy from the host. What it has already is given again with each container:
/// who came last is right, as on the host, and what runs goes on under the newer policy.
pub fn load(policies: &[Vec<u8>]) -> Result<()> {
    if !policies.is_empty() && !runs() {
        return Err(Error::Precondition(
            "the pod's kernel runs without AppArmor: it was started before the host's did, or with \
             another configuration; make the pod anew"
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
    let why = match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::EPROTO) => {
            "; it was compiled for a newer kernel than the pod's, so compile it for an older one \
             (apparmor_parser --policy-features, or an abi rule in the profile)"
        }
        _ => "",
    };
    Error::Precondition(format!(
        "the pod's kernel does not take the AppArmor policy of the host: {error}{why}"
    ))
}

pub(super) fn has(profile: &str) -> bool {
    lists(&fs::read_to_string(PROFILES).unwrap_or_default(), profile)
}

fn lists(profiles: &str, profile: &str) -> bool {
    profiles.lines().any(|line| line.rsplit_once(" (").is_some_and(|(name, _)| name == profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_the_kernel_does_not_understand_is_told_with_what_to_do() {
        let text = |number| refused(&io::Error::from_raw_os_error(number)).to_string();
        assert!(text(libc::EPROTONOSUPPORT).contains("--policy-features"));
        assert!(!text(libc::ENOENT).contains("--policy-features"));
        assert!(load(&[]).is_ok());
    }

    #[test]
    fn profiles_are_found_by_their_whole_name() {
        let text = "/usr/bin/man (enforce)\ndocker-default (enforce)\nmy prof (complain)\n";
        assert!(lists(text, "docker-default") && lists(text, "my prof"));
        assert!(!lists(text, "docker") && !lists(text, "") && !lists("", "x"));
    }
}
