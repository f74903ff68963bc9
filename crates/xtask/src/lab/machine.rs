//! The outer machine's life: QEMU's command line, its ports, the limits, and how it ends.
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
//!
//! One CPU unless more are asked for: QEMU 10.0 with two CPU threads that both run SVM guests once
//! in some ten thousand #VMEXITs goes on with nested paging after it went back to the host's state.
//! The host's next instruction fetch then exits a second time (its log has two `vmexit` lines
//! without a `vmrun` between them, the second an NPF at the instruction after VMRUN), and the
//! host's registers are saved as the guest's. A guest lost so falls silent or ends with a triple
//! fault, whichever VMM runs it; some take the outer kernel along. Never seen with one CPU.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::image::Image;
use crate::{paths, run};

const STATUS_INTERRUPTED: i32 = 130;

/// How long the outer machine may take to power off after it reported its status.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);

/// The outer machine says every 5 s that it is alive.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// How long an outer machine that fell silent gets to write down what it was doing.
const LAST_WORDS: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(50);

pub(super) struct Plan<'a> {
    pub(super) image: &'a Image,
    /// The tar that the machine unpacks.
    pub(super) files: &'a Path,
    /// Folder for this run's own files.
    pub(super) scratch: &'a Path,
    pub(super) memory_mib: u32,
    pub(super) cpus: u8,
    pub(super) shell: bool,
    pub(super) outputs: usize,
    pub(super) boot_limit: Duration,
    pub(super) run_limit: Option<Duration>,
}

/// Where the archive of the `index`th `--out` lands.
pub(super) fn output_file(scratch: &Path, index: usize) -> PathBuf {
    scratch.join(format!("out{index}.tar"))
}

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
                    Ok(super::STATUS_TIMEOUT)
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

fn spawn(plan: &Plan<'_>) -> Result<Child> {
    let scratch = plan.scratch.display();
    let version = run::output(Command::new("qemu-system-x86_64").arg("--version"))?;
    // QEMU 7.2 virtualizes SVM without XSETBV, and loses SMP guests to stale code patches.
    let old = version.contains("version 7.");
    let (cpus, model) = match old {
        true => (1, "EPYC-Rome,+svm,+npt,-xsave"),
        false => (plan.cpus, "EPYC-Rome,+svm,+npt"),
    };

    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-M", "q35,hpet=on", "-accel", "tcg,thread=multi"]);
    command.args(["-cpu", model, "-nic", "none"]);
    command.args(["-smp", &cpus.to_string(), "-m", &format!("{}M", plan.memory_mib)]);
    command.arg("-kernel").arg(&plan.image.kernel).arg("-initrd").arg(&plan.image.initrd);
    let options = "console=ttyS0 quiet loglevel=5 tsc=reliable no_timer_check panic=-1 oops=panic \
                   unknown_nmi_panic nokaslr";
    command.arg("-append").arg(format!("{options} {}", plan.image.cmdline));
    for (file, options) in [
        (plan.image.root.as_path(), "snapshot=on,cache=unsafe"),
        (plan.files, "readonly=on"),
        (plan.image.scratch.as_path(), "snapshot=on,cache=unsafe,discard=unmap"),
    ] {
        command
            .args(["-drive", &format!("if=virtio,format=raw,{options},file={}", file.display())]);
    }
    command.args(["-chardev", &format!("file,id=console,path={scratch}/console")]);
    command.args(["-serial", "chardev:console", "-device", "virtio-rng-pci"]);
    let monitor = monitor(plan.scratch);
    command.args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())]);
    command.args(["-device", "virtio-serial-pci,max_ports=31"]);
    let mut port = |name: &str, path: &str| {
        command.args(["-chardev", &format!("file,id={name},path={path}")]);
        command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
    };
    port("status", &format!("{scratch}/status"));
    if !plan.shell {
        port("stdout", &format!("{scratch}/stdout"));
        port("stderr", &format!("{scratch}/stderr"));
    }
    for index in 0..plan.outputs {
        let file = output_file(plan.scratch, index);
        port(&format!("out{index}"), &file.display().to_string());
    }
    if plan.shell {
        command.args(["-chardev", "stdio,id=shell,signal=off"]);
        command.args(["-device", "virtconsole,chardev=shell"]);
    } else {
        command.stdin(Stdio::null());
    }
    let log = File::create(plan.scratch.join("qemu.log"))?;
    command.stderr(log);
    if !plan.shell {
        command.stdout(Stdio::null());
    }
    // QEMU puts its snapshots there.
    command.env("TMPDIR", plan.scratch);
    command.spawn().context("starting QEMU (is it installed? 'make deps')")
}

fn monitor(scratch: &Path) -> PathBuf {
    scratch.join("monitor")
}

/// Sends an NMI to an outer machine without output, so that its kernel prints its state.
fn last_words(scratch: &Path) {
    let sent = UnixStream::connect(monitor(scratch)).and_then(|mut monitor| {
        monitor.set_read_timeout(Some(LAST_WORDS))?;
        monitor.write_all(b"info registers\ninfo status\nnmi\n")?;
        let mut reply = Vec::new();
        // The panic ends QEMU, and with it this connection; else the timeout does.
        let _ = monitor.read_to_end(&mut reply);
        let mut console = OpenOptions::new().append(true).open(scratch.join("console"))?;
        console.write_all(&reply)
    });
    if let Err(error) = sent {
        eprintln!("lab: asking QEMU for the machine's state: {error}");
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

/// Keeps the outer kernel's console for whoever wants to know why it died.
fn keep_console(scratch: &Path) {
    let Ok(cache) = paths::cache() else { return };
    let kept = cache.join("lab-console.log");
    if fs::copy(scratch.join("console"), &kept).is_ok() {
        eprintln!("lab: the outer machine's console is kept in {}", kept.display());
    }
}

fn log_of(scratch: &Path) -> String {
    let read = |name: &str| fs::read(scratch.join(name)).unwrap_or_default();
    let console = String::from_utf8_lossy(&read("console")).into_owned();
    let lines: Vec<_> = console.lines().collect();
    let mut text = String::new();
    for line in String::from_utf8_lossy(&read("qemu.log")).lines() {
        if !line.contains("TCG doesn't support") {
            text.push_str(&format!("\n  qemu: {line}"));
        }
    }
    for line in &lines[lines.len().saturating_sub(40)..] {
        text.push_str(&format!("\n  console: {line}"));
    }
    text
}
