//! Connects the standard streams of this process with a process in a pod.

use std::io::{Read, Write};

use anyhow::{Context, Result, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::connect::call_error;
use super::terminal::{self, Raw};
use crate::api::session_input::Input;
use crate::api::session_output::Output;
use crate::api::{CloseStdin, SessionInput, SessionOutput, WindowSize};

/// Chunks of input that are queued.
const AHEAD: usize = 8;
const CHUNK: usize = 32 << 10;

/// The sender of a session's input messages, and the stream for the call.
pub(super) fn inputs(first: Input) -> (mpsc::Sender<SessionInput>, ReceiverStream<SessionInput>) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    // Cannot fail: the queue is empty.
    let _ = sender.try_send(SessionInput { input: Some(first) });
    (sender, ReceiverStream::new(receiver))
}

pub(super) fn window_size() -> Option<WindowSize> {
    terminal::size()
        .map(|(width, height)| WindowSize { width: u32::from(width), height: u32::from(height) })
}

/// What a session transfers besides output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carry {
    pub(super) stdin: bool,
    pub(super) tty: bool,
}

/// A running session. Dropping it restores the terminal.
pub(super) struct Session {
    sender: mpsc::Sender<SessionInput>,
    outputs: Streaming<SessionOutput>,
    carry: Carry,
    resized: Signal,
    /// Output that cannot be written is dropped.
    lossy: bool,
    code: Option<i32>,
    _raw: Option<Raw>,
}

impl Session {
    pub(super) async fn start(
        sender: mpsc::Sender<SessionInput>,
        reply: Result<Response<Streaming<SessionOutput>>, Status>,
        carry: Carry,
    ) -> Result<Self> {
        let outputs = reply.map_err(call_error)?.into_inner();
        let raw = (carry.tty && carry.stdin && terminal::is_terminal())
            .then(Raw::enable)
            .transpose()
            .context("setting the terminal to raw mode")?;
        if carry.stdin {
            let sender = sender.clone();
            // A separate thread: a read from a terminal cannot be cancelled.
            std::thread::spawn(move || read_stdin(&sender));
        }
        let resized = signal(SignalKind::window_change())?;
        if carry.tty {
            resize(&sender).await;
        }
        Ok(Self { sender, outputs, carry, resized, lossy: false, code: None, _raw: raw })
    }

    /// From here on, failing writes are ignored: the terminal may be closed.
    pub(super) fn ignore_write_errors(&mut self) {
        self.lossy = true;
    }

    /// Transfers bytes until the process ends; returns its exit code. Can be cancelled and called
    /// again.
    pub(super) async fn drive(&mut self) -> Result<i32> {
        loop {
            tokio::select! {
                message = self.outputs.message() => {
                    match message.map_err(call_error)?.map(|m| m.output) {
                        Some(Some(Output::Stdout(data))) => {
                            self.written(write(&mut std::io::stdout(), &data))?;
                        }
                        Some(Some(Output::Stderr(data))) => {
                            self.written(write(&mut std::io::stderr(), &data))?;
                        }
                        Some(Some(Output::Exit(exit))) => self.code = Some(exit.code),
                        Some(Some(Output::Started(_)) | None) => {}
                        None => break,
                    }
                }
                _ = self.resized.recv(), if self.carry.tty => resize(&self.sender).await,
            }
        }
        self.code
            .ok_or_else(|| anyhow!("the connection to nacelled was lost before the process ended"))
    }

    fn written(&self, outcome: std::io::Result<()>) -> std::io::Result<()> {
        if self.lossy { Ok(()) } else { outcome }
    }
}

/// Transfers bytes until the process ends; returns its exit code.
pub(super) async fn drive(
    sender: mpsc::Sender<SessionInput>,
    reply: Result<Response<Streaming<SessionOutput>>, Status>,
    carry: Carry,
) -> Result<i32> {
    Session::start(sender, reply, carry).await?.drive().await
}

async fn resize(sender: &mpsc::Sender<SessionInput>) {
    if let Some(size) = window_size() {
        let _ = sender.send(SessionInput { input: Some(Input::Resize(size)) }).await;
    }
}

fn read_stdin(sender: &mpsc::Sender<SessionInput>) {
    let mut buffer = vec![0; CHUNK];
    let mut stdin = std::io::stdin().lock();
    loop {
        let input = match stdin.read(&mut buffer) {
            Ok(0) | Err(_) => Input::CloseStdin(CloseStdin {}),
            Ok(length) => Input::Stdin(buffer[..length].to_vec()),
        };
        let last = matches!(input, Input::CloseStdin(_));
        if sender.blocking_send(SessionInput { input: Some(input) }).is_err() || last {
            return;
        }
    }
}

fn write(to: &mut impl Write, data: &[u8]) -> std::io::Result<()> {
    to.write_all(data)?;
    to.flush()
}
