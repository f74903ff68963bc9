//! Creates the pipes or the terminal of a process and connects them to stream buffers.

use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};

use super::process::Process;
use crate::error::{Context, Result};
use crate::oci::helper::Streams;
use crate::stdio::input::Input;
use crate::stdio::output::Output;
use crate::stdio::{channel, pty};

/// The agent's ends of the pipes; the helper gets the others.
#[derive(Debug, Default)]
pub(super) struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Creates pipes owned by the process' user, so that it may reopen `/dev/stdout`.
pub(super) fn pipes(stdin: bool, (uid, gid): (u32, u32)) -> Result<(Streams, Ends)> {
    let what = || "create the pipes of a process".to_owned();
    let pipe = || -> Result<(OwnedFd, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).context(what)?;
        fchown(&read, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).context(what)?;
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
    /// Starts a task per output and registers the input.
    pub(super) fn connect(self, process: &mut Process, close_stdin_on_end: bool) -> Result<()> {
        let what = || "register the pipes of a process".to_owned();
        if let Some(fd) = self.stdin {
            let input = Input::new(channel(fd).context(what)?, close_stdin_on_end);
            process.stdin = Some(Arc::new(input));
        }
        if let Some(fd) = self.stdout {
            process.stdout = Some(Output::start(channel(fd).context(what)?));
        }
        if let Some(fd) = self.stderr {
            process.stderr = Some(Output::start(channel(fd).context(what)?));
        }
        Ok(())
    }
}

/// Connects a terminal owned by `owner`: one output, and an input that stays open after a
/// connection ends.
pub(super) fn connect_terminal(
    master: OwnedFd,
    stdin: bool,
    (width, height): (u32, u32),
    (owner, _): (u32, u32),
    process: &mut Process,
) -> Result<()> {
    use std::os::fd::AsFd;
    pty::resize(master.as_fd(), width, height)?;
    let slave = pty::set_owner(master.as_fd(), owner)?;
    let terminal = channel(master).context(|| "register the terminal".to_owned())?;
    process.stdout = Some(Output::start(Arc::clone(&terminal)));
    if stdin {
        process.stdin = Some(Arc::new(Input::new(Arc::clone(&terminal), false)));
    }
    process.terminal = Some(terminal);
    process.slave = Some(slave);
    Ok(())
}
