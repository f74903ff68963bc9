//! Short-lived helper processes: the agent started again with a verb (`argv[1]`), so that
//! PID 1 never forks itself, never changes its namespaces, and its reaping does not collide with
//! the waits of libcontainer. What a helper leaves behind becomes PID 1's child.
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

use super::{command, create, exec, pod_pid, userns};
use crate::error::{Doing, Error, Result};

/// Longest message of a helper, bytes: it may quote what an image holds.
const MAX_MESSAGE: usize = 64 << 10;
/// For a helper to do its work; a mount of a sick disk may take a while.
const DEADLINE: Duration = Duration::from_secs(60);
/// From "run the program" until it runs or has failed.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Variable that holds a helper's [`Order`].
const ORDER: &str = "NACELLE_ORDER";

/// What a helper is to do; travels as JSON in a variable.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order<T> {
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

/// A process that a helper has made, and the pipe that tells whether its program runs.
#[derive(Debug)]
pub struct Made {
    pub pid: i32,
    pub start: StartPipe,
}

/// Ends when the program runs; says why when it does not.
#[derive(Debug)]
pub struct StartPipe(Receiver);

impl StartPipe {
    pub async fn wait(mut self) -> Result<()> {
        let message = tokio::time::timeout(START_DEADLINE, read_message(&mut self.0, false))
            .await
            .map_err(|_| Error::Deadline {
                doing: "start of the program".to_owned(),
                after: START_DEADLINE,
            })?
            .doing(|| "read the start message".to_owned())?;
        if message.is_empty() {
            return Ok(());
        }
        let failure: command::Failure = parse(&message)?;
        Err(Error::Command { missing: failure.missing, message: failure.message })
    }
}

fn parse<T: DeserializeOwned>(message: &[u8]) -> Result<T> {
    serde_json::from_slice(message).map_err(|error| Error::Helper {
        doing: "understand a helper's message",
        why: error.to_string(),
    })
}

/// Reads to a newline, or to the end.
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

/// Runs a helper. `inherit` is a further descriptor that the job names by number. `spawned` gets
/// the helper's own pid before anything is waited for.
pub(super) async fn run<T: Serialize>(
    verb: &'static str,
    job: T,
    streams: Streams,
    inherit: Option<OwnedFd>,
    spawned: impl FnOnce(i32),
) -> Result<Made> {
    let doing = || format!("start helper {verb}");
    let (reply_read, reply_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing(doing)?;
    let (start_read, start_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing(doing)?;
    let order = Order { reply: reply_write.as_raw_fd(), start: start_write.as_raw_fd(), job };
    let order = serde_json::to_string(&order)
        .map_err(|error| Error::Helper { doing: "write an order", why: error.to_string() })?;
    let pid = {
        // The agent is single-threaded where it spawns, so nothing else inherits these.
        for fd in [&reply_write, &start_write].into_iter().chain(&inherit) {
            fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).doing(doing)?;
        }
        let child = Command::new("/proc/self/exe")
            .arg0("nacelle")
            .arg(verb)
            .env_clear()
            // Not an argument: `ps` in a container would show it.
            .env(ORDER, order)
            .stdin(streams.stdin)
            .stdout(streams.stdout)
            .stderr(streams.stderr)
            .spawn()
            .doing(doing)?;
        // The reaper waits for it: dropping a `Child` does not.
        i32::try_from(child.id()).unwrap_or(0)
    };
    spawned(pid);
    drop((reply_write, start_write, inherit));
    let mut reply = Receiver::from_owned_fd(reply_read).doing(doing)?;
    let start = StartPipe(Receiver::from_owned_fd(start_read).doing(doing)?);
    let message = match tokio::time::timeout(DEADLINE, read_message(&mut reply, true)).await {
        Ok(message) => message.doing(|| format!("read the reply of helper {verb}"))?,
        Err(_elapsed) => {
            let helper = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(helper, nix::sys::signal::Signal::SIGKILL);
            return Err(Error::Deadline { doing: format!("helper {verb}"), after: DEADLINE });
        }
    };
    if message.is_empty() {
        return Err(Error::Helper { doing: verb, why: "it died without a word".to_owned() });
    }
    match parse(&message)? {
        Reply::Pid(pid) => Ok(Made { pid, start }),
        Reply::Error(why) => Err(Error::Helper { doing: verb, why }),
    }
}

/// The other side: runs if the process was started as a helper, and does not return then.
pub fn main_if_helper() {
    let (Some(verb), Ok(order)) = (std::env::args().nth(1), std::env::var(ORDER)) else {
        return;
    };
    match verb.as_str() {
        create::VERB => become_helper(&order, create::main),
        exec::VERB => become_helper(&order, exec::main),
        pod_pid::VERB => become_helper(&order, pod_pid::main),
        userns::VERB => become_helper(&order, userns::main),
        _ => {}
    }
}

fn become_helper<T: DeserializeOwned>(
    order: &str,
    main: fn(T, OwnedFd) -> std::result::Result<i32, String>,
) -> ! {
    let Ok(Order { reply, start, job }) = serde_json::from_str::<Order<T>>(order) else {
        std::process::exit(2);
    };
    // SAFETY: the agent made both descriptors for this process and named them in the order;
    // nothing else in this fresh process knows them.
    let (reply, start) = unsafe { (OwnedFd::from_raw_fd(reply), OwnedFd::from_raw_fd(start)) };
    for fd in [&reply, &start] {
        let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
    let for_panics = reply.as_raw_fd();
    std::panic::set_hook(Box::new(move |info| {
        // Standard error is the container's already; nobody would look there.
        // SAFETY: the descriptor stays open until the process ends.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(for_panics) };
        answer(fd, &Reply::Error(format!("panic: {info}")));
    }));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| main(job, start)));
    match result {
        Ok(Ok(pid)) => answer(&reply, &Reply::Pid(pid)),
        Ok(Err(why)) => answer(&reply, &Reply::Error(why)),
        Err(_) => {}
    }
    std::process::exit(0);
}

fn answer(fd: impl AsFd, reply: &Reply) {
    let mut text = serde_json::to_vec(reply).unwrap_or_default();
    text.push(b'\n');
    let _ = nix::unistd::write(fd, &text);
}
