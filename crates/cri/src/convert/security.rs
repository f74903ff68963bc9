//! Capabilities, masked paths and profiles of a container, with containerd's defaults.

use std::collections::HashSet;
use std::str::FromStr;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use sandbox::apparmor::{AppArmor, AppArmorError};
use sandbox::model::HostNamespaces;

use super::{Refusal, known};
use crate::v1;

/// What a container has that asks for nothing: containerd's and Docker's set. A reason on each
/// line; all of them reach no further than the pod's own VM.
const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,     // sshd and login write audit records
    Capability::Chown,          // package managers and entrypoints hand files over
    Capability::DacOverride,    // root in the container is root over its files
    Capability::Fowner,         // the same, for modes and times
    Capability::Fsetid,         // keeps set-id bits when root writes
    Capability::Kill,           // an init ends its children, whoever they run as
    Capability::Mknod,          // image builds make device nodes
    Capability::NetBindService, // port 80
    Capability::NetRaw,         // ping
    Capability::Setfcap,        // package managers set file capabilities
    Capability::Setgid,         // entrypoints step down from root
    Capability::Setpcap,        // and drop what they do not need
    Capability::Setuid,         // entrypoints step down from root
    Capability::SysChroot,      // daemons that lock themselves in
];

/// In ascending order of their numbers, capabilities(7).
const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Paths below /proc and /sys that tell about the kernel or steer it; hidden from containers.
pub const MASKED_PATHS: [&str; 14] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/sys/kernel/debug",
    "/sys/kernel/security",
];

pub const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Capabilities of the container's first process. `ALL` stands for every one, in both lists, and is
/// the ground on which the names are added and dropped; a name in both lists is dropped. "Every one"
/// is of those that can be given away: a VM's kernel has them all.
pub fn capabilities(
    security: &v1::LinuxContainerSecurityContext,
    available: CapabilitySet,
) -> Result<LinuxCapabilities, Refusal> {
    let numbered = || (0u32..).zip(ALL_CAPABILITIES);
    let all = || {
        let available = numbered().filter(|(number, _)| available.0 & (1 << number) != 0);
        available.map(|(_, capability)| capability).collect::<Capabilities>()
    };
    let none = v1::Capability::default();
    let request = security.capabilities.as_ref().unwrap_or(&none);
    let mut set: Capabilities =
        if security.privileged { all() } else { DEFAULT_CAPABILITIES.into_iter().collect() };
    let (drop_all, dropped) =
        parse_list("capabilities.drop_capabilities", &request.drop_capabilities)?;
    let (add_all, added) = parse_list("capabilities.add_capabilities", &request.add_capabilities)?;
    let (ambient_all, mut ambient) =
        parse_list("capabilities.add_ambient_capabilities", &request.add_ambient_capabilities)?;
    if !security.privileged {
        if add_all {
            set = all();
        }
        if drop_all {
            set.clear();
        }
        set.extend(added);
        set.retain(|capability| !dropped.contains(capability));
    }
    if ambient_all {
        ambient = all();
    }
    // An ambient capability has to be permitted and inheritable (capabilities(7)).
    set.extend(ambient.iter().copied());

    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    Ok(capabilities)
}

/// A set of capabilities by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilitySet(u64);

impl CapabilitySet {
    pub const ALL: Self = Self(u64::MAX);

    /// Capabilities that this process can give to containers on this host (proc_pid_status(5), CapBnd).
    pub fn of_process() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::parse(&status).unwrap_or(Self::ALL)
    }

    fn parse(status: &str) -> Option<Self> {
        let digits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
        u64::from_str_radix(digits.trim(), 16).ok().map(Self)
    }
}

/// Whether `ALL` is in the list, and all others.
fn parse_list(field: &str, names: &[String]) -> Result<(bool, HashSet<Capability>), Refusal> {
    let mut all = false;
    let mut set = HashSet::new();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if short == "ALL" {
            all = true;
            continue;
        }
        set.insert(
            Capability::from_str(short)
                .map_err(|_| Refusal::invalid(field, format!("{name:?} is no capability")))?,
        );
    }
    Ok((all, set))
}

/// The host's SELinux, as far as it decides what a label means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selinux {
    Off,
    On,
}

impl Selinux {
    /// selinuxfs is mounted where a policy may be loaded.
    pub fn of_host() -> Self {
        match std::path::Path::new("/sys/fs/selinux/enforce").exists() {
            true => Self::On,
            false => Self::Off,
        }
    }
}

/// A label is checked, and means nothing where the host has no SELinux, as with containerd; where it
/// has, a pod in a VM would escape the policy, so it is refused.
pub fn selinux(label: Option<&v1::SeLinuxOption>, host: Selinux) -> Result<(), Refusal> {
    label.map_or(Ok(()), |label| check_label(label, host))
}

/// The AppArmor profile of containers that name none, as containerd makes one for them: it is used
/// if the node's operator has loaded it.
const DEFAULT_PROFILE: &str = "nacelle-default";
/// Of a profile's name in requests.
const LOADED_ON_HOST: &str = "localhost/";

/// The AppArmor profile that a container runs under, if any: one that is loaded on the host. A pod's
/// VM is given it from there (`sandbox::apparmor`).
#[allow(deprecated)] // old kubelets still name profiles in the deprecated field
pub fn apparmor(
    context: &v1::LinuxContainerSecurityContext,
    host: &AppArmor,
) -> Result<Option<String>, Refusal> {
    use v1::security_profile::ProfileType;
    let (field, profile) = match &context.apparmor {
        Some(profile) => ("apparmor", profile.clone()),
        None => ("apparmor_profile", deprecated_profile(&context.apparmor_profile)?),
    };
    let cannot = |error: AppArmorError| match error {
        AppArmorError::Name { .. } | AppArmorError::NotLoaded { .. } => {
            Refusal::invalid(field, error.to_string())
        }
        _ => Refusal::unsupported(field, error.to_string()),
    };
    let asked = context.apparmor.is_some() || !context.apparmor_profile.is_empty();
    match known(&format!("{field}.profile_type"), profile.profile_type)? {
        ProfileType::Unconfined => Ok(None),
        ProfileType::RuntimeDefault if !host.runs() => match asked {
            true => Err(cannot(AppArmorError::Off)),
            false => Ok(None),
        },
        ProfileType::RuntimeDefault if context.privileged => Ok(None),
        ProfileType::RuntimeDefault => {
            let loaded = host.has(DEFAULT_PROFILE).map_err(cannot);
            // Where nothing can be looked up nothing is loaded, and most pods ask for nothing.
            let loaded = if asked { loaded? } else { loaded.unwrap_or(false) };
            Ok(loaded.then(|| DEFAULT_PROFILE.to_owned()))
        }
        ProfileType::Localhost => {
            let given = profile.localhost_ref.as_str();
            let name = given.strip_prefix(LOADED_ON_HOST).unwrap_or(given);
            host.check(name).map_err(cannot)?;
            Ok(Some(name.to_owned()))
        }
    }
}

/// `runtime/default`, `unconfined`, `localhost/<name>`, or empty.
fn deprecated_profile(text: &str) -> Result<v1::SecurityProfile, Refusal> {
    use v1::security_profile::ProfileType;
    let (kind, name) = match text {
        "" | "runtime/default" => (ProfileType::RuntimeDefault, ""),
        "unconfined" => (ProfileType::Unconfined, ""),
        _ if text.starts_with(LOADED_ON_HOST) => (ProfileType::Localhost, text),
        _ => {
            return Err(Refusal::invalid(
                "apparmor_profile",
                format!("{text:?} is not runtime/default, unconfined or localhost/<name>"),
            ));
        }
    };
    Ok(v1::SecurityProfile { profile_type: kind as i32, localhost_ref: name.to_owned() })
}

fn check_label(label: &v1::SeLinuxOption, host: Selinux) -> Result<(), Refusal> {
    if !label.level.is_empty() && !is_level(&label.level) {
        return Err(Refusal::invalid(
            "selinux_options.level",
            format!("{:?} is not a level like s0:c4,c5", label.level),
        ));
    }
    let given = [&label.user, &label.role, &label.r#type, &label.level];
    if given.iter().all(|part| part.is_empty()) {
        return Ok(());
    }
    match host {
        Selinux::Off => {
            tracing::debug!(?label, "an SELinux label means nothing: SELinux is off on this host");
            Ok(())
        }
        Selinux::On => Err(Refusal::unsupported(
            "selinux_options",
            "a pod's VM runs without SELinux, so the label would not be enforced; leave it away",
        )),
    }
}

/// `s0`, `s0-s1:c0.c1023`, `s0:c4,c5`: one sensitivity or two, and categories.
fn is_level(level: &str) -> bool {
    let numbered = |word: &str, letter: char, most: usize| {
        word.strip_prefix(letter).is_some_and(|digits| {
            (1..=most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
        })
    };
    let (sensitivities, categories) = match level.split_once(':') {
        Some((sensitivities, categories)) => (sensitivities, Some(categories)),
        None => (level, None),
    };
    let mut range = sensitivities.splitn(2, '-');
    let category = |word: &str| word.splitn(2, '.').all(|end| numbered(end, 'c', 4));
    range.all(|word| numbered(word, 's', 1))
        && categories.is_none_or(|categories| categories.split(',').all(category))
}

/// Checks the modes; answers which namespaces are asked for that are the host's, if there is one.
pub fn namespaces(
    options: Option<&v1::NamespaceOption>,
) -> Result<Option<HostNamespaces>, Refusal> {
    let Some(options) = options else { return Ok(None) };
    let mut host = HostNamespaces::default();
    let mode = |field: &str, value: i32| {
        known::<v1::NamespaceMode>(&format!("namespace_options.{field}"), value)
    };
    let unusual = |field: &str, mode: v1::NamespaceMode| {
        Refusal::invalid(
            format!("namespace_options.{field}"),
            format!("{} is not a mode it can have; use POD", mode.as_str_name()),
        )
    };
    match mode("network", options.network)? {
        v1::NamespaceMode::Pod => {}
        v1::NamespaceMode::Node => host.network = true,
        other => return Err(unusual("network", other)),
    }
    match mode("ipc", options.ipc)? {
        v1::NamespaceMode::Pod => {}
        v1::NamespaceMode::Node => host.ipc = true,
        other => return Err(unusual("ipc", other)),
    }
    match mode("pid", options.pid)? {
        v1::NamespaceMode::Node => host.pid = true,
        v1::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(Refusal::invalid("namespace_options.target_id", "empty with pid TARGET"));
        }
        v1::NamespaceMode::Pod | v1::NamespaceMode::Container | v1::NamespaceMode::Target => {}
    }
    let users = super::userns::user_namespace(Some(options))?;
    let host = Some(host).filter(|host| *host != HostNamespaces::default());
    if users.is_some() && host.is_some() {
        return Err(Refusal::invalid(
            "namespace_options.userns_options",
            "a pod with namespaces of the host cannot have users of its own",
        ));
    }
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(privileged: bool, add: &[&str], drop: &[&str]) -> LinuxCapabilities {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let context = v1::LinuxContainerSecurityContext {
            privileged,
            capabilities: Some(v1::Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                ..Default::default()
            }),
            ..Default::default()
        };
        capabilities(&context, CapabilitySet::ALL).unwrap()
    }

    fn bounding(set: &LinuxCapabilities) -> HashSet<Capability> {
        set.bounding().clone().unwrap()
    }

    #[test]
    fn additions_and_drops_change_the_default_set() {
        let plain = bounding(&caps(false, &[], &[]));
        assert_eq!(plain, DEFAULT_CAPABILITIES.into_iter().collect());
        let changed = bounding(&caps(false, &["NET_ADMIN", "cap_sys_time"], &["MKNOD"]));
        assert!(changed.contains(&Capability::NetAdmin) && changed.contains(&Capability::SysTime));
        assert!(!changed.contains(&Capability::Mknod));
        assert_eq!(bounding(&caps(false, &["CHOWN"], &["ALL"])), [Capability::Chown].into());
        assert_eq!(bounding(&caps(false, &["ALL"], &[])).len(), ALL_CAPABILITIES.len());
        let but_one = bounding(&caps(false, &["ALL"], &["SYS_ADMIN"]));
        assert_eq!(but_one.len(), ALL_CAPABILITIES.len() - 1);
        assert!(bounding(&caps(false, &[], &["all"])).is_empty());
    }

    #[test]
    fn a_privileged_container_has_every_capability() {
        assert_eq!(bounding(&caps(true, &[], &["ALL"])).len(), ALL_CAPABILITIES.len());
    }

    #[test]
    fn on_the_host_a_privileged_container_has_the_daemons_bounding_set() {
        let available =
            CapabilitySet::parse("Name:\tx\nCapBnd:\t000001fffeffffff\nCapAmb:\t0\n").unwrap();
        let context = v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
        let set = bounding(&capabilities(&context, available).unwrap());
        assert_eq!(set.len(), ALL_CAPABILITIES.len() - 1);
        assert!(!set.contains(&Capability::SysResource));
        assert_ne!(CapabilitySet::of_process(), CapabilitySet(0));
    }

    #[test]
    fn ambient_capabilities_are_in_all_sets() {
        let context = v1::LinuxContainerSecurityContext {
            capabilities: Some(v1::Capability {
                add_ambient_capabilities: vec!["NET_ADMIN".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        let set = capabilities(&context, CapabilitySet::ALL).unwrap();
        for part in [set.ambient(), set.inheritable(), set.permitted(), set.bounding()] {
            assert!(part.as_ref().unwrap().contains(&Capability::NetAdmin));
        }
        assert_eq!(set.ambient().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn an_unknown_capability_is_refused() {
        assert!(parse_list("add", &["FLY".into()]).is_err());
    }

    #[test]
    fn the_lists_hold_each_capability_once() {
        assert_eq!(ALL_CAPABILITIES.iter().collect::<HashSet<_>>().len(), 41);
        assert!(DEFAULT_CAPABILITIES.iter().all(|c| ALL_CAPABILITIES.contains(c)));
    }

    #[test]
    fn namespaces_of_the_host_are_found_and_modes_that_make_no_sense_refused() {
        let node = v1::NamespaceMode::Node as i32;
        let none = v1::NamespaceOption::default();
        let nothing = HostNamespaces::default();
        for (options, host) in [
            (none.clone(), None),
            (
                v1::NamespaceOption { network: node, ..none.clone() },
                Some(HostNamespaces { network: true, ..nothing }),
            ),
            (
                v1::NamespaceOption { pid: node, ..none.clone() },
                Some(HostNamespaces { pid: true, ..nothing }),
            ),
            (
                v1::NamespaceOption { ipc: node, ..none.clone() },
                Some(HostNamespaces { ipc: true, ..nothing }),
            ),
        ] {
            assert_eq!(namespaces(Some(&options)), Ok(host));
        }
        for (options, word) in [
            (v1::NamespaceOption { pid: 3, ..none.clone() }, "target_id"),
            (v1::NamespaceOption { network: 1, ..none.clone() }, "use POD"),
            (v1::NamespaceOption { ipc: 77, ..none.clone() }, "77"),
        ] {
            let text = namespaces(Some(&options)).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        let no_mapping = v1::NamespaceOption {
            userns_options: Some(v1::UserNamespace::default()),
            ..none.clone()
        };
        assert!(namespaces(Some(&no_mapping)).unwrap_err().to_string().contains("mapping"));
        let host_users = v1::UserNamespace { mode: node, ..Default::default() };
        let usual =
            v1::NamespaceOption { pid: 1, userns_options: Some(host_users), ..none.clone() };
        assert_eq!(namespaces(Some(&usual)), Ok(None));
        let range = v1::IdMapping { host_id: 1000, container_id: 0, length: 10 };
        let users = v1::UserNamespace { mode: 0, uids: vec![range], gids: vec![range] };
        let both = v1::NamespaceOption { ipc: node, userns_options: Some(users), ..none };
        assert!(namespaces(Some(&both)).unwrap_err().to_string().contains("users of its own"));
    }

    #[test]
    fn a_label_is_checked_and_counts_only_where_the_host_has_selinux() {
        let level = |level: &str| v1::SeLinuxOption { level: level.into(), ..Default::default() };
        let check = |label: &v1::SeLinuxOption, host| selinux(Some(label), host);
        for valid in ["s0", "s0-s3", "s0:c4,c5", "s0-s0:c0.c1023", "s1:c1,c2.c9"] {
            assert_eq!(check(&level(valid), Selinux::Off), Ok(()), "{valid}");
            let refusal = check(&level(valid), Selinux::On).unwrap_err();
            assert!(matches!(refusal, Refusal::Unsupported { .. }));
        }
        for wrong in ["s0,c4,c5", "s", "s10", "s0-s1-s2", "s0:", "s0:c", "s0:c12345", "x0"] {
            let refusal = check(&level(wrong), Selinux::Off).unwrap_err().to_string();
            assert!(refusal.starts_with("selinux_options.level"), "{wrong}: {refusal}");
        }
        assert!(check(&v1::SeLinuxOption::default(), Selinux::On).is_ok());
    }

    fn apparmor_host(folder: &std::path::Path, enabled: &str, profiles: &str) -> AppArmor {
        std::fs::write(folder.join("enabled"), enabled).unwrap();
        std::fs::write(folder.join("profiles"), profiles).unwrap();
        AppArmor::at(&folder.join("enabled"), folder)
    }

    fn with_profile(kind: i32, name: &str) -> v1::LinuxContainerSecurityContext {
        let profile = v1::SecurityProfile { profile_type: kind, localhost_ref: name.into() };
        v1::LinuxContainerSecurityContext { apparmor: Some(profile), ..Default::default() }
    }

    #[allow(deprecated)]
    fn with_old_profile(text: &str) -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext { apparmor_profile: text.into(), ..Default::default() }
    }

    #[test]
    #[allow(deprecated)]
    fn a_container_has_the_apparmor_profile_that_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let host = apparmor_host(folder.path(), "Y\n", "mine (enforce)\na//b (complain)\n");
        let ask = |context: &v1::LinuxContainerSecurityContext| apparmor(context, &host);
        let mine = Ok(Some("mine".to_owned()));
        assert_eq!(ask(&with_profile(2, "mine")), mine);
        assert_eq!(ask(&with_profile(2, "localhost/mine")), mine);
        assert_eq!(ask(&with_old_profile("localhost/mine")), mine);
        assert_eq!(ask(&with_profile(2, "a//b")), Ok(Some("a//b".to_owned())));
        for none in ["", "unconfined", "runtime/default"] {
            assert_eq!(ask(&with_old_profile(none)), Ok(None), "{none:?}");
        }
        assert_eq!(ask(&with_profile(1, "")), Ok(None));
        let both = v1::LinuxContainerSecurityContext {
            apparmor_profile: "localhost/other".into(),
            ..with_profile(2, "mine")
        };
        assert_eq!(ask(&both), mine, "the newer field counts");
        for (context, words) in [
            (with_profile(2, "other"), "no profile \"other\" is loaded"),
            (with_profile(2, ":ns://mine"), "namespace"),
            (with_profile(2, ""), "name"),
            (with_profile(7, "mine"), "7"),
            (with_old_profile("localhost/other"), "apparmor_parser"),
            (with_old_profile("mine"), "localhost/<name>"),
        ] {
            let text = ask(&context).unwrap_err().to_string();
            assert!(text.starts_with("apparmor") && text.contains(words), "{text}");
        }
    }

    #[test]
    fn the_default_profile_is_the_operators_if_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let host = apparmor_host(folder.path(), "Y\n", "nacelle-default (enforce)\n");
        let default = Ok(Some("nacelle-default".to_owned()));
        assert_eq!(apparmor(&with_profile(0, ""), &host), default);
        assert_eq!(apparmor(&v1::LinuxContainerSecurityContext::default(), &host), default);
        let privileged =
            v1::LinuxContainerSecurityContext { privileged: true, ..with_profile(0, "") };
        assert_eq!(apparmor(&privileged, &host), Ok(None));
    }

    #[test]
    fn on_a_host_without_apparmor_requests_for_a_profile_are_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let host = apparmor_host(folder.path(), "N\n", "");
        assert_eq!(apparmor(&v1::LinuxContainerSecurityContext::default(), &host), Ok(None));
        assert_eq!(apparmor(&with_old_profile("unconfined"), &host), Ok(None));
        for context in [with_profile(0, ""), with_profile(2, "x"), with_old_profile("localhost/x")]
        {
            let refusal = apparmor(&context, &host).unwrap_err();
            assert!(matches!(refusal, Refusal::Unsupported { .. }), "{refusal}");
            assert!(refusal.to_string().contains("AppArmor is not enabled"), "{refusal}");
        }
    }
}
