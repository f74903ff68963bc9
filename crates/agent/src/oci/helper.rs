//! Short-lived helper processes: the agent's binary with a verb as `argv[1]`. PID 1 itself never
//! forks and never changes its namespaces, and its reaper does not interfere with the waits of
//! libcontainer. Processes that a helper leaves are re-parented to PID 1.
//!
//! ```text
//! agent --spawn--> helper --clone--> (intermediate) --clone--> init of the container
//!   <---reply: {"pid":n} or {"error":..}---'                        |
//!   <---start: {"missing":..,"message":..} or end of file-----------'  (closed by execve)
//! ```
#![allow(unsafe_code)] // descriptors arrive as numbers in the helper

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::command;
use crate::error::{Context, Error, Result};

/// Maximum length of a helper's message, bytes: it may contain text of an image.
const MAX_MESSAGE: usize = 64 << 10;
/// Time for a helper to finish; mounts may read a slow disk.
const DEADLINE: Duration = Duration::from_secs(60);
/// Time from the start notification to execve or its failure.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Environment variable with a helper's [`HelperRequest`].
pub(super) const REQUEST_ENV: &str = "NACELLE_HELPER_REQUEST";

/// Request to a helper, as JSON in an environment variable.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HelperRequest<T> {
    pub(super) reply: RawFd,
    pub(super) start: RawFd,
    pub(super) job: T,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    #[serde(rename = "pid")]
    Pid(i32),
    #[serde(rename = "error")]
    Error(String),
}

/// A process that a helper has created, and the pipe that reports its execve.
#[derive(Debug)]
pub struct Spawned {
    pub pid: i32,
    pub start: StartPipe,
}

/// Reaches end of file at execve of the program, or delivers the failure.
#[derive(Debug)]
pub struct StartPipe(Receiver);

impl StartPipe {
    pub async fn wait(mut self) -> Result<()> {
        let message = tokio::time::timeout(START_DEADLINE, read_message(&mut self.0, false))
            .await
            .map_err(|_| Error::Deadline {
                operation: "execve of the program".to_owned(),
                after: START_DEADLINE,
            })?
            .context(|| "read the start message".to_owned())?;
        if message.is_empty() {
            return Ok(());
        }
        let failure: command::Failure = parse(&message)?;
        Err(Error::Command { missing: failure.missing, message: failure.message })
    }
}

fn parse<T: DeserializeOwned>(message: &[u8]) -> Result<T> {
    serde_json::from_slice(message).map_err(|error| Error::Helper {
        operation: "parse a helper's message",
        reason: error.to_string(),
    })
}

/// Reads to a newline or to the end of file.
async fn read_message(pipe: &mut Receiver, line: bool) -> std::io::Result<Vec<u8>> {
    let mut message = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let n = pipe.read(&mut chunk).await?;
        message.extend_from_slice(&chunk[..n]);
        if n == 0 || (line && message.ends_with(b"\n")) || message.len() > MAX_MESSAGE {
            return Ok(message);
        }
    }
}

/// The three standard streams of a process.
#[derive(Debug)]
pub struct Streams {
    pub stdin: Stdio,
    pub stdout: Stdio,
    pub stderr: Stdio,
}

impl Streams {
    pub fn null() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }
}

/// Runs a helper. `inherit` are further descriptors, whose numbers the job contains. `spawned` gets
/// the helper's pid before any wait.
pub(super) async fn run<T: Serialize>(
    verb: &'static str,
    job: T,
    streams: Streams,
    inherit: Vec<OwnedFd>,
    spawned: impl FnOnce(i32),
) -> Result<Spawned> {
    let operation = || format!("start helper {verb}");
    let (reply_read, reply_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(operation)?;
    let (start_read, start_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(operation)?;
    let request =
        HelperRequest { reply: reply_write.as_raw_fd(), start: start_write.as_raw_fd(), job };
    let request = serde_json::to_string(&request).map_err(|error| Error::Helper {
        operation: "serialize a request",
        reason: error.to_string(),
    })?;
    let pid = {
        // Cleared just before the spawn; the agent has one thread that spawns, so no other process
        // inherits them.
        for fd in [&reply_write, &start_write].into_iter().chain(&inherit) {
            fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).context(operation)?;
        }
        let child = Command::new("/proc/self/exe")
            .arg0("nacelle")
            .arg(verb)
            .env_clear()
            // Not an argument, as `ps` in a container would show it.
            .env(REQUEST_ENV, request)
            .stdin(streams.stdin)
            .stdout(streams.stdout)
            .stderr(streams.stderr)
            .spawn()
            .context(operation)?;
        // The reaper waits for it; dropping a `Child` does not.
        i32::try_from(child.id()).unwrap_or(0)
    };
    spawned(pid);
    drop((reply_write, start_write, inherit));
    let mut reply = Receiver::from_owned_fd(reply_read).context(operation)?;
    let start = StartPipe(Receiver::from_owned_fd(start_read).context(operation)?);
    let message = match tokio::time::timeout(DEADLINE, read_message(&mut reply, true)).await {
        Ok(message) => message.context(|| format!("read the reply of helper {verb}"))?,
        Err(_elapsed) => {
            let helper = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(helper, nix::sys::signal::Signal::SIGKILL);
            return Err(Error::Deadline { operation: format!("helper {verb}"), after: DEADLINE });
        }
    };
    if message.is_empty() {
        return Err(Error::Helper {
            operation: verb,
            reason: "it exited without a reply".to_owned(),
        });
    }
    match parse(&message)? {
        Reply::Pid(pid) => Ok(Spawned { pid, start }),
        Reply::Error(reason) => Err(Error::Helper { operation: verb, reason }),
    }
}

pub(super) fn become_helper<T: DeserializeOwned>(
    request: &str,
    main: fn(T, OwnedFd) -> std::result::Result<i32, String>,
) -> ! {
    let Ok(HelperRequest { reply, start, job }) = serde_json::from_str::<HelperRequest<T>>(request)
    else {
        std::process::exit(2);
    };
    // SAFETY: the agent created both descriptors for this process and passed their numbers; nothing
    // else in this process owns them.
    let (reply, start) = unsafe { (OwnedFd::from_raw_fd(reply), OwnedFd::from_raw_fd(start)) };
    for fd in [&reply, &start] {
        let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
    let for_panics = reply.as_raw_fd();
    std::panic::set_hook(Box::new(move |info| {
        // stderr is already the container's stream.
        // SAFETY: the descriptor stays open until the process ends.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(for_panics) };
        send_reply(fd, &Reply::Error(format!("panic: {info}")));
    }));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| main(job, start)));
    match result {
        Ok(Ok(pid)) => send_reply(&reply, &Reply::Pid(pid)),
        Ok(Err(reason)) => send_reply(&reply, &Reply::Error(reason)),
        Err(_) => {}
    }
    std::process::exit(0);
}

/// Makes this process and its children not dumpable. To be called before they are visible in a
/// container: a process there must not be able to trace them or to reach their root and descriptors
/// through /proc (CVE-2016-9962). execve(2) of the container's program resets this. libcontainer does it
/// by itself.
pub(super) fn make_untraceable() -> std::result::Result<(), String> {
    nix::sys::prctl::set_dumpable(false).map_err(|error| format!("PR_SET_DUMPABLE: {error}"))
}

fn send_reply(fd: impl AsFd, reply: &Reply) {
    let mut text = serde_json::to_vec(reply).unwrap_or_default();
    text.push(b'\n');
    let _ = nix::unistd::write(fd, &text);
}
