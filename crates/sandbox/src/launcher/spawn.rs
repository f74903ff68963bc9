//! clone3 into a cgroup and new namespaces, then exec with exactly the given descriptors.
//!
//! Spec: clone(2), close_range(2), cgroups(7).
#![allow(unsafe_code)] // clone3 has no safe wrapper; the child prepares itself with plain syscalls

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::protocol::{Namespaces, OWN_FDS, Response};

/// clone(2); libc's constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Number of the program's first own descriptor.
const FIRST_FD: RawFd = 3;
/// Temporary descriptor numbers, above any that a packet can fill.
const HIGH_FD: RawFd = 500;

/// Lets the kernel reap children: they are watched by pidfd.
pub(super) fn ignore_sigchld() -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so no code of ours can run in signal context.
    match unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(super) fn spawn(
    exe: &Path,
    args: &[String],
    own: Namespaces,
    fds: Vec<OwnedFd>,
) -> (Response, Option<OwnedFd>) {
    match try_spawn(exe, args, own, fds) {
        Ok((pid, pidfd)) => (Response::Started { pid }, Some(pidfd)),
        Err((what, e)) => (Response::failed(what, &e), None),
    }
}

/// Everything the child needs, allocated before the clone: the child must not allocate.
struct Plan {
    exe: CString,
    args: Vec<*const libc::c_char>,
    env: [*const libc::c_char; 1],
    null: File,
    stderr: OwnedFd,
    fds: Vec<OwnedFd>,
    failure: OwnedFd,
    own: Namespaces,
}

fn try_spawn(
    exe: &Path,
    args: &[String],
    own: Namespaces,
    mut fds: Vec<OwnedFd>,
) -> Result<(u32, OwnedFd), (String, io::Error)> {
    let invalid = |what: &str| (what.to_owned(), io::Error::from_raw_os_error(libc::EINVAL));
    if fds.len() < OWN_FDS {
        return Err(invalid("request without descriptors"));
    }
    let rest = fds.split_off(OWN_FDS);
    let [cgroup, stderr] = <[OwnedFd; OWN_FDS]>::try_from(fds).map_err(|_| invalid("request"))?;
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| invalid("argument with a NUL"));
    let path = exe;
    let exe = text(path.as_os_str().as_bytes())?;
    let words: Vec<CString> = args.iter().map(|a| text(a.as_bytes())).collect::<Result<_, _>>()?;
    let mut args = vec![exe.as_ptr()];
    args.extend(words.iter().map(|w| w.as_ptr()));
    args.push(std::ptr::null());
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(|e| ("open /dev/null".to_owned(), e))?;
    let (failed, failure) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|e| ("create a pipe".to_owned(), e.into()))?;
    let env = [std::ptr::null()];
    let plan = Plan { exe, args, env, null, stderr, fds: rest, failure, own };
    let (pid, pidfd) = clone_into(&cgroup, &plan).map_err(|e| ("clone3".to_owned(), e))?;
    drop(plan);
    // The pipe closes on exec; data before that is the failed step.
    let mut report = [0; 8];
    let mut failed = File::from(failed);
    match failed.read_exact(&mut report) {
        Ok(()) => {
            let [step, errno] = [&report[..4], &report[4..]]
                .map(|b| i32::from_le_bytes(b.try_into().unwrap_or_default()));
            let step = STEPS.get(step as usize).copied().unwrap_or("?");
            let what = format!("{step} of {}", path.display());
            Err((what, io::Error::from_raw_os_error(errno)))
        }
        Err(_) => Ok((pid, pidfd)),
    }
}

fn clone_into(cgroup: &OwnedFd, plan: &Plan) -> io::Result<(u32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    let Namespaces { mount, pid, ipc, uts, net } = plan.own;
    for (own, flag) in [
        (mount, libc::CLONE_NEWNS),
        (pid, libc::CLONE_NEWPID),
        (ipc, libc::CLONE_NEWIPC),
        (uts, libc::CLONE_NEWUTS),
        (net, libc::CLONE_NEWNET),
    ] {
        if own {
            flags |= flag as u64;
        }
    }
    // SAFETY: clone_args is plain old data, for which all zeros is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM the child gets a copy of this process, which has one thread (the
    // contract of `launcher::main`), so no lock is held by a thread that the copy lacks. `args` and
    // `pidfd` outlive the call.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => child(plan),
        // SAFETY: the kernel has stored a new descriptor for us there (CLONE_PIDFD).
        pid => Ok((pid as u32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Names of the child's steps in the request of their numbers.
const STEPS: [&str; 6] =
    ["set-up of the session", "signals", "mounts", "descriptors", "closing of descriptors", "exec"];

/// Runs in the new process; never returns.
fn child(plan: &Plan) -> ! {
    let (step, error) = prepare_and_exec(plan);
    let mut report = [0; 8];
    report[..4].copy_from_slice(&step.to_le_bytes());
    report[4..].copy_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_le_bytes());
    // SAFETY: `report` is 8 readable bytes. The pipe stands at its own number until it is moved to
    // HIGH_FD; writing to the wrong one of the two fails with EBADF and does no harm.
    unsafe {
        if libc::write(HIGH_FD, report.as_ptr().cast(), report.len()) < 0 {
            libc::write(plan.failure.as_raw_fd(), report.as_ptr().cast(), report.len());
        }
        libc::_exit(127)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn prepare_and_exec(plan: &Plan) -> (i32, io::Error) {
    // SAFETY: takes no arguments and touches no memory.
    if let Err(e) = check(unsafe { libc::setsid() }) {
        return (0, e);
    }
    if let Err(e) = reset_signals() {
        return (1, e);
    }
    if plan.own.mount {
        // Mounts of this process must not propagate to the host.
        let root = c"/".as_ptr();
        let (null, flags) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
        // SAFETY: a change of propagation reads the target's path only; the others may be null.
        if let Err(e) = check(unsafe { libc::mount(null, root, null, flags, null.cast()) }) {
            return (2, e);
        }
    }
    if let Err(e) = place_descriptors(plan) {
        return (3, e);
    }
    let last = FIRST_FD + plan.fds.len() as RawFd;
    // The failure pipe at HIGH_FD is closed by exec (O_CLOEXEC).
    for (from, to) in [(last, HIGH_FD - 1), (HIGH_FD + 1, RawFd::MAX)] {
        // SAFETY: closes descriptors of this process that nothing uses any more.
        let result = unsafe {
            libc::syscall(libc::SYS_close_range, from as libc::c_uint, to as libc::c_uint, 0)
        };
        if result < 0 {
            return (4, io::Error::last_os_error());
        }
    }
    // SAFETY: `exe` is NUL-terminated; `args` and `env` end with a null pointer, and the strings
    // they point to were alive at the clone, so this copy has them too.
    unsafe { libc::execve(plan.exe.as_ptr(), plan.args.as_ptr(), plan.env.as_ptr()) };
    (5, io::Error::last_os_error())
}

/// Ignored signals and the mask are inherited over exec: reset both.
fn reset_signals() -> io::Result<()> {
    for signal in [libc::SIGCHLD, libc::SIGPIPE, libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: SIG_DFL installs no handler.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: sigset_t is plain old data; sigemptyset makes it valid before it is used.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is ours and lives through both calls; the old mask is not asked for.
    check(unsafe {
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    })
}

/// First duplicates all descriptors to high numbers, then to their targets.
fn place_descriptors(plan: &Plan) -> io::Result<()> {
    let mut wanted = vec![(plan.null.as_raw_fd(), 0), (plan.null.as_raw_fd(), 1)];
    wanted.push((plan.stderr.as_raw_fd(), 2));
    for (n, fd) in plan.fds.iter().enumerate() {
        wanted.push((fd.as_raw_fd(), FIRST_FD + n as RawFd));
    }
    // SAFETY: duplicates a descriptor that `plan` holds open.
    check(unsafe { libc::dup3(plan.failure.as_raw_fd(), HIGH_FD, libc::O_CLOEXEC) })?;
    for (from, _) in &mut wanted {
        // SAFETY: duplicates a descriptor that `plan` holds open.
        *from = unsafe { libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, HIGH_FD + 1) };
        check(*from)?;
    }
    for (from, to) in wanted {
        // SAFETY: `from` was made above; `to` is either unused or a copy of it stands above.
        check(unsafe { libc::dup2(from, to) })?;
    }
    Ok(())
}
