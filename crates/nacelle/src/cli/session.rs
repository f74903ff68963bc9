//! Our terminal or pipes on one side, a process in a pod on the other.

use std::io::{Read, Write};

use anyhow::{Context, Result, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::connect::told;
use super::terminal::{self, Raw};
use crate::api::session_input::Input;
use crate::api::session_output::Output;
use crate::api::{CloseStdin, SessionInput, SessionOutput, WindowSize};

/// Chunks of input on their way.
const AHEAD: usize = 8;
const CHUNK: usize = 32 << 10;

/// The messages to send, and the stream that carries them.
pub(super) fn inputs(first: Input) -> (mpsc::Sender<SessionInput>, ReceiverStream<SessionInput>) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    // There is room: the queue is new.
    let _ = sender.try_send(SessionInput { input: Some(first) });
    (sender, ReceiverStream::new(receiver))
}

pub(super) fn window_size() -> Option<WindowSize> {
    terminal::size()
        .map(|(width, height)| WindowSize { width: u32::from(width), height: u32::from(height) })
}

/// What a session carries besides output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carry {
    pub(super) stdin: bool,
    pub(super) tty: bool,
}

/// A session under way. The terminal is given back with it.
pub(super) struct Session {
    sender: mpsc::Sender<SessionInput>,
    outputs: Streaming<SessionOutput>,
    carry: Carry,
    resized: Signal,
    /// Output that cannot be written is thrown away.
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
        let outputs = reply.map_err(told)?.into_inner();
        let raw = (carry.tty && carry.stdin && terminal::is_terminal())
            .then(Raw::enter)
            .transpose()
            .context("taking the terminal over")?;
        if carry.stdin {
            let sender = sender.clone();
            // A thread of its own: a read of a terminal cannot be called off.
            std::thread::spawn(move || read_stdin(&sender));
        }
        let resized = signal(SignalKind::window_change())?;
        if carry.tty {
            resize(&sender).await;
        }
        Ok(Self { sender, outputs, carry, resized, lossy: false, code: None, _raw: raw })
    }

    /// From here on it is no failure when nobody takes the output: the terminal may be gone.
    pub(super) fn let_output_go(&mut self) {
        self.lossy = true;
    }

    /// Carries bytes until the process ends; its exit code. Can be called off and gone on with.
    pub(super) async fn drive(&mut self) -> Result<i32> {
        loop {
            tokio::select! {
                message = self.outputs.message() => {
                    match message.map_err(told)?.map(|m| m.output) {
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
        self.code.ok_or_else(|| anyhow!("nacelled has gone away before the process ended"))
    }

    fn written(&self, outcome: std::io::Result<()>) -> std::io::Result<()> {
        if self.lossy { Ok(()) } else { outcome }
    }
}

/// Carries bytes until the process ends; its exit code.
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
