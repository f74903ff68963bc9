//! Input stream of a process: bytes of the host's connection are written to the pipe or terminal
//! without buffering, so a process that does not read slows the host down.

use std::io;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use super::Channel;

#[derive(Debug)]
struct State {
    /// None after the process' stdin was closed.
    channel: Option<Channel>,
    connection: u64,
}

#[derive(Debug)]
pub struct Input {
    state: Mutex<State>,
    replaced: Notify,
    /// The end of a connection closes the process' stdin (CRI `stdin_once`). Off if stdin outlives
    /// an attach session.
    close_on_end: bool,
}

impl Input {
    pub fn new(channel: Channel, close_on_end: bool) -> Self {
        Self {
            state: Mutex::new(State { channel: Some(channel), connection: 0 }),
            replaced: Notify::new(),
            close_on_end,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Closes the pipe; the process reads end of file.
    pub fn close(&self) {
        let mut state = self.lock();
        state.channel = None;
        state.connection += 1;
        drop(state);
        self.replaced.notify_waiters();
    }

    pub(super) fn attach(&self) -> u64 {
        let mut state = self.lock();
        state.connection += 1;
        let connection = state.connection;
        drop(state);
        self.replaced.notify_waiters();
        connection
    }

    pub(super) fn is_current(&self, connection: u64) -> bool {
        self.lock().connection == connection
    }

    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.replaced.notified()
    }

    /// Handles an orderly end of the connection.
    pub(super) fn end(&self, connection: u64) {
        let mut state = self.lock();
        if state.connection == connection && self.close_on_end {
            state.channel = None;
        }
    }

    /// Writes all bytes; fails with EPIPE after the process closed its stdin.
    pub(super) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let Some(channel) = self.lock().channel.clone() else {
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            let mut ready = channel.writable().await?;
            match ready
                .try_io(|fd| nix::unistd::write(fd.get_ref(), bytes).map_err(io::Error::from))
            {
                Ok(Ok(n)) => bytes = &bytes[n..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}
