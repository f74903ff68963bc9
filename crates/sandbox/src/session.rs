//! Exec and attach sessions: byte streams and a process handle. The pod's owner task is not
//! involved: data flows directly between the caller and the guest.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use agent_api::stdio::Kind;
use agent_api::v1;
use oci_spec::runtime::Process;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

pub use crate::byte_stream::{ByteReader, ByteWriter};
use crate::error::Error;
use crate::guest::{Output, StreamError, StreamId, open_stdin};
use crate::model::{ContainerState, ExecOutput, ExecSpec, ExitView};
use crate::pod::{ExecExit, Handle};
use crate::policy::Container;

const SIGKILL: u32 = 9;
/// Longest wait for the exit of a killed command.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Time to read the last output after a command's exit: a child process may keep the pipes open.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// A running command. Shutting down `stdin` closes the command's standard input. Dropping `process`
/// before the exit kills the command.
pub struct ExecSession {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    /// None with a tty.
    pub stderr: Option<ByteReader>,
    pub process: ExecProcess,
}

/// Streams of a container's init process, from now on.
pub struct AttachSession {
    /// One client at a time writes: a later one takes over.
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    pub stderr: Option<ByteReader>,
    pub process: AttachProcess,
}

/// Control of a process, usable while another task waits for its exit.
#[derive(Clone)]
pub struct ProcessControl {
    handle: Arc<Handle>,
    container: String,
    /// Empty: the container's init process.
    exec: String,
}

impl ProcessControl {
    pub async fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        resize(&self.handle, &self.container, &self.exec, width, height).await
    }

    /// Sends a signal (number); `all`: to all processes of the container.
    pub async fn signal(&self, number: u32, all: bool) -> Result<(), Error> {
        signal(&self.handle, &self.container, &self.exec, number, all).await
    }
}

/// Handle on an exec'd process.
pub struct ExecProcess {
    handle: Arc<Handle>,
    container: String,
    exec: String,
    /// Offsets up to which stdout and stderr were read.
    read: [Arc<AtomicU64>; 2],
    end: Option<oneshot::Receiver<ExecExit>>,
    ended: Option<ExitView>,
    /// The remaining output must be drained on drop.
    abandoned: bool,
}

/// Handle on a container's init process.
pub struct AttachProcess {
    handle: Arc<Handle>,
    container: String,
}

impl ExecProcess {
    pub fn control(&self) -> ProcessControl {
        let (handle, container) = (self.handle.clone(), self.container.clone());
        ProcessControl { handle, container, exec: self.exec.clone() }
    }

    pub async fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        resize(&self.handle, &self.container, &self.exec, width, height).await
    }

    /// Sends a signal (number).
    pub async fn signal(&self, signal: u32) -> Result<(), Error> {
        signal_exec(&self.handle, &self.container, &self.exec, signal).await
    }

    /// Waits for the exit. Output may still be in transit: read both streams to EOF first.
    /// Cancel-safe.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        if let Some(end) = &mut self.end {
            let end = end.await;
            self.end = None;
            self.ended = end.ok().map(exit_view);
        }
        self.ended
            .clone()
            .ok_or_else(|| Error::unavailable("the pod's VM ended while the command was running"))
    }
}

impl ExecProcess {
    /// Kills the command with its children, and waits for its exit.
    async fn kill(&mut self) {
        let killed = async {
            if let Err(error) = self.signal(SIGKILL).await {
                tracing::warn!(container = self.container, %error, "cannot kill command");
            }
            let _ = self.wait().await;
        };
        if tokio::time::timeout(KILL_LIMIT, killed).await.is_err() {
            tracing::warn!(container = self.container, "killed command has not exited");
        }
        self.abandoned = true;
    }
}

impl Drop for ExecProcess {
    fn drop(&mut self) {
        self.handle.unregister_exec(&self.exec);
        if self.end.is_none() && !self.abandoned {
            return;
        }
        let ended = self.end.is_none();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (handle, container, exec) =
            (self.handle.clone(), self.container.clone(), self.exec.clone());
        let read = self.read.clone();
        runtime.spawn(async move {
            if !ended && let Err(error) = signal_exec(&handle, &container, &exec, SIGKILL).await {
                tracing::debug!(container, exec, %error, "cannot kill abandoned command");
            }
            let drained = drain(&handle, container, exec, read);
            let _ = tokio::time::timeout(DRAIN_LIMIT, drained).await;
        });
    }
}

/// Reads and discards the remaining output: the guest keeps it, and the command's record, until it
/// is read.
async fn drain(handle: &Handle, container: String, exec: String, read: [Arc<AtomicU64>; 2]) {
    for (kind, read) in [Kind::Stdout, Kind::Stderr].into_iter().zip(read) {
        let id = StreamId { container: container.clone(), exec: exec.clone(), kind };
        if let Ok(mut output) = Output::open(handle.guest.address(), &id, read).await {
            let _ = tokio::io::copy(&mut output, &mut tokio::io::sink()).await;
        }
    }
}

impl AttachProcess {
    pub fn control(&self) -> ProcessControl {
        let (handle, container) = (self.handle.clone(), self.container.clone());
        ProcessControl { handle, container, exec: String::new() }
    }

    pub async fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        resize(&self.handle, &self.container, "", width, height).await
    }

    /// Waits for the container's exit.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        wait(&self.handle, &self.container).await
    }
}

pub(crate) async fn wait(handle: &Handle, id: &str) -> Result<ExitView, Error> {
    let exit = |c: &Container| c.view(&handle.id).exit;
    let mut last = None;
    let exited = handle.wait_for(|pod| {
        let Some(container) = pod.containers.get(id) else { return true };
        last = exit(container);
        last.is_some()
    });
    exited.await?;
    last.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
}

fn exit_view(end: ExecExit) -> ExitView {
    let reason = match (end.oom_killed, end.code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    ExitView {
        code: end.code,
        oom_killed: end.oom_killed,
        at: end.at,
        reason: reason.into(),
        message: String::new(),
    }
}

async fn resize(
    handle: &Handle,
    container: &str,
    exec: &str,
    width: u16,
    height: u16,
) -> Result<(), Error> {
    let request = v1::ResizeTtyRequest {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        width: width.into(),
        height: height.into(),
    };
    let call = handle
        .guest
        .call("resize the terminal", |mut c| async move { c.resize_tty(request).await });
    call.await.map(drop)
}

async fn signal_exec(
    handle: &Handle,
    container: &str,
    exec: &str,
    number: u32,
) -> Result<(), Error> {
    signal(handle, container, exec, number, false).await
}

pub(crate) async fn signal(
    handle: &Handle,
    container: &str,
    exec: &str,
    signal: u32,
    all: bool,
) -> Result<(), Error> {
    let request = v1::SignalProcessRequest {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        signal,
        all,
        await_handler: false,
    };
    let call = handle
        .guest
        .call("signal a process", |mut c| async move { c.signal_process(request).await });
    call.await.map(drop)
}

pub(crate) async fn freeze(handle: &Handle, id: &str, frozen: bool) -> Result<(), Error> {
    check_running(handle, id)?;
    let request = v1::FreezeContainerRequest { container_id: id.to_owned(), frozen };
    let what = if frozen { "pause the container" } else { "resume the container" };
    let call = handle.guest.call(what, |mut c| async move { c.freeze_container(request).await });
    call.await.map(drop)
}

fn check_running(handle: &Handle, id: &str) -> Result<(), Error> {
    handle.ready_pod()?;
    let container = handle.container(id)?;
    match container.state() {
        ContainerState::Running if container.exit.is_none() => Ok(()),
        state => Err(not_running(id, state)),
    }
}

fn not_running(id: &str, state: ContainerState) -> Error {
    let state = match state {
        ContainerState::Created => "is not started",
        // An exited process is reported as running until its output is in the log.
        ContainerState::Exited | ContainerState::Running => "has exited",
        ContainerState::Unknown => "is in an unknown state",
    };
    Error::precondition(format!("container {id} is not running: it {state}"))
}

fn stream_failed(what: &str, error: StreamError) -> Error {
    Error::unavailable(format!("{what}: {:#}", anyhow::Error::new(error)))
}

/// Starts a command and opens its streams. Runs to completion if the caller goes away, because the
/// guest starts the command anyway; an unclaimed session kills its command.
pub(crate) async fn exec(
    handle: &Arc<Handle>,
    id: &str,
    spec: ExecSpec,
) -> Result<ExecSession, Error> {
    if spec.command.is_empty() {
        check_running(handle, id)?;
        return Err(Error::invalid("the command is empty"));
    }
    let command = Command {
        oci_process: oci_process(&spec),
        tty: spec.tty,
        stdin: spec.stdin,
        tty_size: spec.tty_size.map(|(width, height)| (width.into(), height.into())),
        user: spec.user,
    };
    exec_detached(handle, id, command).await
}

/// See [`crate::Sandboxes::exec_process`].
pub(crate) async fn exec_process(
    handle: &Arc<Handle>,
    id: &str,
    process: &Process,
    stdin: bool,
) -> Result<ExecSession, Error> {
    let size = process.console_size();
    let command = Command {
        oci_process: serde_json::to_vec(process).map_err(|e| Error::Internal(e.into()))?,
        tty: process.terminal().unwrap_or(false),
        stdin,
        tty_size: size.map(|s| (s.width() as u32, s.height() as u32)),
        user: String::new(),
    };
    exec_detached(handle, id, command).await
}

/// A process to be started in a container.
struct Command {
    /// JSON.
    oci_process: Vec<u8>,
    tty: bool,
    stdin: bool,
    /// Width and height.
    tty_size: Option<(u32, u32)>,
    user: String,
}

async fn exec_detached(
    handle: &Arc<Handle>,
    id: &str,
    command: Command,
) -> Result<ExecSession, Error> {
    let (handle, id) = (handle.clone(), id.to_owned());
    let started = tokio::spawn(async move { start_exec(&handle, &id, command).await });
    started.await.map_err(|e| Error::Internal(e.into()))?
}

async fn start_exec(handle: &Arc<Handle>, id: &str, spec: Command) -> Result<ExecSession, Error> {
    check_running(handle, id)?;
    let exec = uuid::Uuid::new_v4().simple().to_string();
    let end = handle.register_exec(&exec);
    let mut process = ExecProcess {
        handle: handle.clone(),
        container: id.to_owned(),
        exec: exec.clone(),
        read: Default::default(),
        end: Some(end),
        ended: None,
        abandoned: false,
    };
    let (width, height) = spec.tty_size.unwrap_or_default();
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        exec_id: exec.clone(),
        oci_process: spec.oci_process,
        stdin: spec.stdin,
        tty: spec.tty,
        tty_width: width,
        tty_height: height,
        user: spec.user,
    };
    let started = handle.guest.call("run a command", |mut c| async move { c.exec(request).await });
    if let Err(error) = started.await {
        if !matches!(error, Error::Deadline { .. } | Error::Unavailable { .. }) {
            // It was not started.
            process.end = None;
        }
        return Err(error);
    }
    let address = handle.guest.address();
    let stream = |kind| StreamId { container: id.to_owned(), exec: exec.clone(), kind };
    let (out_id, err_id, in_id) = (stream(Kind::Stdout), stream(Kind::Stderr), stream(Kind::Stdin));
    let [out_read, err_read] = process.read.clone();
    let (stdout, stderr, stdin) = tokio::join!(
        Output::open(address, &out_id, out_read),
        async {
            if spec.tty {
                Ok(None)
            } else {
                Output::open(address, &err_id, err_read).await.map(Some)
            }
        },
        async { if spec.stdin { open_stdin(address, &in_id).await.map(Some) } else { Ok(None) } },
    );
    let stdout = stdout.map_err(|e| stream_failed("standard output", e))?;
    let stderr = stderr.map_err(|e| stream_failed("standard error", e))?;
    let stdin = match stdin {
        Ok(stdin) => stdin.map(|s| Box::pin(s) as ByteWriter),
        // The command has already exited; its output can still be read.
        Err(StreamError::Status(_)) if spec.stdin => {
            Some(Box::pin(tokio::io::sink()) as ByteWriter)
        }
        Err(e) => return Err(stream_failed("standard input", e)),
    };
    Ok(ExecSession {
        stdin,
        stdout: Some(Box::pin(stdout)),
        stderr: stderr.map(|s| Box::pin(s) as ByteReader),
        process,
    })
}

/// OCI Process (runtime-spec, config.md); missing fields are taken from the container's own, `env`
/// is added to the container's.
fn oci_process(spec: &ExecSpec) -> Vec<u8> {
    let mut process = serde_json::json!({ "args": spec.command, "terminal": spec.tty });
    if !spec.env.is_empty() {
        process["env"] = spec.env.clone().into();
    }
    if !spec.cwd.is_empty() {
        process["cwd"] = spec.cwd.clone().into();
    }
    process.to_string().into_bytes()
}

pub(crate) async fn exec_sync(
    handle: &Arc<Handle>,
    id: &str,
    spec: ExecSpec,
    timeout: Option<Duration>,
    output_limit: usize,
) -> Result<ExecOutput, Error> {
    let spec = ExecSpec { stdin: false, ..spec };
    let timeout = timeout.filter(|t| !t.is_zero());
    let end = timeout.map(|limit| (tokio::time::Instant::now() + limit, limit));
    let started = exec(handle, id, spec);
    let mut session = match end {
        None => started.await?,
        Some((end, limit)) => match tokio::time::timeout_at(end, started).await {
            Ok(session) => session?,
            Err(_) => return Err(Error::ExecTimeout { limit }),
        },
    };
    let (stdout, stderr) = (session.stdout.take(), session.stderr.take());
    let mut output = ExecOutput::default();
    let run = async {
        let ExecOutput { stdout: out, stderr: err, code } = &mut output;
        let mut drained = std::pin::pin!(async {
            tokio::join!(
                read_bounded(stdout, out, output_limit),
                read_bounded(stderr, err, output_limit)
            )
        });
        let (end, read) = tokio::select! {
            end = session.process.wait() => {
                (end, tokio::time::timeout(DRAIN_LIMIT, &mut drained).await.ok())
            }
            read = &mut drained => (session.process.wait().await, Some(read)),
        };
        *code = end?.code;
        // Incomplete output is an error.
        let (out, err) = read.unwrap_or((Ok(()), Ok(())));
        out.and(err).map_err(|e| Error::unavailable(format!("output of the command: {e}")))
    };
    match end {
        None => run.await?,
        Some((end, limit)) => match tokio::time::timeout_at(end, run).await {
            Ok(result) => result?,
            Err(_) => {
                session.process.kill().await;
                return Err(Error::ExecTimeout { limit });
            }
        },
    }
    Ok(output)
}

/// Reads a stream to EOF and keeps its first `limit` bytes. It must be read completely, or the
/// command would block.
async fn read_bounded(
    stream: Option<ByteReader>,
    into: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<()> {
    let Some(mut stream) = stream else { return Ok(()) };
    let mut buffer = vec![0; 32 << 10];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        let room = limit.saturating_sub(into.len());
        into.extend_from_slice(&buffer[..n.min(room)]);
    }
}

/// See [`crate::Sandboxes::streams`].
pub(crate) async fn streams(handle: &Arc<Handle>, id: &str) -> Result<AttachSession, Error> {
    handle.ready_pod()?;
    let spec = handle.container(id)?.spec;
    if handle.log(id).is_some() {
        return Err(Error::precondition(format!(
            "the output of container {id} is written to its log"
        )));
    }
    let address = handle.guest.address();
    let stream = |kind| StreamId { container: id.to_owned(), exec: String::new(), kind };
    let stdout = Output::open(address, &stream(Kind::Stdout), Arc::default()).await;
    let stdout = stdout.map_err(|e| stream_failed("standard output", e))?;
    let stderr = match spec.tty {
        true => None,
        false => {
            let stderr = Output::open(address, &stream(Kind::Stderr), Arc::default()).await;
            Some(stderr.map_err(|e| stream_failed("standard error", e))?)
        }
    };
    let stdin = match spec.stdin {
        false => None,
        true => {
            let stdin = open_stdin(address, &stream(Kind::Stdin)).await;
            Some(stdin.map_err(|e| stream_failed("standard input", e))?)
        }
    };
    Ok(AttachSession {
        stdin: stdin.map(|s| Box::pin(s) as ByteWriter),
        stdout: Some(Box::pin(stdout)),
        stderr: stderr.map(|s| Box::pin(s) as ByteReader),
        process: AttachProcess { handle: handle.clone(), container: id.to_owned() },
    })
}

/// Attaches to a container's init process, also before its start. Without `stdin` the standard
/// input stays with its current client.
pub(crate) async fn attach(
    handle: &Arc<Handle>,
    id: &str,
    stdin: bool,
) -> Result<AttachSession, Error> {
    handle.ready_pod()?;
    let container = handle.container(id)?;
    if container.exit.is_some() {
        return Err(not_running(id, ContainerState::Exited));
    }
    let log = handle.log(id).ok_or_else(|| {
        Error::unavailable(format!("the output of container {id} is not available yet"))
    })?;
    let (stdout, stderr) = log.attach().await?;
    let stdin = if stdin && container.spec.stdin {
        let stream = StreamId { container: id.to_owned(), exec: String::new(), kind: Kind::Stdin };
        match open_stdin(handle.guest.address(), &stream).await {
            Ok(stdin) => Some(Box::pin(stdin) as ByteWriter),
            // Closed by an earlier client (stdin once), or the container is exiting.
            Err(StreamError::Status(_)) => Some(Box::pin(tokio::io::sink()) as ByteWriter),
            Err(e) => return Err(stream_failed("standard input", e)),
        }
    } else {
        None
    };
    let process = AttachProcess { handle: handle.clone(), container: id.to_owned() };
    Ok(AttachSession { stdin, stdout: Some(stdout), stderr, process })
}
