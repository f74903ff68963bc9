//! One task a container moves its output: guest streams -> attached clients and log file -> ack.
//!
//! Both streams meet in one channel, so that the log has them in the order of their arrival. The
//! channel and the guest's window are bounded: a disk that is full holds the container's own
//! writes back, nothing is dropped.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use agent_api::stdio::{Kind, Status};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::format::{Cutter, Tag, write_entry};
use super::writer::{Batch, LogWriter, Progress};
use crate::error::Error;
use crate::guest::{Door, Refused, StreamId, StreamReader};
use crate::host::pool::Pool;
use crate::session::ByteReader;

/// Piece of a stream, bytes.
const PIECE: usize = 32 << 10;
/// Pieces between the readers and the writer.
const PIECES: usize = 4;
/// What an attached client may leave unread before the container waits for it, bytes.
const ATTACH_BUFFER: usize = 256 << 10;
/// A client that reads nothing for this long is let go; the log is not held back by it for ever.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(5);
/// A log that cannot be opened is tried again after this time at most.
const OPEN_MOST: Duration = Duration::from_secs(30);
/// Output that has not come within this time after the last is not waited for.
const QUIET: Duration = Duration::from_millis(250);

/// Where a container's output comes from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) door: Door,
    pub(crate) container: String,
    pub(crate) tty: bool,
    /// Threads that write the log.
    pub(crate) writes: Pool,
}

/// Where the log is to be opened.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// None: the container has no log.
    pub(crate) path: Option<PathBuf>,
    pub(crate) sidecar: PathBuf,
}

enum Sink {
    Open(LogWriter),
    Closed(Place),
}

/// How much is on its way from the guest to the log.
#[derive(Debug, Clone, Copy)]
struct Flow {
    /// Streams that the guest was not asked for yet, or has not answered for.
    joining: u8,
    /// A piece was received and is not in the log.
    writing: bool,
}

enum Order {
    Reopen(oneshot::Sender<std::io::Result<()>>),
    Attach(oneshot::Sender<(ByteReader, Option<ByteReader>)>),
}

/// A running pump. Dropping the last handle ends it.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle {
    orders: mpsc::Sender<Order>,
    drained: watch::Receiver<bool>,
    flow: watch::Receiver<Flow>,
    writes: Pool,
}

impl LogHandle {
    pub(crate) async fn reopen(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let what = "reopen the container's log";
        self.order(what, Order::Reopen(reply), answer).await?.map_err(|e| Error::io(what, e))
    }

    /// Output from now on: stdout, and stderr unless it is a tty.
    pub(crate) async fn attach(&self) -> Result<(ByteReader, Option<ByteReader>), Error> {
        let (reply, answer) = oneshot::channel();
        self.order("join the container's output", Order::Attach(reply), answer).await
    }

    /// Fails when the answer does not come in time: the log's file system may hang.
    async fn order<T>(
        &self,
        what: &str,
        order: Order,
        answer: oneshot::Receiver<T>,
    ) -> Result<T, Error> {
        let gone = || Error::precondition("the container's output has ended");
        let answered = async {
            self.orders.send(order).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        match tokio::time::timeout(self.writes.limit(), answered).await {
            Ok(answer) => answer,
            Err(_) => Err(self.writes.late(what)),
        }
    }

    /// Resolves when both streams have ended and stand in the log.
    pub(crate) async fn drained(&self) {
        let _ = self.drained.clone().wait_for(|drained| *drained).await;
    }

    /// Resolves when what a process that has ended printed stands in the log: both streams have
    /// ended, or nothing comes any more from a stream that another process holds open.
    pub(crate) async fn settled(&self) {
        let mut flow = self.flow.clone();
        let quiet = async {
            loop {
                let Flow { joining, writing } = *flow.borrow_and_update();
                let changed = match joining == 0 && !writing {
                    true => tokio::time::timeout(QUIET, flow.changed()).await,
                    false => Ok(flow.changed().await),
                };
                if !matches!(changed, Ok(Ok(()))) {
                    return;
                }
            }
        };
        tokio::select! {
            () = self.drained() => {}
            () = quiet => {}
        }
    }
}

/// Starts moving output from where `writer` says that it ended.
pub(crate) fn start(source: Source, writer: LogWriter) -> LogHandle {
    start_with(source, Sink::Open(writer))
}

/// The same for a log that is opened later, if it cannot be opened now: until then the guest keeps
/// the output, and a container that prints more than fits there waits.
pub(crate) fn resume(source: Source, place: Place) -> LogHandle {
    start_with(source, Sink::Closed(place))
}

fn start_with(source: Source, sink: Sink) -> LogHandle {
    let (orders, receiver) = mpsc::channel(8);
    let (drained_tx, drained) = watch::channel(false);
    let streams = if source.tty { 1 } else { 2 };
    let (flow_tx, flow) = watch::channel(Flow { joining: streams, writing: false });
    let writes = source.writes.clone();
    tokio::spawn(run(source, sink, receiver, drained_tx, flow_tx));
    LogHandle { orders, drained, flow, writes }
}

struct Chunk {
    kind: Kind,
    /// Empty: the stream has ended.
    bytes: Vec<u8>,
}

/// One stream's side of the writer.
struct Stream {
    kind: Kind,
    name: &'static str,
    cutter: Cutter,
    received: u64,
    ack: watch::Sender<u64>,
}

struct Pump {
    container: String,
    writer: Option<LogWriter>,
    writes: Pool,
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
    mut orders: mpsc::Receiver<Order>,
    drained: watch::Sender<bool>,
    flow: watch::Sender<Flow>,
) {
    let mut clients = Vec::new();
    let writer = match sink {
        Sink::Open(writer) => writer,
        Sink::Closed(place) => match open_log(&source, &place, &mut orders, &mut clients).await {
            Some(writer) => writer,
            None => return,
        },
    };
    let progress = writer.progress();
    let (chunks, mut incoming) = mpsc::channel(PIECES);
    // Readers end with this task: a JoinSet aborts what it holds when dropped.
    let mut readers = JoinSet::new();
    let mut open = |kind, name, from| {
        let (ack, acks) = watch::channel(from);
        let id = StreamId { container: source.container.clone(), exec: String::new(), kind };
        readers.spawn(read(source.door.clone(), id, from, acks, chunks.clone(), flow.clone()));
        Stream { kind, name, cutter: Cutter::default(), received: from, ack }
    };
    let stdout = open(Kind::Stdout, "stdout", progress.stdout);
    let stderr = if source.tty {
        let ack = watch::channel(0).0;
        Stream { kind: Kind::Stderr, name: "stderr", cutter: Cutter::default(), received: 0, ack }
    } else {
        open(Kind::Stderr, "stderr", progress.stderr)
    };
    // Only the readers hold the channel open now.
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
                    if !pump.take(chunk, &mut orders).await {
                        return;
                    }
                    flow.send_modify(|flow| flow.writing = false);
                }
                None => reading = false,
            },
            order = orders.recv() => match order {
                Some(order) => pump.obey(order).await,
                None => return,
            },
        }
    }
    pump.clients.clear();
    let _ = drained.send(true);
    // The log can still be reopened until the container is removed.
    while let Some(order) = orders.recv().await {
        pump.obey(order).await;
        // Whoever attaches now reads the end at once.
        pump.clients.clear();
    }
}

/// Opens the log, however often that has to be tried. None when nobody holds a handle any more.
async fn open_log(
    source: &Source,
    place: &Place,
    orders: &mut mpsc::Receiver<Order>,
    clients: &mut Vec<Client>,
) -> Option<LogWriter> {
    let (mut pause, mut asked) = (RETRY_FIRST, None::<oneshot::Sender<std::io::Result<()>>>);
    loop {
        let Place { path, sidecar } = place.clone();
        let opened = source.writes.finish(move || LogWriter::open(path, &sidecar)).await;
        let result = match &opened {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(
                    container = source.container,
                    path = %place.path.as_deref().unwrap_or(&place.sidecar).display(),
                    %error,
                    "container log cannot be opened, will be tried again; the container's output \
                     waits"
                );
                Err(std::io::Error::new(error.kind(), error.to_string()))
            }
        };
        if let Some(reply) = asked.take() {
            let _ = reply.send(result);
        }
        if let Ok(writer) = opened {
            return Some(writer);
        }
        let until = tokio::time::Instant::now() + pause;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                order = orders.recv() => match order? {
                    Order::Reopen(reply) => {
                        asked = Some(reply);
                        break;
                    }
                    Order::Attach(reply) => clients.extend(attach(source.tty, reply)),
                },
            }
        }
        pause = (pause * 2).min(OPEN_MOST);
    }
}

/// A client for whoever waits for the answer; none if nobody does.
fn attach(tty: bool, reply: oneshot::Sender<(ByteReader, Option<ByteReader>)>) -> Option<Client> {
    let (out, out_reader) = tokio::io::duplex(ATTACH_BUFFER);
    let (stderr, err_reader) = if tty {
        (None, None)
    } else {
        let (err, reader) = tokio::io::duplex(ATTACH_BUFFER);
        (Some(err), Some(Box::pin(reader) as ByteReader))
    };
    let taken = reply.send((Box::pin(out_reader), err_reader));
    taken.is_ok().then_some(Client { stdout: Some(out), stderr })
}

impl Pump {
    /// False when nobody holds a handle any more.
    async fn take(&mut self, chunk: Chunk, orders: &mut mpsc::Receiver<Order>) -> bool {
        for client in &mut self.clients {
            client.give(&chunk).await;
        }
        self.clients.retain(|c| c.stdout.is_some() || c.stderr.is_some());
        let stream = match chunk.kind {
            Kind::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        };
        let (now, mut entries) = (SystemTime::now(), Vec::new());
        let entry = |tag: Tag, text: &[u8]| write_entry(&mut entries, now, stream.name, tag, text);
        if chunk.bytes.is_empty() {
            stream.cutter.finish(entry);
        } else {
            stream.received += chunk.bytes.len() as u64;
            stream.cutter.push(&chunk.bytes, entry);
        }
        let stored = stream.received - stream.cutter.held() as u64;
        let (place, bit) = match stream.kind {
            Kind::Stderr => (&mut self.progress.stderr, 2),
            _ => (&mut self.progress.stdout, 1),
        };
        *place = stored;
        if chunk.bytes.is_empty() {
            self.progress.ended |= bit;
        }
        if !self.write(Batch::new(entries, self.progress), orders).await {
            return false;
        }
        let stream = if chunk.kind == Kind::Stderr { &self.stderr } else { &self.stdout };
        stream.ack.send_replace(stored);
        true
    }

    /// Tries until the batch is in the log; a full disk is waited for.
    async fn write(&mut self, mut batch: Batch, orders: &mut mpsc::Receiver<Order>) -> bool {
        let mut pause = RETRY_FIRST;
        loop {
            let Some(mut writer) = self.writer.take() else { return true };
            let (writer, back, result) = self
                .writes
                .finish(move || {
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
                "container log cannot be written; the container's output waits"
            );
            let until = tokio::time::Instant::now() + pause;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    order = orders.recv() => match order {
                        Some(order) => self.obey(order).await,
                        None => return false,
                    },
                }
            }
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            // The caller has timed out, and may have moved the file back.
            Order::Reopen(reply) if reply.is_closed() => {}
            Order::Reopen(reply) => {
                let Some(mut writer) = self.writer.take() else { return };
                let writer = self
                    .writes
                    .finish(move || {
                        // It may have waited for a thread until after its deadline.
                        if !reply.is_closed() {
                            let result = writer.reopen();
                            let _ = reply.send(result);
                        }
                        writer
                    })
                    .await;
                self.writer = Some(writer);
            }
            Order::Attach(reply) => self.clients.extend(attach(self.tty, reply)),
        }
    }
}

impl Client {
    async fn give(&mut self, chunk: &Chunk) {
        let place = match chunk.kind {
            Kind::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        };
        let Some(stream) = place else { return };
        let delivered = !chunk.bytes.is_empty()
            && matches!(
                tokio::time::timeout(ATTACH_PATIENCE, stream.write_all(&chunk.bytes)).await,
                Ok(Ok(()))
            );
        if !delivered {
            *place = None;
        }
    }
}

/// Reads one stream to its end, over as many connections as it takes.
async fn read(
    door: Door,
    id: StreamId,
    mut offset: u64,
    mut acks: watch::Receiver<u64>,
    chunks: mpsc::Sender<Chunk>,
    flow: watch::Sender<Flow>,
) {
    let mut joining = true;
    let mut joined = move || {
        if std::mem::take(&mut joining) {
            flow.send_modify(|flow| flow.joining -= 1);
        }
    };
    let mut buffer = vec![0; PIECE];
    loop {
        let mut reader = match StreamReader::open(&door, &id, offset).await {
            Ok(reader) => reader,
            Err(Refused::Status(status)) => {
                if status != Status::NoSuchStream {
                    tracing::error!(?id, offset, ?status, "guest lost output of a container");
                }
                break;
            }
            // The VM is busy, or gone: then its end takes this task along.
            Err(Refused::Io(_)) => {
                tokio::time::sleep(RECONNECT_PAUSE).await;
                continue;
            }
        };
        joined();
        acks.mark_changed();
        loop {
            tokio::select! {
                got = reader.read(&mut buffer) => match got {
                    Ok(0) => {
                        let _ = chunks.send(Chunk { kind: id.kind, bytes: Vec::new() }).await;
                        // The last acknowledgement lets the guest forget the stream.
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
                    // Broken: what follows comes over another connection.
                    Err(error) => {
                        tracing::debug!(?id, offset, %error, "output goes on over another connection");
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
    joined();
    let _ = chunks.send(Chunk { kind: id.kind, bytes: Vec::new() }).await;
}
