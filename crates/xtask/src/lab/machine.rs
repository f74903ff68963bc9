//! The outer machine's life: its ports, the limits, and how it ends.
//!
//! ```text
//!  booting --"ready"--> running --"exit N"--> closing --QEMU ends--> N
//!     |                    |                     |
//!  boot limit           run limit             10 s         => killed: 125, 124, N
//!  QEMU ends early, or no "alive" for two minutes while running: 125
//! ```
//!
//! Where it is not N, the console is kept. A machine that fell silent gets an NMI first: its kernel
//! panics and writes there what its CPU was doing.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::qemu::{Plan, spawn};
use super::report::{keep_console, last_words, log_of};
use super::status::{STATUS_INTERRUPTED, STATUS_TIMEOUT};
use crate::run;

/// How long the outer machine may take to power off after it reported its status.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);

/// The outer machine says every 5 s that it is alive.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(50);

pub(super) fn run(plan: &Plan<'_>) -> Result<i32> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }

    let status_port = Fifo::create(plan.scratch, "status")?;
    let mut outputs = Vec::new();
    let mut copies = Vec::new();
    if !plan.shell {
        let (stdout, stderr) =
            (Fifo::create(plan.scratch, "stdout")?, Fifo::create(plan.scratch, "stderr")?);
        copies.push(copy(stdout.reader, io::stdout()));
        copies.push(copy(stderr.reader, io::stderr()));
        outputs = vec![stdout.keeper, stderr.keeper];
    }
    let mut qemu = spawn(plan)?;
    let outcome =
        supervise(&mut qemu, &lines(status_port.reader), status_port.keeper, plan, &interrupted);
    // Dead or alive, it must not outlive this call. With its side of the pipes and our keepers
    // gone, the copies end once they have passed on the rest.
    let _ = qemu.kill();
    let _ = qemu.wait();
    drop(outputs);
    for copy in copies {
        let _ = copy.join();
    }
    match outcome {
        Ok(status) => Ok(status),
        Err(error) => {
            keep_console(plan.scratch);
            Err(error)
        }
    }
}

fn supervise(
    qemu: &mut Child,
    status: &Receiver<String>,
    keeper: File,
    plan: &Plan<'_>,
    interrupted: &AtomicBool,
) -> Result<i32> {
    let mut deadline = Some(Instant::now() + plan.boot_limit);
    let mut ready = false;
    let mut exit = None;
    let mut last_output = Instant::now();
    loop {
        match status.recv_timeout(POLL) {
            Ok(line) => {
                last_output = Instant::now();
                if line == "ready" {
                    ready = true;
                    deadline = plan.run_limit.map(|limit| Instant::now() + limit);
                } else if let Some(code) = line.strip_prefix("exit ") {
                    exit = Some(code.parse().with_context(|| format!("exit status '{code}'"))?);
                    deadline = Some(Instant::now() + CLOSING_LIMIT);
                } else if let Some(index) = line.strip_prefix("missing ") {
                    eprintln!("lab: there is no file for --out number {index}");
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
        }
        if interrupted.load(Ordering::Relaxed) {
            return Ok(STATUS_INTERRUPTED);
        }
        if let Some(end) = qemu.try_wait()? {
            // Lines may have come in between the two looks; without a writer they end.
            drop(keeper);
            if let Some(code) = status.iter().find_map(|l| l.strip_prefix("exit ")?.parse().ok()) {
                exit = Some(code);
            }
            let Some(code) = exit else {
                let how = end.signal().map_or(String::new(), |n| format!(" by signal {n}"));
                bail!(
                    "the outer machine ended{how} without an exit status{}",
                    log_of(plan.scratch)
                );
            };
            return Ok(code);
        }
        if ready && exit.is_none() && !plan.shell && last_output.elapsed() >= SILENCE_LIMIT {
            last_words(plan.scratch);
            bail!("the outer machine fell silent{}", log_of(plan.scratch));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return match (exit, ready) {
                (Some(code), _) => Ok(code),
                (None, true) => {
                    eprintln!(
                        "lab: the command ran into its limit of {:?}",
                        plan.run_limit.unwrap_or_default()
                    );
                    keep_console(plan.scratch);
                    Ok(STATUS_TIMEOUT)
                }
                (None, false) => bail!(
                    "the outer machine was not ready after {:?}{}",
                    plan.boot_limit,
                    log_of(plan.scratch)
                ),
            };
        }
    }
}

/// A named pipe that QEMU writes into.
struct Fifo {
    reader: File,
    /// A writer of our own: opening does not wait for QEMU, and the end of the file comes when
    /// this is dropped, not while QEMU has yet to open its side.
    keeper: File,
}

impl Fifo {
    fn create(scratch: &Path, name: &str) -> Result<Self> {
        let path = scratch.join(name);
        run::quiet(Command::new("mkfifo").arg(&path))?;
        let keeper = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(Self { reader: File::open(&path)?, keeper })
    }
}

fn lines(port: File) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(port).lines().map_while(io::Result::ok) {
            if sender.send(line.trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Passes bytes on as they come, whatever they are.
fn copy(mut from: File, mut to: impl Write + Send + 'static) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                        break;
                    }
                }
            }
        }
    })
}
