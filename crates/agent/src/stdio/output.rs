//! One output stream of a process: a task copies from the pipe or terminal into the window; the
//! host's connection empties it. A full window stops the task, so the process blocks in write(2).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use agent_api::stdio::{MAX_FRAME, WINDOW};
use tokio::sync::Notify;

use super::Channel;
use super::window::{OutOfWindow, Window};

/// Maximum bytes of one read: the capacity of a pipe.
const CHUNK: usize = 64 << 10;

#[derive(Debug)]
struct State {
    window: Window,
    /// End of stream: nothing follows the window.
    finished: bool,
    /// Number of the connection that serves the stream; an older one ends.
    connection: u64,
    attached: bool,
}

#[derive(Debug)]
pub struct Output {
    state: Mutex<State>,
    /// Notified when bytes were added, at the end of stream, or when a connection was replaced.
    readable: Notify,
    /// Notified when bytes were acknowledged.
    room: Notify,
    /// Notified when the task has to end.
    closed: Notify,
}

/// Next step of a connection.
pub(super) enum Next {
    Bytes(usize),
    Wait,
    End,
    Replaced,
}

impl Output {
    /// Starts the copy task. It ends at the end of the stream or with `close`.
    pub fn start(channel: Channel) -> Arc<Self> {
        let output = Arc::new(Self {
            state: Mutex::new(State {
                window: Window::new(WINDOW),
                finished: false,
                connection: 0,
                attached: false,
            }),
            readable: Notify::new(),
            room: Notify::new(),
            closed: Notify::new(),
        });
        let pump = Arc::clone(&output);
        tokio::spawn(async move {
            tokio::select! {
                () = pump.pump(&channel) => {}
                () = pump.closed.notified() => {}
            }
            pump.lock().finished = true;
            pump.readable.notify_waiters();
        });
        output
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn pump(&self, channel: &Channel) {
        loop {
            let room = self.lock().window.room();
            if room == 0 {
                self.room.notified().await;
                continue;
            }
            let Ok(mut ready) = channel.readable().await else { return };
            // Allocated only when there is data: idle streams hold no buffer.
            let mut buffer = vec![0; room.min(CHUNK)];
            match ready
                .try_io(|fd| nix::unistd::read(fd.get_ref(), &mut buffer).map_err(io::Error::from))
            {
                Ok(Ok(0)) => return,
                Ok(Ok(n)) => {
                    self.lock().window.push(&buffer[..n]);
                    self.readable.notify_waiters();
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: the last slave side of the terminal was closed. The agent holds one until
                // the process exits; data written before is read first.
                Ok(Err(_)) => return,
                Err(_would_block) => {}
            }
        }
    }

    /// Whether everything was read from the process and acknowledged by the host. False before the
    /// first connection, as the host may still want to read even an empty stream.
    pub fn is_consumed(&self) -> bool {
        let state = self.lock();
        state.finished && state.window.is_empty() && state.connection > 0
    }

    pub fn is_attached(&self) -> bool {
        self.lock().attached
    }

    /// Ends the task and the connection; buffered bytes are dropped.
    pub fn close(&self) {
        let mut state = self.lock();
        state.connection += 1;
        drop(state);
        self.closed.notify_one();
        self.readable.notify_waiters();
    }

    /// Makes the caller's connection the one that serves the stream, starting at `offset`.
    pub(super) fn attach(&self, offset: u64) -> Result<u64, OutOfWindow> {
        let mut state = self.lock();
        state.window.copy(offset, &mut [])?;
        state.connection += 1;
        state.attached = true;
        let connection = state.connection;
        drop(state);
        self.readable.notify_waiters();
        Ok(connection)
    }

    pub(super) fn detach(&self, connection: u64) {
        let mut state = self.lock();
        if state.connection == connection {
            state.attached = false;
        }
    }

    pub(super) fn next(&self, connection: u64, offset: u64, into: &mut Vec<u8>) -> Next {
        let state = self.lock();
        if state.connection != connection {
            return Next::Replaced;
        }
        let available = state.window.end().saturating_sub(offset) as usize;
        if available == 0 {
            return if state.finished { Next::End } else { Next::Wait };
        }
        into.resize(available.min(MAX_FRAME), 0);
        match state.window.copy(offset, into) {
            Ok(n) => Next::Bytes(n),
            Err(OutOfWindow) => Next::Replaced,
        }
    }

    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.readable.notified()
    }

    pub(super) fn acknowledge(&self, offset: u64) -> Result<(), OutOfWindow> {
        self.lock().window.acknowledge(offset)?;
        self.room.notify_one();
        Ok(())
    }
}
