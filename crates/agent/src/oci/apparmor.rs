//! AppArmor profiles (kernel Documentation/admin-guide/LSM/apparmor.rst). The guest has none of its
//! own and no compiler for them; a privileged container may load some.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Doing, Result};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const SECURITYFS: &str = "/sys/kernel/security";
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
    fn profiles_are_found_by_their_whole_name() {
        let text = "/usr/bin/man (enforce)\ndocker-default (enforce)\nmy prof (complain)\n";
        assert!(lists(text, "docker-default") && lists(text, "my prof"));
        assert!(!lists(text, "docker") && !lists(text, "") && !lists("", "x"));
    }
}
