//! The command line of `nacelle-fs`: `--control-fd N --vhost-fd N`, two inherited listening unix
//! sockets. The first (SOCK_SEQPACKET) takes requests of `vmm_api::shares`; the VMM has already
//! connected to the second (SOCK_STREAM).

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use nacelle_fs::mounter::Mounter;
use nacelle_fs::seccomp::{self, Role};
use nacelle_fs::{jail, serve};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{ForkResult, Pid};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nacelle-fs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<(OwnedFd, OwnedFd)> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ["--control-fd", control, "--vhost-fd", vhost] = words[..] else {
        bail!("usage: nacelle-fs --control-fd N --vhost-fd N");
    };
    let adopt = |what: &str, text: &str| {
        let number = text.parse().with_context(|| format!("{what}: {text:?} is not a number"))?;
        nacelle_fs::adopt(number).with_context(|| format!("{what}: descriptor {number}"))
    };
    if control == vhost {
        bail!("--control-fd and --vhost-fd are both {control}");
    }
    Ok((adopt("--control-fd", control)?, adopt("--vhost-fd", vhost)?))
}

fn run() -> Result<ExitCode> {
    let (control, vhost) = arguments()?;
    nacelle_fs::log::init();
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let entries = jail::empty_root()?;
    let (ready, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    match nacelle_fs::fork()? {
        ForkResult::Child => {
            drop((control, ready, entries));
            serve::run(UnixListener::from(vhost), report)?;
            Ok(ExitCode::SUCCESS)
        }
        ForkResult::Parent { child } => {
            drop((vhost, report));
            run_mounter(child, entries, control, ready)
        }
    }
}

fn run_mounter(
    server: Pid,
    entries: jail::Entries,
    control: OwnedFd,
    ready: OwnedFd,
) -> Result<ExitCode> {
    let exited = nacelle_fs::pidfd_open(server)?;
    if nix::unistd::read(ready.as_fd(), &mut [0])? == 0 {
        bail!("the server exited on start");
    }
    drop(ready);
    jail::open_files()?;
    jail::drop_privileges(&jail::MOUNTER)?;
    seccomp::apply(Role::Mounter)?;
    Mounter::new(entries).run(control, exited)?;
    // The pid namespace ends with this process, its first one.
    match waitid(Id::Pid(server), WaitPidFlag::WEXITED)? {
        WaitStatus::Exited(_, 0) => Ok(ExitCode::SUCCESS),
        status => bail!("the server exited: {status:?}"),
    }
}
