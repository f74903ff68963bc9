//! Exec and attach: what a caller holds is plain byte streams and a handle on the process. The
//! pod's owner task is not involved: bytes flow between the caller and the guest.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use agent_api::stdio::Kind;
use agent_api::v1;
use oci_spec::runtime::Process;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::guest::{Output, Refused, StreamId, open_stdin};
use crate::model::{ContainerState, ExecOutput, ExecSpec, ExitView};
use crate::pod::{ExecEnd, Handle};
use crate::policy::Container;

pub type ByteReader = Pin<Box<dyn AsyncRead + Send>>;
pub type ByteWriter = Pin<Box<dyn AsyncWrite + Send>>;

const SIGKILL: u32 = 9;
/// A killed command is gone within this time, or the guest is sick.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// After its end, a command's last output gets this long to arrive: a child of its own may hold
/// the pipes open.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// A command that runs in a container. Shutting `stdin` down closes the command's standard input.
/// Dropping `process` before the command's end kills it.
pub struct ExecSession {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    /// None with a tty.
    pub stderr: Option<ByteReader>,
    pub process: ExecProcess,
}

/// The streams of a container's own process, from now on.
pub struct AttachSession {
    /// One client at a time writes: a further one takes over.
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    pub stderr: Option<ByteReader>,
    pub process: AttachProcess,
}

/// What can be done to a process while somebody else waits for its end.
#[derive(Clone)]
pub struct ProcessControl {
    handle: Arc<Handle>,
    container: String,
    /// Empty: the container's own process.
    exec: String,
}

impl ProcessControl {
    pub async fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        resize(&self.handle, &self.container, &self.exec, width, height).await
    }

    /// Sends a signal by number; `all`: to all processes of the container.
    pub async fn signal(&self, number: u32, all: bool) -> Result<(), Error> {
        signal(&self.handle, &self.container, &self.exec, number, all).await
    }
}

/// Handle on an exec'd process.
pub struct ExecProcess {
    handle: Arc<Handle>,
    container: String,
    exec: String,
    /// How far stdout and stderr have been read.
    read: [Arc<AtomicU64>; 2],
    end: Option<oneshot::Receiver<ExecEnd>>,
    ended: Option<ExitView>,
    /// Its output is left to us.
    abandoned: bool,
}

/// Handle on a container's own process.
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

    /// Sends a signal by number.
    pub async fn signal(&self, signal: u32) -> Result<(), Error> {
        signal_exec(&self.handle, &self.container, &self.exec, signal).await
    }

    /// Waits for the end. Output may still be on its way: read both streams to their end first.
    /// Cancel-safe.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        if let Some(end) = &mut self.end {
            let end = end.await;
            self.end = None;
            self.ended = end.ok().map(exit_view);
        }
        self.ended
            .clone()
            .ok_or_else(|| Error::unavailable("the pod's VM ended while the command ran"))
    }
}

impl ExecProcess {
    /// Ends the command with what it has started, and waits until it is gone.
    async fn kill(&mut self) {
        let killed = async {
            if let Err(error) = self.signal(SIGKILL).await {
                tracing::warn!(container = self.container, %error, "command is not killed");
            }
            let _ = self.wait().await;
        };
        if tokio::time::timeout(KILL_LIMIT, killed).await.is_err() {
            tracing::warn!(container = self.container, "killed command does not end");
        }
        self.abandoned = true;
    }
}

impl Drop for ExecProcess {
    fn drop(&mut self) {
        self.handle.forget_exec(&self.exec);
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
                tracing::debug!(container, exec, %error, "abandoned command");
            }
            let drained = drain(&handle, container, exec, read);
            let _ = tokio::time::timeout(DRAIN_LIMIT, drained).await;
        });
    }
}

/// Takes what is left of a command's output: the guest keeps it, and the command's record, until
/// somebody has.
async fn drain(handle: &Handle, container: String, exec: String, read: [Arc<AtomicU64>; 2]) {
    for (kind, read) in [Kind::Stdout, Kind::Stderr].into_iter().zip(read) {
        let id = StreamId { container: container.clone(), exec: exec.clone(), kind };
        if let Ok(mut output) = Output::open(handle.guest.door(), &id, read).await {
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

    /// Waits for the container's end.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        wait(&self.handle, &self.container).await
    }
}

pub(crate) async fn wait(handle: &Handle, id: &str) -> Result<ExitView, Error> {
    let exit = |c: &Container| c.view(&handle.id).exit;
    let mut last = None;
    let there = handle.wait_for(|pod| {
        let Some(container) = pod.containers.get(id) else { return true };
        last = exit(container);
        last.is_some()
    });
    there.await?;
    last.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
}

fn exit_view(end: ExecEnd) -> ExitView {
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
    running(handle, id)?;
    let request = v1::FreezeContainerRequest { container_id: id.to_owned(), frozen };
    let what = if frozen { "pause the container" } else { "resume the container" };
    let call = handle.guest.call(what, |mut c| async move { c.freeze_container(request).await });
    call.await.map(drop)
}

fn running(handle: &Handle, id: &str) -> Result<(), Error> {
    handle.ready_pod()?;
    let container = handle.container(id)?;
    match container.state() {
        ContainerState::Running if container.exit.is_none() => Ok(()),
        state => Err(not_running(id, state)),
    }
}

fn not_running(id: &str, state: ContainerState) -> Error {
    let state = match state {
        ContainerState::Created => "is created and was not started",
        // An end whose last output is still on its way is shown as running.
        ContainerState::Exited | ContainerState::Running => "has exited",
        ContainerState::Unknown => "is in an unknown state",
    };
    Error::precondition(format!("container {id} is not running: it {state}"))
}

fn refused(what: &str, error: Refused) -> Error {
    Error::unavailable(format!("{what}: {:#}", anyhow::Error::new(error)))
}

/// Starts a command and joins its streams. The guest starts it whatever becomes of the caller, so
/// that is seen through: a session that nobody takes kills its command.
pub(crate) async fn exec(
    handle: &Arc<Handle>,
    id: &str,
    spec: ExecSpec,
) -> Result<ExecSession, Error> {
    if spec.command.is_empty() {
        running(handle, id)?;
        return Err(Error::invalid("a command to run is missing"));
    }
    let command = Command {
        oci_process: oci_process(&spec),
        tty: spec.tty,
        stdin: spec.stdin,
        tty_size: spec.tty_size.map(|(width, height)| (width.into(), height.into())),
        user: spec.user,
    };
    see_through(handle, id, command).await
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
    see_through(handle, id, command).await
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

async fn see_through(
    handle: &Arc<Handle>,
    id: &str,
    command: Command,
) -> Result<ExecSession, Error> {
    let (handle, id) = (handle.clone(), id.to_owned());
    let begun = tokio::spawn(async move { begin_exec(&handle, &id, command).await });
    begun.await.map_err(|e| Error::Internal(e.into()))?
}

async fn begin_exec(handle: &Arc<Handle>, id: &str, spec: Command) -> Result<ExecSession, Error> {
    running(handle, id)?;
    let exec = uuid::Uuid::new_v4().simple().to_string();
    let end = handle.expect_exec(&exec);
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
            // It does not run: there is nothing to kill.
            process.end = None;
        }
        return Err(error);
    }
    let door = handle.guest.door();
    let stream = |kind| StreamId { container: id.to_owned(), exec: exec.clone(), kind };
    let (out_id, err_id, in_id) = (stream(Kind::Stdout), stream(Kind::Stderr), stream(Kind::Stdin));
    let [out_read, err_read] = process.read.clone();
    let (stdout, stderr, stdin) = tokio::join!(
        Output::open(door, &out_id, out_read),
        async {
            if spec.tty { Ok(None) } else { Output::open(door, &err_id, err_read).await.map(Some) }
        },
        async { if spec.stdin { open_stdin(door, &in_id).await.map(Some) } else { Ok(None) } },
    );
    let stdout = stdout.map_err(|e| refused("standard output", e))?;
    let stderr = stderr.map_err(|e| refused("standard error", e))?;
    let stdin = match stdin {
        Ok(stdin) => stdin.map(|s| Box::pin(s) as ByteWriter),
        // A command that has ended by now reads no input; its output is still to be had.
        Err(Refused::Status(_)) if spec.stdin => Some(Box::pin(tokio::io::sink()) as ByteWriter),
        Err(e) => return Err(refused("standard input", e)),
    };
    Ok(ExecSession {
        stdin,
        stdout: Some(Box::pin(stdout)),
        stderr: stderr.map(|s| Box::pin(s) as ByteReader),
        process,
    })
}

/// OCI Process (runtime-spec, config.md); what is left out comes from the container's own, and
/// variables are added to the container's.
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
            tokio::join!(keep(stdout, out, output_limit), keep(stderr, err, output_limit))
        });
        let (end, read) = tokio::select! {
            end = session.process.wait() => {
                (end, tokio::time::timeout(DRAIN_LIMIT, &mut drained).await.ok())
            }
            read = &mut drained => (session.process.wait().await, Some(read)),
        };
        *code = end?.code;
        // A part of the output must not be taken for all of it.
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

/// Reads a stream to its end and keeps its first `limit` bytes: a command's output must not use up
/// our memory, and one that is not read would hang.
async fn keep(stream: Option<ByteReader>, into: &mut Vec<u8>, limit: usize) -> std::io::Result<()> {
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
        return Err(Error::precondition(format!("the output of container {id} is logged")));
    }
    let door = handle.guest.door();
    let stream = |kind| StreamId { container: id.to_owned(), exec: String::new(), kind };
    let stdout = Output::open(door, &stream(Kind::Stdout), Arc::default()).await;
    let stdout = stdout.map_err(|e| refused("standard output", e))?;
    let stderr = match spec.tty {
        true => None,
        false => {
            let stderr = Output::open(door, &stream(Kind::Stderr), Arc::default()).await;
            Some(stderr.map_err(|e| refused("standard error", e))?)
        }
    };
    let stdin = match spec.stdin {
        false => None,
        true => {
            let stdin = open_stdin(door, &stream(Kind::Stdin)).await;
            Some(stdin.map_err(|e| refused("standard input", e))?)
        }
    };
    Ok(AttachSession {
        stdin: stdin.map(|s| Box::pin(s) as ByteWriter),
        stdout: Some(Box::pin(stdout)),
        stderr: stderr.map(|s| Box::pin(s) as ByteReader),
        process: AttachProcess { handle: handle.clone(), container: id.to_owned() },
    })
}

/// Joins a container's own streams, also before it starts. Who does not ask for standard input does
/// not take it from who has it.
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
    let log = handle
        .log(id)
        .ok_or_else(|| Error::unavailable(format!("output of container {id} is not there yet")))?;
    let (stdout, stderr) = log.attach().await?;
    let stdin = if stdin && container.spec.stdin {
        let stream = StreamId { container: id.to_owned(), exec: String::new(), kind: Kind::Stdin };
        match open_stdin(handle.guest.door(), &stream).await {
            Ok(stdin) => Some(Box::pin(stdin) as ByteWriter),
            // Closed by an earlier client (stdin once), or the container is just ending.
            Err(Refused::Status(_)) => Some(Box::pin(tokio::io::sink()) as ByteWriter),
            Err(e) => return Err(refused("standard input", e)),
        }
    } else {
        None
    };
    let process = AttachProcess { handle: handle.clone(), container: id.to_owned() };
    Ok(AttachSession { stdin, stdout: Some(stdout), stderr, process })
}
