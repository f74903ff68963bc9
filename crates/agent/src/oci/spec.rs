//! Completes the host's OCI spec with what only the guest knows (root, namespaces of the pod, users
//! of the image); refuses fields that are not supported here.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Process,
    RootBuilder, Spec,
};

pub use super::spec_context::{Bind, PidNamespace, SpecContext, UserNamespaceContext};
use super::user::{Database, Identity};
use super::{apparmor, mounts};
use crate::error::{Error, Result};

/// PATH of a container that sets none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Maximum size of arguments and environment of a process, bytes. The agent keeps them in memory as
/// long as the container exists; the kernel's limit is 2 MiB or more (ARG_MAX).
const MAX_STRINGS: usize = 1 << 20;

/// Completes a spec. Resources are returned separately, as the agent sets them itself.
pub fn complete(
    mut spec: Spec,
    users: &Database,
    context: &SpecContext<'_>,
) -> Result<(Spec, LinuxResources)> {
    if spec.hooks().as_ref().is_some_and(|hooks| *hooks != Default::default()) {
        return Err(Error::invalid("oci_spec.hooks", "hooks are not supported"));
    }
    spec.set_hooks(None);
    if !spec.version().starts_with("1.") {
        spec.set_version("1.2.0".to_owned());
    }
    // ConfigurePod has set the pod's hostname; containers have no UTS namespace of their own.
    spec.set_hostname(None);
    spec.set_domainname(None);

    let mut process =
        spec.process().clone().ok_or_else(|| Error::invalid("oci_spec.process", "is missing"))?;
    if !context.cwd.is_empty() {
        process.set_cwd(PathBuf::from(context.cwd));
    }
    process.set_terminal(Some(context.tty));
    let groups = if context.strict_groups { Groups::Given } else { Groups::Merged };
    complete_process(&mut process, users, context.user, groups, context.hostname)?;
    // Absent and false mean the same, but for an explicit false libcontainer loads the seccomp
    // filter after it has dropped the capabilities needed for it.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    check_labels(&spec, &process)?;
    // libcontainer refuses these on a kernel without AppArmor, although they need no profile.
    if matches!(process.apparmor_profile().as_deref(), Some("" | "unconfined")) {
        process.set_apparmor_profile(None);
    }
    spec.set_process(Some(process));

    let root = RootBuilder::default()
        .path(context.rootfs)
        .readonly(context.read_only || spec.root().as_ref().is_some_and(is_read_only))
        .build()
        .map_err(|error| Error::invalid("oci_spec.root", error.to_string()))?;
    spec.set_root(Some(root));
    let mounts = mounts::complete(spec.mounts().clone().unwrap_or_default(), context)?;
    spec.set_mounts(Some(mounts));

    let mut linux = spec.linux().clone().unwrap_or_default();
    for namespace in linux.namespaces().iter().flatten() {
        if namespace.typ() == LinuxNamespaceType::Time {
            return Err(Error::invalid(
                "oci_spec.linux.namespaces",
                format!("a {} namespace is not supported", namespace.typ()),
            ));
        }
    }
    linux.set_namespaces(Some(namespaces(context)?));
    // The mappings were written when the pod's user namespace was created.
    linux.set_uid_mappings(None);
    linux.set_gid_mappings(None);
    if context.shared_mounts {
        linux.set_rootfs_propagation(Some("shared".to_owned()));
    }
    if !context.devices.is_empty() {
        let mut devices = linux.devices().clone().unwrap_or_default();
        for device in &context.devices {
            // A later node replaces an earlier one of the same path.
            devices.retain(|known| known.path() != device.path());
            devices.push(device.clone());
        }
        linux.set_devices(Some(devices));
    }
    linux.set_cgroups_path(Some(context.cgroup.to_owned()));
    linux.set_sysctl(None);
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    spec.set_linux(Some(linux));
    Ok((spec, resources))
}

/// Refuses labels of a security module that the kernel does not have; ignoring them would leave the
/// container less confined than requested.
fn check_labels(spec: &Spec, process: &Process) -> Result<()> {
    let label = process.selinux_label().as_deref().unwrap_or_default();
    let mount_label =
        spec.linux().as_ref().and_then(|linux| linux.mount_label().as_deref()).unwrap_or_default();
    for (field, label) in
        [("oci_spec.process.selinuxLabel", label), ("oci_spec.linux.mountLabel", mount_label)]
    {
        if !label.is_empty() {
            return Err(Error::invalid(
                field,
                format!("{label:?}: the guest kernel does not support SELinux"),
            ));
        }
    }
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if matches!(profile, "" | "unconfined") {
        return Ok(());
    }
    let bad = |reason: &str| {
        Error::invalid("oci_spec.process.apparmorProfile", format!("{profile:?}: {reason}"))
    };
    if !apparmor::is_enabled() {
        return Err(bad("AppArmor is not enabled in the kernel"));
    }
    if !apparmor::is_loaded(profile) {
        return Err(bad("no such profile is loaded"));
    }
    Ok(())
}

fn is_read_only(root: &oci_spec::runtime::Root) -> bool {
    root.readonly().unwrap_or(false)
}

fn namespaces(context: &SpecContext<'_>) -> Result<Vec<LinuxNamespace>> {
    let namespace = |typ, path: Option<&Path>| {
        let mut builder = LinuxNamespaceBuilder::default().typ(typ);
        if let Some(path) = path {
            builder = builder.path(path);
        }
        builder
            .build()
            .map_err(|error| Error::invalid("oci_spec.linux.namespaces", error.to_string()))
    };
    let mut all = vec![
        namespace(LinuxNamespaceType::Mount, None)?,
        namespace(LinuxNamespaceType::Cgroup, None)?,
    ];
    if let Some(userns) = &context.userns {
        all.push(namespace(LinuxNamespaceType::User, Some(userns.path))?);
    }
    match &context.pid {
        PidNamespace::Own => all.push(namespace(LinuxNamespaceType::Pid, None)?),
        PidNamespace::Join(path) => all.push(namespace(LinuxNamespaceType::Pid, Some(path))?),
        PidNamespace::Guest => {}
    }
    Ok(all)
}

/// Supplementary groups of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Groups {
    /// Those given, and those of the user in the image's `/etc/group`.
    Merged,
    Given,
}

/// Completes user, environment and working directory of a process; also used for execs.
pub fn complete_process(
    process: &mut Process,
    users: &Database,
    user: &str,
    which: Groups,
    hostname: &str,
) -> Result<()> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("process.args", "no command given"));
    }
    let env = process.env().as_deref().unwrap_or_default();
    let length: usize = args.iter().chain(env).map(|text| text.len() + 1).sum();
    if length > MAX_STRINGS {
        return Err(Error::Exhausted { what: "bytes of arguments", limit: MAX_STRINGS as u64 });
    }
    if args.iter().chain(env).any(|text| text.contains('\0')) {
        return Err(Error::invalid(
            "process",
            "an argument or environment variable contains a NUL byte",
        ));
    }
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd(PathBuf::from("/"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(
            "process.cwd",
            format!("{} is not absolute", process.cwd().display()),
        ));
    }
    let mut account = process.user().clone();
    let mut groups = account.additional_gids().clone().unwrap_or_default();
    let memberships = if user.is_empty() {
        users.groups_of(account.uid())
    } else {
        let Identity { uid, gid, additional } = users.resolve(user)?;
        account.set_uid(uid).set_gid(gid).set_username(None);
        additional
    };
    if which == Groups::Merged {
        groups.extend(memberships);
    }
    // The primary group is also a supplementary one: otherwise a process could leave it to bypass
    // negative group permissions (CVE-2022-2995).
    groups.push(account.gid());
    groups.sort_unstable();
    groups.dedup();
    account.set_additional_gids(Some(groups));
    process.set_user(account);
    let uid = process.user().uid();
    let mut env = deduplicate(process.env().clone().unwrap_or_default());
    let missing = |env: &[String], name: &str| {
        !env.iter().any(|variable| variable.split('=').next() == Some(name))
    };
    if missing(&env, "PATH") {
        env.push(DEFAULT_PATH.to_owned());
    }
    if missing(&env, "HOME") {
        env.push(format!("HOME={}", users.home(uid)));
    }
    if missing(&env, "TERM") && process.terminal() == Some(true) {
        env.push("TERM=xterm".to_owned());
    }
    if missing(&env, "HOSTNAME") && !hostname.is_empty() {
        env.push(format!("HOSTNAME={hostname}"));
    }
    process.set_env(Some(env));
    Ok(())
}

/// Keeps the last of several variables with the same name.
fn deduplicate(env: Vec<String>) -> Vec<String> {
    let name = |variable: &str| variable.split('=').next().map(str::to_owned);
    let mut seen = std::collections::HashSet::new();
    let mut kept: Vec<String> =
        env.into_iter().rev().filter(|variable| seen.insert(name(variable))).collect();
    kept.reverse();
    kept
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    pub(in super::super) fn context<'a>(binds: &'a [Bind]) -> SpecContext<'a> {
        SpecContext {
            rootfs: Path::new("/r"),
            read_only: false,
            cgroup: Path::new("/pod/c"),
            pid: PidNamespace::Own,
            shm: Path::new("/run/nacelle/shm"),
            binds,
            shared_mounts: false,
            devices: Vec::new(),
            userns: None,
            hostname: "web-0",
            tty: false,
            user: "",
            strict_groups: false,
            cwd: "",
        }
    }

    const MINIMAL: &str = r#"{"ociVersion":"1.0.2","hostname":"x",
        "process":{"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"env":["A=1","A=2"],
        "noNewPrivileges":false},
        "linux":{"namespaces":[{"type":"network"},{"type":"pid"}],"sysctl":{"a":"b"},
        "resources":{"pids":{"limit":7}}}}"#;

    #[test]
    fn the_pods_namespaces_are_not_unshared() {
        let (spec, resources) =
            complete(spec(MINIMAL), &Database::default(), &context(&[])).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let types: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
        assert_eq!(
            types,
            [LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup, LinuxNamespaceType::Pid]
        );
        assert_eq!(spec.hostname(), &None);
        assert_eq!(resources.pids().as_ref().unwrap().limit(), 7);
        assert!(linux.resources().is_none());
    }

    #[test]
    fn the_environment_is_completed_and_the_last_variable_of_a_name_wins() {
        let (spec, _) = complete(spec(MINIMAL), &Database::default(), &context(&[])).unwrap();
        let process = spec.process().as_ref().unwrap();
        let env = process.env().as_deref().unwrap();
        assert_eq!(env, ["A=2", DEFAULT_PATH, "HOME=/", "HOSTNAME=web-0"]);
        assert_eq!(process.no_new_privileges(), None);
    }

    #[test]
    fn unsupported_fields_are_refused_by_name() {
        for (json, word) in [
            (MINIMAL.replace("\"network\"", "\"time\""), "time"),
            (MINIMAL.replace("\"cwd\"", "\"selinuxLabel\":\"a:b:c\",\"cwd\""), "SELinux"),
            (MINIMAL.replace("\"cwd\"", "\"apparmorProfile\":\"nosuch\",\"cwd\""), "nosuch"),
            (MINIMAL.replace("[\"sh\"]", "[]"), "command"),
            (MINIMAL.replace("\"cwd\":\"/\"", "\"cwd\":\"x\""), "absolute"),
            (
                MINIMAL.replace("\"hostname\":\"x\"", r#""hooks":{"prestart":[{"path":"/x"}]}"#),
                "hook",
            ),
        ] {
            let error = complete(spec(&json), &Database::default(), &context(&[])).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
