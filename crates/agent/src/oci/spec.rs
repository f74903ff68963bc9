//! Completes the host's OCI specification for this guest: what the host cannot know (root, pod
//! namespaces, the image's users) is filled in, what cannot be had here is refused by name.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Mount, MountBuilder,
    Process, RootBuilder, Spec,
};

use super::user::{Database, Identity};
use crate::error::{Error, Result};

/// Search path of a container that sets none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Arguments and variables of a process, bytes: the kernel would take 2 MiB and more (ARG_MAX);
/// a guest's agent holds them in memory as long as the container.
const MAX_STRINGS: usize = 1 << 20;

/// Which PID namespace a container lives in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    Own,
    /// A path as `/proc/<pid>/ns/pid`.
    Join(PathBuf),
    /// The agent's.
    Guest,
}

/// A bind mount from the guest into the container.
#[derive(Debug, Clone)]
pub struct Bind {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub read_only: bool,
}

/// What the guest knows and the host does not.
#[derive(Debug)]
pub struct Surroundings<'a> {
    pub rootfs: &'a Path,
    pub read_only: bool,
    pub cgroup: &'a Path,
    pub pid: PidNamespace,
    pub shm: &'a Path,
    pub binds: &'a [Bind],
    pub hostname: &'a str,
    pub tty: bool,
    /// Image form, overrides the specification's user unless empty.
    pub user: &'a str,
    pub cwd: &'a str,
}

/// Resources are taken out: the agent applies them itself.
pub fn complete(
    mut spec: Spec,
    users: &Database,
    around: &Surroundings<'_>,
) -> Result<(Spec, LinuxResources)> {
    if spec.hooks().as_ref().is_some_and(|hooks| *hooks != Default::default()) {
        return Err(Error::invalid("oci_spec.hooks", "the guest has no programs to run as hooks"));
    }
    spec.set_hooks(None);
    if !spec.version().starts_with("1.") {
        spec.set_version("1.2.0".to_owned());
    }
    // The pod's, set by ConfigurePod: a container has no UTS namespace of its own.
    spec.set_hostname(None);
    spec.set_domainname(None);

    let mut process =
        spec.process().clone().ok_or_else(|| Error::invalid("oci_spec.process", "is missing"))?;
    if !around.cwd.is_empty() {
        process.set_cwd(PathBuf::from(around.cwd));
    }
    process.set_terminal(Some(around.tty));
    complete_process(&mut process, users, around.user, around.hostname)?;
    // Absent and false mean the same, but libcontainer loads the seccomp filter too late for a
    // process without privileges when it reads "false".
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // libcontainer refuses any profile on a kernel without AppArmor, but these ask for none.
    if matches!(process.apparmor_profile().as_deref(), Some("" | "unconfined")) {
        process.set_apparmor_profile(None);
    }
    spec.set_process(Some(process));

    let root = RootBuilder::default()
        .path(around.rootfs)
        .readonly(around.read_only || spec.root().as_ref().is_some_and(is_read_only))
        .build()
        .map_err(|error| Error::invalid("oci_spec.root", error.to_string()))?;
    spec.set_root(Some(root));
    let mounts = mounts(spec.mounts().clone().unwrap_or_default(), around)?;
    spec.set_mounts(Some(mounts));

    let mut linux = spec.linux().clone().unwrap_or_default();
    for namespace in linux.namespaces().iter().flatten() {
        if matches!(namespace.typ(), LinuxNamespaceType::User | LinuxNamespaceType::Time) {
            return Err(Error::invalid(
                "oci_spec.linux.namespaces",
                format!("a {} namespace is not supported", namespace.typ()),
            ));
        }
    }
    linux.set_namespaces(Some(namespaces(&around.pid)?));
    linux.set_cgroups_path(Some(around.cgroup.to_owned()));
    linux.set_sysctl(None);
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    spec.set_linux(Some(linux));
    Ok((spec, resources))
}

fn is_read_only(root: &oci_spec::runtime::Root) -> bool {
    root.readonly().unwrap_or(false)
}

fn namespaces(pid: &PidNamespace) -> Result<Vec<LinuxNamespace>> {
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
    match pid {
        PidNamespace::Own => all.push(namespace(LinuxNamespaceType::Pid, None)?),
        PidNamespace::Join(path) => all.push(namespace(LinuxNamespaceType::Pid, Some(path))?),
        PidNamespace::Guest => {}
    }
    Ok(all)
}

/// User, environment and folder of a process; used for execs too.
pub fn complete_process(
    process: &mut Process,
    users: &Database,
    user: &str,
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
        return Err(Error::invalid("process", "an argument or a variable holds a NUL byte"));
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
    if !user.is_empty() {
        let Identity { uid, gid, additional } = users.resolve(user)?;
        // Supplemental groups of the pod stay, those of the image's user join them.
        groups.extend(additional);
        account.set_uid(uid).set_gid(gid).set_username(None);
    }
    // The primary group is a supplementary one too: a process that changes its primary group must
    // not escape a file's "this group may not" (negative group permissions).
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

/// The last of several variables of one name counts.
fn deduplicate(env: Vec<String>) -> Vec<String> {
    let name = |variable: &str| variable.split('=').next().map(str::to_owned);
    let mut seen = std::collections::HashSet::new();
    let mut kept: Vec<String> =
        env.into_iter().rev().filter(|variable| seen.insert(name(variable))).collect();
    kept.reverse();
    kept
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount> {
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
        .map_err(|error| Error::invalid("oci_spec.mounts", error.to_string()))
}

fn mounts(given: Vec<Mount>, around: &Surroundings<'_>) -> Result<Vec<Mount>> {
    let base = [
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"])?,
    ];
    let shm = around.shm.to_str().ok_or_else(|| Error::invalid("shm", "path is not UTF-8"))?;
    let shm = mount("/dev/shm", "bind", shm, &["rbind", "nosuid", "noexec", "nodev"])?;
    let mut all: Vec<Mount> = Vec::new();
    // The basic mounts come first, each as the host gave it if it did; then the host's own.
    for default in base {
        let own = given.iter().find(|mount| mount.destination() == default.destination());
        all.push(own.cloned().unwrap_or(default));
    }
    // One /dev/shm for all containers of the pod, whatever kind the specification asks for.
    all.push(shm);
    for mount in given {
        let destination = mount.destination();
        check_destination(destination)?;
        if !all.iter().any(|present| present.destination() == destination) {
            all.push(mount);
        }
    }
    let mut binds: Vec<&Bind> = around.binds.iter().collect();
    // A mount below another one has to come after it.
    binds.sort_by_key(|bind| bind.destination.components().count());
    for bind in binds {
        check_destination(&bind.destination)?;
        let options = if bind.read_only { ["rbind", "ro"] } else { ["rbind", "rw"] };
        let (Some(source), Some(destination)) = (bind.source.to_str(), bind.destination.to_str())
        else {
            return Err(Error::invalid("volumes", "a path is not UTF-8"));
        };
        all.retain(|present| present.destination() != &bind.destination);
        all.push(mount(destination, "bind", source, &options)?);
    }
    Ok(all)
}

fn check_destination(path: &Path) -> Result<()> {
    let plain = path.is_absolute()
        && path != Path::new("/")
        && !path.components().any(|component| component == Component::ParentDir);
    if plain {
        Ok(())
    } else {
        Err(Error::invalid(
            "mount destination",
            format!("{} is not an absolute path below /", path.display()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    fn around<'a>(binds: &'a [Bind]) -> Surroundings<'a> {
        Surroundings {
            rootfs: Path::new("/r"),
            read_only: false,
            cgroup: Path::new("/pod/c"),
            pid: PidNamespace::Own,
            shm: Path::new("/run/nacelle/shm"),
            binds,
            hostname: "web-0",
            tty: false,
            user: "",
            cwd: "",
        }
    }

    const MINIMAL: &str = r#"{"ociVersion":"1.0.2","hostname":"x",
        "process":{"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"env":["A=1","A=2"],
        "noNewPrivileges":false},
        "linux":{"namespaces":[{"type":"network"},{"type":"pid"}],"sysctl":{"a":"b"},
        "resources":{"pids":{"limit":7}}}}"#;

    #[test]
    fn the_pods_namespaces_are_never_unshared() {
        let (spec, resources) =
            complete(spec(MINIMAL), &Database::default(), &around(&[])).unwrap();
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
    fn variables_are_completed_and_the_last_of_a_name_counts() {
        let (spec, _) = complete(spec(MINIMAL), &Database::default(), &around(&[])).unwrap();
        let process = spec.process().as_ref().unwrap();
        let env = process.env().as_deref().unwrap();
        assert_eq!(env, ["A=2", DEFAULT_PATH, "HOME=/", "HOSTNAME=web-0"]);
        assert_eq!(process.no_new_privileges(), None);
    }

    #[test]
    fn every_container_gets_the_pods_shm_and_volumes_in_order() {
        let binds = [
            Bind { source: "/v/b".into(), destination: "/data/x/y".into(), read_only: true },
            Bind { source: "/v/a".into(), destination: "/data".into(), read_only: false },
        ];
        let mut with_shm = spec(MINIMAL);
        with_shm.set_mounts(Some(vec![
            mount("/dev/shm", "tmpfs", "shm", &[]).unwrap(),
            mount("/sys", "sysfs", "sysfs", &["rw"]).unwrap(),
            mount("/tmp", "tmpfs", "tmpfs", &[]).unwrap(),
        ]));
        let (spec, _) = complete(with_shm, &Database::default(), &around(&binds)).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        let at = |path: &str| {
            mounts.iter().position(|mount| mount.destination() == Path::new(path)).unwrap()
        };
        assert_eq!(mounts[at("/dev/shm")].source().as_deref(), Some(Path::new("/run/nacelle/shm")));
        assert_eq!(mounts[at("/sys")].options().as_deref().unwrap(), ["rw"]);
        assert!(at("/proc") < at("/tmp") && at("/tmp") < at("/data"));
        assert!(at("/data") < at("/data/x/y"));
        assert_eq!(mounts.iter().filter(|m| m.destination() == Path::new("/dev/shm")).count(), 1);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (json, word) in [
            (MINIMAL.replace("\"network\"", "\"user\""), "user"),
            (MINIMAL.replace("[\"sh\"]", "[]"), "command"),
            (MINIMAL.replace("\"cwd\":\"/\"", "\"cwd\":\"x\""), "absolute"),
            (
                MINIMAL.replace("\"hostname\":\"x\"", r#""hooks":{"prestart":[{"path":"/x"}]}"#),
                "hook",
            ),
        ] {
            let error = complete(spec(&json), &Database::default(), &around(&[])).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        let up = [Bind { source: "/v".into(), destination: "/a/../b".into(), read_only: false }];
        assert!(complete(spec(MINIMAL), &Database::default(), &around(&up)).is_err());
    }
}
