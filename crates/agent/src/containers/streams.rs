//! The pipes or the terminal between a process and its stream buffers.

use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};

use super::process::Process;
use crate::error::{Doing, Result};
use crate::oci::helper::Streams;
use crate::stdio::input::Input;
use crate::stdio::output::Output;
use crate::stdio::{channel, pty};

/// The agent's ends; the process' ends travel with the helper.
#[derive(Debug, Default)]
pub(super) struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Pipes that belong to the process' user, so that it may open `/dev/stdout` again.
pub(super) fn pipes(stdin: bool, (uid, gid): (u32, u32)) -> Result<(Streams, Ends)> {
    let what = || "make the pipes of a process".to_owned();
    let pipe = || -> Result<(OwnedFd, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).doing(what)?;
        fchown(&read, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).doing(what)?;
        Ok((read, write))
    };
    let (stdin, stdin_end) = if stdin {
        let (read, write) = pipe()?;
        (Stdio::from(read), Some(write))
    } else {
        (Stdio::null(), None)
    };
    let (out_end, out) = pipe()?;
    let (err_end, err) = pipe()?;
    let streams = Streams { stdin, stdout: Stdio::from(out), stderr: Stdio::from(err) };
    Ok((streams, Ends { stdin: stdin_end, stdout: Some(out_end), stderr: Some(err_end) }))
}

impl Ends {
    /// Starts the pumps.
    pub(super) fn connect(self, process: &mut Process, close_stdin_on_end: bool) -> Result<()> {
        let what = || "watch the pipes of a process".to_owned();
        if let Some(fd) = self.stdin {
            let input = Input::new(channel(fd).doing(what)?, close_stdin_on_end);
            process.stdin = Some(Arc::new(input));
        }
        if let Some(fd) = self.stdout {
            process.stdout = Some(Output::start(channel(fd).doing(what)?));
        }
        if let Some(fd) = self.stderr {
            process.stderr = Some(Output::start(channel(fd).doing(what)?));
        }
        Ok(())
    }
}

/// Connects a terminal that belongs to `owner`: one output, and an input that a connection's end leaves open.
pub(super) fn connect_terminal(
    master: OwnedFd,
    stdin: bool,
    (width, height): (u32, u32),
    (owner, _): (u32, u32),
    process: &mut Process,
) -> Result<()> {
    use std::os::fd::AsFd;
    pty::resize(master.as_fd(), width, height)?;
    let slave = pty::give(master.as_fd(), owner)?;
    let terminal = channel(master).doing(|| "watch the terminal".to_owned())?;
    process.stdout = Some(Output::start(Arc::clone(&terminal)));
    if stdin {
        process.stdin = Some(Arc::new(Input::new(Arc::clone(&terminal), false)));
    }
    process.terminal = Some(terminal);
    process.slave = Some(slave);
    Ok(())
}
