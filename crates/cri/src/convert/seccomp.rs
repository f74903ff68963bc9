//! Seccomp profiles of containers: the default one, and files that a kubelet or a person points
//! at (format: the `seccomp` part of the OCI runtime spec, config-linux.md#seccomp).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Arch, Capabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::seccomp_table::{AF_ALG, AF_VSOCK, ALLOWED, CLONE_NAMESPACES, PERSONALITIES};
use super::{Refusal, known};
use crate::config::DefaultSeccomp;
use crate::v1;

const ENOSYS: u32 = 38;
/// A profile of many megabytes would be parsed here and compiled in the guest; the default one has
/// a few kilobytes.
const MAX_PROFILE_BYTES: u64 = 1 << 20;

#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    Default,
    Unconfined,
    File(PathBuf),
}

/// Which profile a container asks for. A privileged one has none, whatever it asks for.
#[allow(deprecated)] // old kubelets still name profiles in the deprecated field
pub fn choose(
    security: &v1::LinuxContainerSecurityContext,
    default: DefaultSeccomp,
) -> Result<Choice, Refusal> {
    if security.privileged {
        return Ok(Choice::Unconfined);
    }
    let unset = match default {
        DefaultSeccomp::RuntimeDefault => Choice::Default,
        DefaultSeccomp::Unconfined => Choice::Unconfined,
    };
    if let Some(profile) = &security.seccomp {
        return match known("seccomp.profile_type", profile.profile_type)? {
            v1::security_profile::ProfileType::RuntimeDefault => Ok(Choice::Default),
            v1::security_profile::ProfileType::Unconfined => Ok(Choice::Unconfined),
            v1::security_profile::ProfileType::Localhost => {
                file("seccomp.localhost_ref", &profile.localhost_ref)
            }
        };
    }
    match security.seccomp_profile_path.as_str() {
        "" => Ok(unset),
        "runtime/default" | "docker/default" => Ok(Choice::Default),
        "unconfined" => Ok(Choice::Unconfined),
        other => match other.strip_prefix("localhost/") {
            Some(path) => file("seccomp_profile_path", path),
            None => Err(Refusal::invalid(
                "seccomp_profile_path",
                format!("{other:?}: use runtime/default, unconfined or localhost/<path>"),
            )),
        },
    }
}

fn file(field: &str, path: &str) -> Result<Choice, Refusal> {
    let path = path.strip_prefix("localhost/").unwrap_or(path);
    if !Path::new(path).is_absolute() {
        return Err(Refusal::invalid(field, format!("{path:?} is not an absolute path")));
    }
    Ok(Choice::File(path.into()))
}

/// Reads a profile from the host; it travels to the guest inside the container's spec.
pub fn load(path: &Path) -> Result<LinuxSeccomp, Refusal> {
    let refused =
        |why: String| Refusal::invalid("seccomp", format!("profile {}: {why}", path.display()));
    let size = std::fs::metadata(path).map_err(|error| refused(error.to_string()))?.len();
    if size > MAX_PROFILE_BYTES {
        return Err(refused(format!("{size} bytes; at most {MAX_PROFILE_BYTES} are read")));
    }
    let text = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let profile: LinuxSeccomp =
        serde_json::from_slice(&text).map_err(|error| refused(error.to_string()))?;
    let notify = LinuxSeccompAction::ScmpActNotify;
    if profile.default_action() == notify
        || profile.syscalls().iter().flatten().any(|rule| rule.action() == notify)
    {
        return Err(refused(
            "SCMP_ACT_NOTIFY needs a helper on the host, which a VM has not".into(),
        ));
    }
    Ok(profile)
}

/// The default profile of a container with these capabilities: containerd's, with its error codes.
///
/// What the profile withholds fails with EPERM, the default of an error that is not named. `clone3`,
/// whose flags a filter cannot see, has to look missing, so that C libraries take `clone`. For calls
/// that are newer than any in the table the guest's agent answers ENOSYS, as runc does.
pub fn default_profile(capabilities: &Capabilities) -> LinuxSeccomp {
    let admitted = |group: &&super::seccomp_table::Group| {
        group.capabilities.is_empty()
            || group.capabilities.iter().any(|needed| capabilities.contains(needed))
    };
    let allowed: BTreeSet<&str> =
        ALLOWED.iter().filter(admitted).flat_map(|group| group.names).copied().collect();

    let allow = |names: &[&str], args| rule(names, LinuxSeccompAction::ScmpActAllow, args);
    let all: Vec<&str> = allowed.iter().copied().collect();
    let mut rules = vec![allow(&all, vec![])];
    for persona in PERSONALITIES {
        let same = argument(0, LinuxSeccompOperator::ScmpCmpEq, persona, None);
        rules.push(allow(&["personality"], vec![same]));
    }
    // All families but AF_ALG and AF_VSOCK, as ranges: several conditions on one argument in one rule
    // would be alternatives.
    const { assert!(AF_ALG + 2 == AF_VSOCK) };
    for (op, family) in [
        (LinuxSeccompOperator::ScmpCmpLt, AF_ALG),
        (LinuxSeccompOperator::ScmpCmpEq, AF_ALG + 1),
        (LinuxSeccompOperator::ScmpCmpGt, AF_VSOCK),
    ] {
        rules.push(allow(&["socket"], vec![argument(0, op, family, None)]));
    }
    if !allowed.contains("clone") {
        // value: mask; valueTwo: what must be left of the flags under it.
        let masked = argument(0, LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NAMESPACES, Some(0));
        rules.push(allow(&["clone"], vec![masked]));
        let mut missing = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno, vec![]);
        missing.set_errno_ret(Some(ENOSYS));
        rules.push(missing);
    }

    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .architectures(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])
        .syscalls(rules)
        .build()
        .unwrap_or_default()
}

/// The profile as the guest's agent reads it. In profiles as people write them, and as runc reads
/// them, a masked comparison has its mask in `value` and what is to be left under it in `valueTwo`;
/// agents have them the other way round, as libcontainer (0.7) has, and would make `clone` impossible.
pub fn for_guest(mut profile: LinuxSeccomp) -> LinuxSeccomp {
    let Some(mut rules) = profile.syscalls().clone() else { return profile };
    for rule in &mut rules {
        let Some(args) = rule.args().clone() else { continue };
        let turned = args.iter().map(|given| match given.op() {
            LinuxSeccompOperator::ScmpCmpMaskedEq => {
                let (mask, left) = (given.value(), given.value_two().unwrap_or(0));
                argument(given.index(), given.op(), left, Some(mask))
            }
            _ => *given,
        });
        rule.set_args(Some(turned.collect()));
    }
    profile.set_syscalls(Some(rules));
    profile
}

fn rule(names: &[&str], action: LinuxSeccompAction, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = LinuxSyscallBuilder::default()
        .names(names.iter().map(|name| (*name).to_string()).collect::<Vec<_>>())
        .action(action)
        .build()
        .unwrap_or_default();
    if !args.is_empty() {
        rule.set_args(Some(args));
    }
    rule
}

fn argument(
    index: usize,
    op: LinuxSeccompOperator,
    value: u64,
    value_two: Option<u64>,
) -> LinuxSeccompArg {
    let mut argument = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    if let Some(second) = value_two {
        argument = argument.value_two(second);
    }
    argument.build().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Capability;

    use super::*;

    fn names(profile: &LinuxSeccomp, action: LinuxSeccompAction) -> BTreeSet<String> {
        let rules = profile.syscalls().as_ref().unwrap();
        rules
            .iter()
            .filter(|rule| rule.action() == action && rule.args().is_none())
            .flat_map(|rule| rule.names().clone())
            .collect()
    }

    #[test]
    fn the_default_profile_has_the_error_codes_of_containerds() {
        let profile = default_profile(&Capabilities::new());
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(profile.default_errno_ret(), None, "EPERM");
        let allowed = names(&profile, LinuxSeccompAction::ScmpActAllow);
        for call in ["read", "openat", "execve", "futex", "epoll_wait", "statx", "rseq"] {
            assert!(allowed.contains(call), "{call}");
        }
        for call in ["mount", "bpf", "setns", "reboot", "chroot", "keyctl", "io_uring_setup"] {
            assert!(!allowed.contains(call), "{call}");
        }
        for call in ["clone", "socket", "personality"] {
            assert!(!allowed.contains(call), "{call} has a condition");
        }
        let denied = names(&profile, LinuxSeccompAction::ScmpActErrno);
        assert_eq!(denied, ["clone3".to_owned()].into());
        let rules = profile.syscalls().as_ref().unwrap();
        let clone3 = rules.iter().find(|rule| rule.names() == &["clone3"]).unwrap();
        assert_eq!(clone3.errno_ret(), Some(ENOSYS));
        // That many has containerd's.
        assert_eq!(allowed.len(), 351);
    }

    #[test]
    fn all_socket_families_except_two_are_allowed() {
        let profile = default_profile(&Capabilities::new());
        let rules = profile.syscalls().as_ref().unwrap();
        let passes = |family: u64| {
            rules.iter().filter(|rule| rule.names() == &["socket"]).any(|rule| {
                let given = rule.args().as_ref().unwrap()[0];
                match given.op() {
                    LinuxSeccompOperator::ScmpCmpLt => family < given.value(),
                    LinuxSeccompOperator::ScmpCmpEq => family == given.value(),
                    LinuxSeccompOperator::ScmpCmpGt => family > given.value(),
                    other => panic!("{other:?}"),
                }
            })
        };
        let withheld: Vec<u64> = (0..64).filter(|family| !passes(*family)).collect();
        assert_eq!(withheld, [AF_ALG, AF_VSOCK]);
    }

    #[test]
    fn capabilities_allow_the_calls_that_need_them() {
        let profile = default_profile(&[Capability::SysAdmin].into());
        let allowed = names(&profile, LinuxSeccompAction::ScmpActAllow);
        for call in ["mount", "clone", "clone3", "bpf"] {
            assert!(allowed.contains(call), "{call}");
        }
        let rules = profile.syscalls().as_ref().unwrap();
        for call in ["clone", "clone3"] {
            let of_it = rules.iter().filter(|r| r.names().iter().any(|n| n == call)).count();
            assert_eq!(of_it, 1, "{call}: a condition other a free rule would contradict it");
        }
    }

    #[test]
    fn masked_comparisons_are_swapped_for_the_guest_and_others_are_not() {
        let profile = for_guest(default_profile(&Capabilities::new()));
        let rules = profile.syscalls().as_ref().unwrap();
        let of = |name: &str| {
            let rule = rules.iter().find(|r| r.names().iter().any(|n| n == name)).unwrap();
            rule.args().as_ref().unwrap()[0]
        };
        assert_eq!((of("clone").value(), of("clone").value_two()), (0, Some(CLONE_NAMESPACES)));
        assert_eq!((of("socket").value(), of("socket").value_two()), (AF_ALG, None));
    }

    fn asks(kind: i32, path: &str) -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext {
            seccomp: Some(v1::SecurityProfile { profile_type: kind, localhost_ref: path.into() }),
            ..Default::default()
        }
    }

    #[test]
    fn the_profile_is_chosen_as_asked_and_on_by_default() {
        let default = DefaultSeccomp::RuntimeDefault;
        let silent = v1::LinuxContainerSecurityContext::default();
        assert_eq!(choose(&silent, default), Ok(Choice::Default));
        assert_eq!(choose(&silent, DefaultSeccomp::Unconfined), Ok(Choice::Unconfined));
        assert_eq!(choose(&asks(0, ""), DefaultSeccomp::Unconfined), Ok(Choice::Default));
        assert_eq!(choose(&asks(1, ""), default), Ok(Choice::Unconfined));
        assert_eq!(choose(&asks(2, "/p.json"), default), Ok(Choice::File("/p.json".into())));
        assert_eq!(
            choose(&asks(2, "localhost//p.json"), default),
            Ok(Choice::File("/p.json".into()))
        );
        assert!(choose(&asks(2, "p.json"), default).is_err());
        assert!(choose(&asks(9, ""), default).is_err());
        let privileged = v1::LinuxContainerSecurityContext { privileged: true, ..asks(0, "") };
        assert_eq!(choose(&privileged, default), Ok(Choice::Unconfined));
    }

    #[test]
    fn a_profile_of_the_host_is_read_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        assert!(load(&path).is_err());
        std::fs::write(
            &path,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#,
        )
        .unwrap();
        let profile = load(&path).unwrap();
        assert_eq!(profile.syscalls().as_ref().unwrap()[0].names(), &["mkdir"]);
        std::fs::write(&path, r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).unwrap();
        assert!(load(&path).unwrap_err().to_string().contains("NOTIFY"));
        std::fs::write(&path, "{").unwrap();
        assert!(load(&path).is_err());
    }
}
