//! Exec and attach: connects a client's messages with the streams of a process.
//!
//! Each output stream and the input have a task, so that a process that does not read its input can
//! still write its output. All queues are short: a slow client slows the process down, as a pipe
//! would.

use cri::errors::sandbox_status;
use sandbox::model::{ExecSpec, ExitView};
use sandbox::session::{AttachProcess, ByteReader, ByteWriter, ExecProcess};
use sandbox::{Error, Sandboxes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::streamed::Streamed;
use crate::api::session_input::Input;
use crate::api::session_output::Output;
use crate::api::{self, SessionInput, SessionOutput};

const CHUNK: usize = 32 << 10;
/// Messages queued for a slow client, and chunks for a slow process.
const AHEAD: usize = 8;

type Sender = mpsc::Sender<Result<SessionOutput, Status>>;

enum Process {
    Exec(ExecProcess),
    Attach(AttachProcess),
}

impl Process {
    async fn resize(&self, size: api::WindowSize) -> Result<(), Error> {
        let (width, height) = (clamp(size.width), clamp(size.height));
        match self {
            Self::Exec(process) => process.resize(width, height).await,
            Self::Attach(process) => process.resize(width, height).await,
        }
    }

    async fn signal(&self, signal: u32) -> Result<(), Error> {
        match self {
            Self::Exec(process) => process.signal(signal).await,
            Self::Attach(_) => Ok(()),
        }
    }

    async fn wait(&mut self) -> Result<ExitView, Error> {
        match self {
            Self::Exec(process) => process.wait().await,
            Self::Attach(process) => process.wait().await,
        }
    }
}

fn clamp(cells: u32) -> u16 {
    u16::try_from(cells).unwrap_or(u16::MAX)
}

struct Session {
    stdin: Option<ByteWriter>,
    stdout: Option<ByteReader>,
    stderr: Option<ByteReader>,
    process: Process,
}

pub(super) async fn exec(
    sandboxes: &Sandboxes,
    mut inputs: Streaming<SessionInput>,
) -> Result<Streamed<SessionOutput>, Status> {
    let Some(Input::Start(start)) = first(&mut inputs).await? else {
        return Err(Status::invalid_argument("the first message must be `start`"));
    };
    if start.command.is_empty() {
        return Err(Status::invalid_argument("start.command: must not be empty"));
    }
    let spec = ExecSpec {
        command: start.command,
        tty: start.tty,
        stdin: start.stdin,
        env: start.env,
        user: start.user,
        cwd: start.cwd,
        tty_size: start.size.map(|size| (clamp(size.width), clamp(size.height))),
    };
    let session = sandboxes.exec(&start.container, spec).await.map_err(sandbox_status)?;
    Ok(run(
        Session {
            stdin: session.stdin,
            stdout: session.stdout,
            stderr: session.stderr,
            process: Process::Exec(session.process),
        },
        inputs,
    ))
}

pub(super) async fn attach(
    sandboxes: &Sandboxes,
    mut inputs: Streaming<SessionInput>,
) -> Result<Streamed<SessionOutput>, Status> {
    let Some(Input::Attach(start)) = first(&mut inputs).await? else {
        return Err(Status::invalid_argument("the first message must be `attach`"));
    };
    let session = sandboxes.attach(&start.container, true).await.map_err(sandbox_status)?;
    Ok(run(
        Session {
            stdin: session.stdin,
            stdout: session.stdout,
            stderr: session.stderr,
            process: Process::Attach(session.process),
        },
        inputs,
    ))
}

async fn first(inputs: &mut Streaming<SessionInput>) -> Result<Option<Input>, Status> {
    Ok(inputs.message().await?.and_then(|message| message.input))
}

fn run(session: Session, inputs: Streaming<SessionInput>) -> Streamed<SessionOutput> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        if let Some(last) = drive(session, inputs, &sender).await {
            let _ = sender.send(last).await;
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

fn output(output: Output) -> SessionOutput {
    SessionOutput { output: Some(output) }
}

/// Returns the last message; none when the client has gone.
async fn drive(
    session: Session,
    mut inputs: Streaming<SessionInput>,
    sender: &Sender,
) -> Option<Result<SessionOutput, Status>> {
    let Session { stdin, stdout, stderr, mut process } = session;
    sender.send(Ok(output(Output::Started(api::Started {})))).await.ok()?;
    let mut pumps = JoinSet::new();
    if let Some(reader) = stdout {
        pumps.spawn(pump(reader, sender.clone(), Output::Stdout));
    }
    if let Some(reader) = stderr {
        pumps.spawn(pump(reader, sender.clone(), Output::Stderr));
    }
    let mut stdin = stdin.map(|writer| {
        let (chunks, queue) = mpsc::channel(AHEAD);
        // Ends when its queue is closed or the process stops reading.
        tokio::spawn(write(writer, queue));
        chunks
    });
    let mut listening = true;
    loop {
        tokio::select! {
            ended = pumps.join_next() => if ended.is_none() { break },
            () = sender.closed() => return None,
            message = inputs.next(), if listening => match message {
                Some(Ok(SessionInput { input })) => match input {
                    Some(Input::Stdin(data)) => {
                        let Some(queue) = &stdin else { continue };
                        tokio::select! {
                            // Fails when the process has closed its input.
                            _ = queue.send(data) => {}
                            ended = pumps.join_next() => if ended.is_none() { break },
                            () = sender.closed() => return None,
                        }
                    }
                    Some(Input::CloseStdin(_)) => stdin = None,
                    Some(Input::Resize(size)) => {
                        if let Err(error) = process.resize(size).await {
                            tracing::debug!(%error, "resizing a terminal");
                        }
                    }
                    Some(Input::Signal(signal)) => {
                        if let Err(error) = process.signal(signal).await {
                            tracing::debug!(%error, "sending a signal");
                        }
                    }
                    Some(Input::Start(_) | Input::Attach(_)) | None => {
                        return Some(Err(Status::invalid_argument("`start` or `attach` after the first message")));
                    }
                },
                // The input has ended; the output continues.
                Some(Err(_)) | None => {
                    listening = false;
                    stdin = None;
                }
            },
        }
    }
    tokio::select! {
        exit = process.wait() => Some(
            exit.map(|exit| {
                output(Output::Exit(api::Exit { code: exit.code, reason: exit.reason }))
            })
            .map_err(sandbox_status),
        ),
        () = sender.closed() => None,
    }
}

async fn pump(mut reader: ByteReader, sender: Sender, wrap: fn(Vec<u8>) -> Output) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match reader.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => {
                let message = output(wrap(buffer[..length].to_vec()));
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "reading the output of a process failed");
                return;
            }
        }
    }
}

async fn write(mut writer: ByteWriter, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(chunk) = queue.recv().await {
        if writer.write_all(&chunk).await.is_err() || writer.flush().await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}
