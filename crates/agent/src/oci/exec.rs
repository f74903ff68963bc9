//! Helper `exec`: a further process in a running container. It joins the container's cgroup and
//! namespaces, forks into the PID namespace, and the child takes on the identity of the OCI
//! process (runtime-spec config.md, "Process") before it becomes the program.
//!
//! Not libcontainer's tenant container: that one runs without the container's seccomp filter.
#![allow(unsafe_code)] // fork; descriptors arrive as numbers

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::tty;
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::unistd::{ForkResult, Gid, Uid, chdir, fork, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{LinuxSeccomp, Process};
use serde::{Deserialize, Serialize};

use super::command::{self, Failure};
use super::helper::{self, Made, Streams};
use super::seccomp;
use crate::error::{Doing, Result};

pub(super) const VERB: &str = "@exec";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// Init process of the container.
    target: i32,
    /// Directory of the container's cgroup.
    cgroup: PathBuf,
    /// File with a [`Program`]; arguments may be too long for a command line.
    program: PathBuf,
    /// The container lives in the pod's user namespace.
    userns: bool,
    /// Socket for the terminal's master side.
    console: Option<RawFd>,
}

/// The process and the container's seccomp filter.
#[derive(Debug, Serialize, Deserialize)]
pub struct Program {
    pub process: Process,
    pub seccomp: Option<LinuxSeccomp>,
}

/// Whose process an exec joins.
#[derive(Debug)]
pub struct Target {
    /// The container's init.
    pub pid: i32,
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
) -> Result<Made> {
    let what = || format!("write {}", file.display());
    let text = serde_json::to_vec(program).map_err(std::io::Error::from).doing(what)?;
    std::fs::write(file, text).doing(what)?;
    let job = Job {
        target: target.pid,
        cgroup: target.cgroup,
        userns: target.userns,
        program: file.to_owned(),
        console: console.as_ref().map(AsRawFd::as_raw_fd),
    };
    let made = helper::run(VERB, job, streams, console, spawned).await;
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
    // Before it can be seen from the container: a process there must not trace it, nor reach what
    // it has open of the agent's through its folder of /proc. Ends with execve(2).
    step(nix::sys::prctl::set_dumpable(false), "hide from the container")?;
    let text = step(std::fs::read(&job.program), "read the order")?;
    let program: Program = step(serde_json::from_slice(&text), "read the order")?;
    if let Some(score) = program.process.oom_score_adj() {
        step(std::fs::write("/proc/self/oom_score_adj", score.to_string()), "oom_score_adj")?;
    }
    join_cgroup(&job)?;
    if job.userns {
        // Nobody may raise a limit in there.
        set_limits(&program.process)?;
    }
    join_namespaces(job.target, job.userns)?;
    // SAFETY: this process has one thread, so the child may go on using everything.
    match step(unsafe { fork() }, "fork")? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => match become_process(&program, job.userns, job.console) {
            Ok(()) => {
                let late = program.seccomp.as_ref().filter(|_| !has_privileges(&program.process));
                command::execute(&program.process, late, &start)
            }
            Err(why) => {
                command::fail(&start, &Failure { missing: false, message: format!("exec: {why}") })
            }
        },
    }
}

fn join_cgroup(job: &Job) -> Step<()> {
    let join = |dir: &Path| std::fs::write(dir.join("cgroup.procs"), "0");
    match join(&job.cgroup) {
        // A container that manages sub-cgroups (systemd, docker) has no processes in its own one;
        // its init's cgroup is the place then.
        Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
            let text =
                step(std::fs::read_to_string(format!("/proc/{}/cgroup", job.target)), "cgroup")?;
            let path = text.trim().strip_prefix("0::/").unwrap_or_default();
            step(join(&Path::new(super::cgroup::MOUNT).join(path)), "join the init's cgroup")
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

fn join_namespaces(target: i32, userns: bool) -> Step<()> {
    // SAFETY: pidfd_open has no pointer arguments.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, target, 0) };
    let fd = step(Errno::result(fd), "the container's init process")?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    let init = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // All at once: the order in which rights would be lost does not matter then.
    let mut all = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWCGROUP;
    all.set(CloneFlags::CLONE_NEWUSER, userns);
    step(nix::sched::setns(&init, all), "join the container's namespaces")
}

/// Whether there are or may be some, now or by a program that is run.
fn has_privileges(process: &Process) -> bool {
    !process.no_new_privileges().unwrap_or(false)
}

fn become_process(program: &Program, userns: bool, console: Option<RawFd>) -> Step<()> {
    let process = &program.process;
    let syscall = create_syscall();
    step(setsid(), "new session")?;
    if userns {
        // The agent's own root is nobody in there.
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
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
    }
    let privileges = has_privileges(process);
    if !privileges {
        step(nix::sys::prctl::set_no_new_privs(), "no_new_privs")?;
    }
    // Before the user changes: it may lie in a folder that only root can enter. A folder that
    // only the user can enter (root-squashed) is tried again afterwards.
    let entered = chdir(process.cwd().as_path());
    if let Err(error) = entered
        && error != Errno::EACCES
        && error != Errno::EPERM
    {
        return Err(format!("chdir to cwd {:?}: {}", process.cwd().display(), error.desc()));
    }
    // With privileges the filter has to be loaded while there still are some, otherwise it is last.
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
    // Nothing of the agent's may be left open in the program.
    step(syscall.close_range(0), "close descriptors")
}

fn load_seccomp(program: &Program) -> Step<()> {
    let Some(filter) = &program.seccomp else { return Ok(()) };
    step(seccomp::load(filter), "seccomp filter")
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
    use nix::sys::prctl::{get_dumpable, set_dumpable};

    use super::*;

    #[test]
    fn the_helper_is_hidden_before_it_does_anything_else() {
        let job = Job {
            target: 0,
            cgroup: "/nonexistent".into(),
            program: "/nonexistent".into(),
            userns: false,
            console: None,
        };
        let start = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let failed = main(job, start).unwrap_err();
        assert!(failed.contains("read the order"), "{failed}");
        assert!(!get_dumpable().unwrap());
        set_dumpable(true).unwrap();
    }
}
