//! Helper `exec`: starts a further process in a running container. It joins the container's cgroup
//! and namespaces and forks into the PID namespace; the child applies the OCI process (runtime-spec
//! config.md, "Process") and executes the program.
//!
//! Not libcontainer's tenant container, which does not load the container's seccomp filter.
#![allow(unsafe_code)] // fork; descriptors arrive as numbers

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::tty;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Gid, Uid, chdir, fork, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use super::command::{self, Failure};
use super::helper::{self, Spawned, Streams};
use super::seccomp::Filter;
use crate::error::{Context, Result};

pub(super) const VERB: &str = "@exec";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// pidfd of the container's init process.
    init: RawFd,
    /// `/proc/<pid>` of it.
    proc: RawFd,
    /// Directory of the container's cgroup.
    cgroup: PathBuf,
    /// File with a [`Program`], as it may be too long for an environment variable.
    program: PathBuf,
    /// The container is in the pod's user namespace.
    userns: bool,
    /// Socket to send the terminal's master to.
    console: Option<RawFd>,
}

/// The process and the container's seccomp filter.
#[derive(Debug, Serialize, Deserialize)]
pub struct Program {
    pub process: Process,
    pub seccomp: Option<Filter>,
}

/// The container that an exec joins.
#[derive(Debug)]
pub struct Target {
    /// pidfd of the container's init. Descriptors, as the pid may be another process' one by the time
    /// the helper uses it.
    pub init: OwnedFd,
    /// `/proc/<pid>` of it (O_PATH).
    pub proc: OwnedFd,
    pub cgroup: PathBuf,
    pub userns: bool,
}

/// Starts a process in a container. `file` is written and removed.
pub async fn start(
    target: Target,
    program: &Program,
    file: &Path,
    streams: Streams,
    console: Option<OwnedFd>,
    spawned: impl FnOnce(i32),
) -> Result<Spawned> {
    let what = || format!("write {}", file.display());
    let text = serde_json::to_vec(program).map_err(std::io::Error::from).context(what)?;
    std::fs::write(file, text).context(what)?;
    let job = Job {
        init: target.init.as_raw_fd(),
        proc: target.proc.as_raw_fd(),
        cgroup: target.cgroup,
        userns: target.userns,
        program: file.to_owned(),
        console: console.as_ref().map(AsRawFd::as_raw_fd),
    };
    let inherit = [target.init, target.proc].into_iter().chain(console).collect();
    let made = helper::run(VERB, job, streams, inherit, spawned).await;
    let _ = std::fs::remove_file(file);
    made
}

const ROOT: Uid = Uid::from_raw(0);
const ROOT_GROUP: Gid = Gid::from_raw(0);

type Step<T> = std::result::Result<T, String>;

fn step<T, E: std::fmt::Display>(result: std::result::Result<T, E>, what: &str) -> Step<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

pub(super) fn main(job: Job, start: OwnedFd) -> Step<i32> {
    helper::make_untraceable()?;
    // SAFETY: the agent passed both descriptors to this process; nothing else in it owns them.
    let (init, proc) = unsafe { (OwnedFd::from_raw_fd(job.init), OwnedFd::from_raw_fd(job.proc)) };
    let text = step(std::fs::read(&job.program), "read the exec request")?;
    let program: Program = step(serde_json::from_slice(&text), "parse the exec request")?;
    if let Some(score) = program.process.oom_score_adj() {
        step(std::fs::write("/proc/self/oom_score_adj", score.to_string()), "oom_score_adj")?;
    }
    join_cgroup(&job.cgroup, &proc)?;
    if job.userns {
        // Raising a limit inside the user namespace fails.
        set_limits(&program.process)?;
    }
    join_namespaces(&init, job.userns)?;
    drop((init, proc));
    // SAFETY: this process has one thread, so the child may use all of its state.
    match step(unsafe { fork() }, "fork")? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => match become_process(&program, job.userns, job.console) {
            Ok(()) => {
                let late = program.seccomp.as_ref().filter(|_| !has_privileges(&program.process));
                command::execute(&program.process, late, &start)
            }
            Err(reason) => command::fail(
                &start,
                &Failure { missing: false, message: format!("exec: {reason}") },
            ),
        },
    }
}

fn join_cgroup(cgroup: &Path, init: &OwnedFd) -> Step<()> {
    let join = |dir: &Path| std::fs::write(dir.join("cgroup.procs"), "0");
    match join(cgroup) {
        // EBUSY: a container that manages sub-cgroups (systemd, docker) has no processes in its own
        // cgroup. The cgroup of its init is used instead, as in runc.
        Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let file = step(openat(init, "cgroup", flags, Mode::empty()), "cgroup of init")?;
            let mut text = String::new();
            step(std::fs::File::from(file).read_to_string(&mut text), "cgroup of init")?;
            let path = text.trim().strip_prefix("0::/").unwrap_or_default();
            let dir = Path::new(super::cgroup::MOUNT).join(path);
            // Frozen by the container itself: this process would never continue.
            let events = std::fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
            if events.lines().any(|line| line == "frozen 1") {
                return Err("the cgroup of the container's init is frozen".to_owned());
            }
            step(join(&dir), "join the init's cgroup")
        }
        result => step(result, "join the container's cgroup"),
    }
}

fn set_limits(process: &Process) -> Step<()> {
    let syscall = create_syscall();
    process
        .rlimits()
        .iter()
        .flatten()
        .try_for_each(|rlimit| step(syscall.set_rlimit(rlimit), "rlimit"))
}

fn join_namespaces(init: &OwnedFd, userns: bool) -> Step<()> {
    // One setns(2) for all: no step loses a capability that a later one needs.
    let mut all = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWCGROUP;
    all.set(CloneFlags::CLONE_NEWUSER, userns);
    step(nix::sched::setns(init, all), "join the container's namespaces")
}

/// Whether the process or a program it executes may gain privileges.
fn has_privileges(process: &Process) -> bool {
    !process.no_new_privileges().unwrap_or(false)
}

fn become_process(program: &Program, userns: bool, console: Option<RawFd>) -> Step<()> {
    let process = &program.process;
    let syscall = create_syscall();
    step(setsid(), "new session")?;
    if userns {
        // uid 0 of the agent is not mapped there; become the namespace's root.
        step(setresgid(ROOT_GROUP, ROOT_GROUP, ROOT_GROUP), "group")?;
        step(setresuid(ROOT, ROOT, ROOT), "user")?;
    }
    if let Some(socket) = console {
        step(tty::setup_console(&*syscall, socket, false), "terminal")?;
    }
    if !userns {
        set_limits(process)?;
    }
    if process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty()) {
        let profile = process.apparmor_profile().as_deref().unwrap_or_default();
        step(libcontainer::apparmor::apply_profile(profile), "AppArmor profile")?;
    }
    if let Some(mask) = process.user().umask() {
        nix::sys::stat::umask(Mode::from_bits_truncate(mask));
    }
    let privileges = has_privileges(process);
    if !privileges {
        step(nix::sys::prctl::set_no_new_privs(), "no_new_privs")?;
    }
    // First as root, as the directory may be accessible to root only. If access is denied (root
    // squash), it is retried as the user.
    let entered = chdir(process.cwd().as_path());
    if let Err(error) = entered
        && error != Errno::EACCES
        && error != Errno::EPERM
    {
        return Err(format!("chdir to cwd {:?}: {}", process.cwd().display(), error.desc()));
    }
    // Without no_new_privs the filter is loaded before capabilities are dropped, otherwise last.
    if privileges {
        load_seccomp(program)?;
    }
    step(nix::sys::prctl::set_keepcaps(true), "keep capabilities")?;
    take_identity(process)?;
    if let Some(wanted) = process.capabilities() {
        step(capabilities::reset_effective(&*syscall), "capabilities")?;
        step(capabilities::drop_privileges(wanted, &*syscall), "capabilities")?;
    }
    if entered.is_err() {
        let what = format!("chdir to cwd {:?}", process.cwd().display());
        step(chdir(process.cwd().as_path()), &what)?;
    }
    // Sets close-on-exec on all descriptors of the agent.
    step(syscall.close_range(0), "close descriptors")
}

fn load_seccomp(program: &Program) -> Step<()> {
    let Some(filter) = &program.seccomp else { return Ok(()) };
    step(filter.load(), "seccomp filter")
}

fn take_identity(process: &Process) -> Step<()> {
    let user = process.user();
    let mut groups = vec![];
    for gid in user.additional_gids().iter().flatten() {
        groups.push(Gid::from_raw(*gid));
    }
    step(setgroups(&groups), "supplementary groups")?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    step(setresgid(gid, gid, gid), "group")?;
    step(setresuid(uid, uid, uid), "user")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::IntoRawFd;

    use nix::sys::prctl::{get_dumpable, set_dumpable};

    use super::*;

    #[test]
    fn the_exec_helper_is_not_dumpable_before_any_other_step() {
        let null = || File::open("/dev/null").unwrap();
        let job = Job {
            init: null().into_raw_fd(),
            proc: null().into_raw_fd(),
            cgroup: "/nonexistent".into(),
            program: "/nonexistent".into(),
            userns: false,
            console: None,
        };
        let failed = main(job, null().into()).unwrap_err();
        assert!(failed.contains("read the exec request"), "{failed}");
        assert!(!get_dumpable().unwrap());
        set_dumpable(true).unwrap();
    }
}
