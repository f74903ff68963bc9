//! Moves a container's output, one task per container: guest streams -> attached clients and log
//! file -> ack.
//!
//! Both streams use one channel, so that the log has them in order of arrival. The channel and the
//! guest's window are bounded: a full disk blocks the container's writes, nothing is dropped.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use agent_api::stdio::{Kind, Status};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::format::{LineSplitter, Tag, write_entry};
use super::writer::{Batch, LogWriter, Progress};
use crate::byte_stream::ByteReader;
use crate::error::Error;
use crate::guest::{AgentAddress, StreamError, StreamId, StreamReader};
use crate::host::pool::BlockingPool;

/// Chunk of a stream, bytes.
const CHUNK: usize = 32 << 10;
/// Chunks between the readers and the writer.
const CHUNKS: usize = 4;
/// Bytes that an attached client may leave unread before the container blocks.
const ATTACH_BUFFER: usize = 256 << 10;
/// A client that reads nothing for this long is detached, so that it does not block the log.
const ATTACH_WRITE_LIMIT: Duration = Duration::from_secs(10);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Longest delay before a failed open of the log is retried.
const OPEN_RETRY_MAX: Duration = Duration::from_secs(30);
/// Idle time after which no more output is expected.
const IDLE_LIMIT: Duration = Duration::from_millis(250);

/// Source of a container's output.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) address: AgentAddress,
    pub(crate) container: String,
    pub(crate) tty: bool,
    /// Threads that write the log.
    pub(crate) writes: BlockingPool,
}

/// Paths of the log.
#[derive(Debug, Clone)]
pub(crate) struct LogPaths {
    /// None: no log.
    pub(crate) path: Option<PathBuf>,
    pub(crate) sidecar: PathBuf,
}

enum Sink {
    Open(LogWriter),
    Closed(LogPaths),
}

/// Data in transit from the guest to the log.
#[derive(Debug, Clone, Copy)]
struct Flow {
    /// Streams that are not open yet.
    connecting: u8,
    /// A received chunk is not in the log yet.
    writing: bool,
}

enum Command {
    Reopen(oneshot::Sender<std::io::Result<()>>),
    Attach(oneshot::Sender<(ByteReader, Option<ByteReader>)>),
}

/// A running pump; ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle {
    commands: mpsc::Sender<Command>,
    drained: watch::Receiver<bool>,
    flow: watch::Receiver<Flow>,
    writes: BlockingPool,
}

impl LogHandle {
    pub(crate) async fn reopen(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let what = "reopen the container's log";
        self.call(what, Command::Reopen(reply), answer).await?.map_err(|e| Error::io(what, e))
    }

    /// Attaches: stdout, and stderr without a tty, from now on.
    pub(crate) async fn attach(&self) -> Result<(ByteReader, Option<ByteReader>), Error> {
        let (reply, answer) = oneshot::channel();
        self.call("attach to the container's output", Command::Attach(reply), answer).await
    }

    /// Fails on a timeout: the log's file system may hang.
    async fn call<T>(
        &self,
        what: &str,
        command: Command,
        answer: oneshot::Receiver<T>,
    ) -> Result<T, Error> {
        let ended = || Error::precondition("the container's output has ended");
        let answered = async {
            self.commands.send(command).await.map_err(|_| ended())?;
            answer.await.map_err(|_| ended())
        };
        match tokio::time::timeout(self.writes.limit(), answered).await {
            Ok(answer) => answer,
            Err(_) => Err(self.writes.timeout_error(what)),
        }
    }

    /// Resolves when both streams have ended and are in the log.
    pub(crate) async fn drained(&self) {
        let _ = self.drained.clone().wait_for(|drained| *drained).await;
    }

    /// Resolves when the output of an exited process is in the log: both streams have ended, or are
    /// idle because another process holds them open.
    pub(crate) async fn flushed(&self) {
        let mut flow = self.flow.clone();
        let idle = async {
            loop {
                let Flow { connecting, writing } = *flow.borrow_and_update();
                let changed = match connecting == 0 && !writing {
                    true => tokio::time::timeout(IDLE_LIMIT, flow.changed()).await,
                    false => Ok(flow.changed().await),
                };
                if !matches!(changed, Ok(Ok(()))) {
                    return;
                }
            }
        };
        tokio::select! {
            () = self.drained() => {}
            () = idle => {}
        }
    }
}

/// Starts from the writer's recorded progress.
pub(crate) fn start(source: Source, writer: LogWriter) -> LogHandle {
    start_with(source, Sink::Open(writer))
}

/// Starts with a log that is opened in the background: until then the guest buffers the output, and
/// the container blocks when its buffer is full.
pub(crate) fn resume(source: Source, place: LogPaths) -> LogHandle {
    start_with(source, Sink::Closed(place))
}

fn start_with(source: Source, sink: Sink) -> LogHandle {
    let (commands, receiver) = mpsc::channel(8);
    let (drained_tx, drained) = watch::channel(false);
    let streams = if source.tty { 1 } else { 2 };
    let (flow_tx, flow) = watch::channel(Flow { connecting: streams, writing: false });
    let writes = source.writes.clone();
    tokio::spawn(run(source, sink, receiver, drained_tx, flow_tx));
    LogHandle { commands, drained, flow, writes }
}

struct Chunk {
    kind: Kind,
    /// Empty: end of the stream.
    bytes: Vec<u8>,
}

/// State of one stream.
struct Stream {
    kind: Kind,
    name: &'static str,
    splitter: LineSplitter,
    received: u64,
    ack: watch::Sender<u64>,
}

struct Pump {
    container: String,
    writer: Option<LogWriter>,
    writes: BlockingPool,
    stdout: Stream,
    stderr: Stream,
    progress: Progress,
    clients: Vec<Client>,
    tty: bool,
}

struct Client {
    stdout: Option<tokio::io::DuplexStream>,
    stderr: Option<tokio::io::DuplexStream>,
}

async fn run(
    source: Source,
    sink: Sink,
    mut commands: mpsc::Receiver<Command>,
    drained: watch::Sender<bool>,
    flow: watch::Sender<Flow>,
) {
    let mut clients = Vec::new();
    let writer = match sink {
        Sink::Open(writer) => writer,
        Sink::Closed(place) => match open_log(&source, &place, &mut commands, &mut clients).await {
            Some(writer) => writer,
            None => return,
        },
    };
    let progress = writer.progress();
    let (chunks, mut incoming) = mpsc::channel(CHUNKS);
    // The JoinSet aborts the readers when this task ends.
    let mut readers = JoinSet::new();
    let mut open = |kind, name, from| {
        let (ack, acks) = watch::channel(from);
        let id = StreamId { container: source.container.clone(), exec: String::new(), kind };
        readers.spawn(read(source.address.clone(), id, from, acks, chunks.clone(), flow.clone()));
        Stream { kind, name, splitter: LineSplitter::default(), received: from, ack }
    };
    let stdout = open(Kind::Stdout, "stdout", progress.stdout);
    let stderr = if source.tty {
        let ack = watch::channel(0).0;
        Stream {
            kind: Kind::Stderr,
            name: "stderr",
            splitter: LineSplitter::default(),
            received: 0,
            ack,
        }
    } else {
        open(Kind::Stderr, "stderr", progress.stderr)
    };
    // The channel closes with the readers.
    drop(chunks);
    let mut pump = Pump {
        container: source.container,
        writer: Some(writer),
        writes: source.writes,
        stdout,
        stderr,
        progress,
        clients,
        tty: source.tty,
    };
    let mut reading = true;
    while reading {
        tokio::select! {
            chunk = incoming.recv() => match chunk {
                Some(chunk) => {
                    flow.send_modify(|flow| flow.writing = true);
                    if !pump.take(chunk, &mut commands).await {
                        return;
                    }
                    flow.send_modify(|flow| flow.writing = false);
                }
                None => reading = false,
            },
            command = commands.recv() => match command {
                Some(command) => pump.handle_command(command).await,
                None => return,
            },
        }
    }
    pump.clients.clear();
    let _ = drained.send(true);
    // The log can be reopened until the container is removed.
    while let Some(command) = commands.recv().await {
        pump.handle_command(command).await;
        // A client that attaches now reads EOF.
        pump.clients.clear();
    }
}

/// Opens the log, with retries. None if the last handle was dropped.
async fn open_log(
    source: &Source,
    place: &LogPaths,
    commands: &mut mpsc::Receiver<Command>,
    clients: &mut Vec<Client>,
) -> Option<LogWriter> {
    let (mut pause, mut reopen_reply) = (RETRY_MIN, None::<oneshot::Sender<std::io::Result<()>>>);
    loop {
        let LogPaths { path, sidecar } = place.clone();
        let opened = source.writes.run(move || LogWriter::open(path, &sidecar)).await;
        let result = match &opened {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(
                    container = source.container,
                    path = %place.path.as_deref().unwrap_or(&place.sidecar).display(),
                    %error,
                    "cannot open container log, will retry; the container's output \
                     waits"
                );
                Err(std::io::Error::new(error.kind(), error.to_string()))
            }
        };
        if let Some(reply) = reopen_reply.take() {
            let _ = reply.send(result);
        }
        if let Ok(writer) = opened {
            return Some(writer);
        }
        let until = tokio::time::Instant::now() + pause;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                command = commands.recv() => match command? {
                    Command::Reopen(reply) => {
                        reopen_reply = Some(reply);
                        break;
                    }
                    Command::Attach(reply) => clients.extend(attach(source.tty, reply)),
                },
            }
        }
        pause = (pause * 2).min(OPEN_RETRY_MAX);
    }
}

/// Creates a client for the caller; None if it has given up.
fn attach(tty: bool, reply: oneshot::Sender<(ByteReader, Option<ByteReader>)>) -> Option<Client> {
    let (out, out_reader) = tokio::io::duplex(ATTACH_BUFFER);
    let (stderr, err_reader) = if tty {
        (None, None)
    } else {
        let (err, reader) = tokio::io::duplex(ATTACH_BUFFER);
        (Some(err), Some(Box::pin(reader) as ByteReader))
    };
    let delivered = reply.send((Box::pin(out_reader), err_reader));
    delivered.is_ok().then_some(Client { stdout: Some(out), stderr })
}

impl Pump {
    /// False if the last handle was dropped.
    async fn take(&mut self, chunk: Chunk, commands: &mut mpsc::Receiver<Command>) -> bool {
        for client in &mut self.clients {
            client.send(&chunk).await;
        }
        self.clients.retain(|c| c.stdout.is_some() || c.stderr.is_some());
        let stream = match chunk.kind {
            Kind::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        };
        let (now, mut entries) = (SystemTime::now(), Vec::new());
        let entry = |tag: Tag, text: &[u8]| write_entry(&mut entries, now, stream.name, tag, text);
        if chunk.bytes.is_empty() {
            stream.splitter.finish(entry);
        } else {
            stream.received += chunk.bytes.len() as u64;
            stream.splitter.push(&chunk.bytes, entry);
        }
        let stored = stream.received - stream.splitter.buffered() as u64;
        let (place, bit) = match stream.kind {
            Kind::Stderr => (&mut self.progress.stderr, 2),
            _ => (&mut self.progress.stdout, 1),
        };
        *place = stored;
        if chunk.bytes.is_empty() {
            self.progress.ended |= bit;
        }
        if !self.write(Batch::new(entries, self.progress), commands).await {
            return false;
        }
        let stream = if chunk.kind == Kind::Stderr { &self.stderr } else { &self.stdout };
        stream.ack.send_replace(stored);
        true
    }

    /// Retries until the batch is in the log, such as on a full disk.
    async fn write(&mut self, mut batch: Batch, commands: &mut mpsc::Receiver<Command>) -> bool {
        let mut pause = RETRY_MIN;
        loop {
            let Some(mut writer) = self.writer.take() else { return true };
            let (writer, back, result) = self
                .writes
                .run(move || {
                    let result = writer.write(&mut batch);
                    (writer, batch, result)
                })
                .await;
            self.writer = Some(writer);
            batch = back;
            let Err(error) = result else { return true };
            tracing::warn!(
                container = self.container,
                %error,
                "cannot write container log, will retry; the container's output waits"
            );
            let until = tokio::time::Instant::now() + pause;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    command = commands.recv() => match command {
                        Some(command) => self.handle_command(command).await,
                        None => return false,
                    },
                }
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn handle_command(&mut self, command: Command) {
        match command {
            // The caller has timed out and may have renamed the file back.
            Command::Reopen(reply) if reply.is_closed() => {}
            Command::Reopen(reply) => {
                let Some(mut writer) = self.writer.take() else { return };
                let writer = self
                    .writes
                    .run(move || {
                        // The caller may have timed out while this waited for a thread.
                        if !reply.is_closed() {
                            let result = writer.reopen();
                            let _ = reply.send(result);
                        }
                        writer
                    })
                    .await;
                self.writer = Some(writer);
            }
            Command::Attach(reply) => self.clients.extend(attach(self.tty, reply)),
        }
    }
}

impl Client {
    async fn send(&mut self, chunk: &Chunk) {
        let place = match chunk.kind {
            Kind::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        };
        let Some(stream) = place else { return };
        let delivered = !chunk.bytes.is_empty()
            && matches!(
                tokio::time::timeout(ATTACH_WRITE_LIMIT, stream.write_all(&chunk.bytes)).await,
                Ok(Ok(()))
            );
        if !delivered {
            *place = None;
        }
    }
}

/// Reads one stream to EOF; reconnects as needed.
async fn read(
    address: AgentAddress,
    id: StreamId,
    mut offset: u64,
    mut acks: watch::Receiver<u64>,
    chunks: mpsc::Sender<Chunk>,
    flow: watch::Sender<Flow>,
) {
    let mut connecting = true;
    let mut connected = move || {
        if std::mem::take(&mut connecting) {
            flow.send_modify(|flow| flow.connecting -= 1);
        }
    };
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut reader = match StreamReader::open(&address, &id, offset).await {
            Ok(reader) => reader,
            Err(StreamError::Status(status)) => {
                if status != Status::NoSuchStream {
                    tracing::error!(?id, offset, ?status, "guest lost output of a container");
                }
                break;
            }
            // The VM is busy or gone; its exit aborts this task.
            Err(StreamError::Io(_)) => {
                tokio::time::sleep(RECONNECT_PAUSE).await;
                continue;
            }
        };
        connected();
        acks.mark_changed();
        loop {
            tokio::select! {
                got = reader.read(&mut buffer) => match got {
                    Ok(0) => {
                        let _ = chunks.send(Chunk { kind: id.kind, bytes: Vec::new() }).await;
                        // The last acknowledgement frees the stream in the guest.
                        let stored = acks.wait_for(|acked| *acked >= offset).await.map(|a| *a);
                        if let Ok(stored) = stored {
                            let _ = reader.ack(stored).await;
                        }
                        return;
                    }
                    Ok(n) => {
                        offset += n as u64;
                        let bytes = buffer[..n].to_vec();
                        if chunks.send(Chunk { kind: id.kind, bytes }).await.is_err() {
                            return;
                        }
                    }
                    // Reconnect for the rest.
                    Err(error) => {
                        tracing::debug!(?id, offset, %error, "reconnecting an output stream");
                        break;
                    }
                },
                changed = acks.changed() => {
                    let stored = *acks.borrow_and_update();
                    if changed.is_err() || reader.ack(stored).await.is_err() {
                        break;
                    }
                }
            }
        }
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
    connected();
    let _ = chunks.send(Chunk { kind: id.kind, bytes: Vec::new() }).await;
}
