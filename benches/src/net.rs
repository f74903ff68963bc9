//! TCP between the host and a guest over a tap: bytes out of the guest, bytes into it, and round
//! trips of one byte. The guest's first process is `nacelle-share-load` on all sides. Counted are KVM
//! exits by reason (the `kvm_exit` tracepoint, where the host has it) and interrupts of the device in
//! the guest (/proc/interrupts).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{self, Shape};
use crate::share::{Ended, pack};
use crate::{measure, table};

const TAP: &str = "nacbench0";
const HOST: &str = "10.98.0.1/24";
const PORT: u16 = 5201;
const LOAD: &str = "nacelle-share-load";
/// MiB of each guest.
const MEMORY: u32 = 256;
/// How long a guest may take for its boot, and for one phase.
const LIMIT: Duration = Duration::from_secs(120);
const BLOCK: usize = 128 << 10;
const TRACE: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";

/// What is compared.
pub struct Plan<'a> {
    pub bin: &'a Path,
    pub guest: &'a Path,
    /// Further builds of nacelle-vmm.
    pub others: &'a [PathBuf],
    pub qemu: bool,
    pub rounds: usize,
    pub vcpus: &'a [u8],
    /// MiB in each direction.
    pub amount: u64,
    pub trips: u64,
}

/// What is done: its request, and its name in the table.
const PHASES: [(&str, &str); 3] =
    [("out", "out of the guest"), ("in", "into the guest"), ("ping", "round trips")];

#[derive(Default)]
struct Sample {
    us: Vec<u64>,
    exits: Vec<u64>,
    halts: Vec<u64>,
    interrupts: Vec<u64>,
    faults: Vec<u64>,
}

enum Vmm {
    Nacelle(PathBuf),
    Qemu,
}

pub fn run(plan: &Plan<'_>) -> Result<()> {
    let mut sides = vec![("nacelle-vmm".to_owned(), Vmm::Nacelle(plan.bin.join("nacelle-vmm")))];
    for other in plan.others {
        sides.push((other.display().to_string(), Vmm::Nacelle(other.clone())));
    }
    if plan.qemu {
        sides.push(("QEMU -M microvm".to_owned(), Vmm::Qemu));
    }
    let traced = Path::new(TRACE).join("hist").exists();
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("the bench's port")?;
    for &vcpus in plan.vcpus {
        let shape = Shape { vcpus, memory: MEMORY };
        let mut samples: Vec<BTreeMap<&str, Sample>> =
            sides.iter().map(|_| BTreeMap::new()).collect();
        for round in 0..plan.rounds {
            for ((name, vmm), samples) in sides.iter().zip(&mut samples) {
                once(plan, vmm, shape, &listener, traced, samples)
                    .with_context(|| format!("{name}, {vcpus} vCPUs, round {round}"))?;
            }
        }
        print(plan, vcpus, &sides, &mut samples, traced);
    }
    Ok(())
}

/// All phases in one guest.
fn once(
    plan: &Plan<'_>,
    vmm: &Vmm,
    shape: Shape,
    listener: &TcpListener,
    traced: bool,
    samples: &mut BTreeMap<&'static str, Sample>,
) -> Result<()> {
    let mut guest = Guest::start(plan, vmm, shape, listener)?;
    for (phase, _) in PHASES {
        let count = if phase == "ping" { plan.trips } else { plan.amount << 20 };
        let interrupts = guest.interrupts()?;
        let before = guest.counts()?;
        let histogram = traced.then(|| Histogram::start(Path::new(TRACE))).transpose()?;
        let begin = Instant::now();
        guest.phase(phase, count).with_context(|| phase.to_owned())?;
        let us = begin.elapsed().as_micros() as u64;
        let reasons = histogram.as_ref().map(|h| h.reasons()).transpose()?.unwrap_or_default();
        let after = guest.counts()?;
        drop(histogram);
        let interrupts = guest.interrupts()? - interrupts;
        let exits = after.0 - before.0;
        // What there is of a run that does not come to its end.
        eprintln!(
            "{} vCPUs, {phase}: {us} us, {exits} exits, {interrupts} interrupts, {reasons:x?}",
            shape.vcpus
        );
        let sample = samples.entry(phase).or_default();
        sample.us.push(us);
        sample.exits.push(exits);
        sample.halts.push(after.1 - before.1);
        sample.interrupts.push(interrupts);
        let faults = |code| reasons.get(&code).copied().unwrap_or(0);
        // Exits that a kick takes: EPT misconfiguration (Intel SDM volume 3, appendix C) or nested
        // page fault (AMD APM volume 2, appendix C).
        sample.faults.push(faults(49) + faults(0x400));
    }
    Ok(())
}

/// The tracepoint's histogram of exits by reason; removed when it is dropped.
struct Histogram<'a> {
    tracepoint: &'a Path,
}

impl<'a> Histogram<'a> {
    fn start(tracepoint: &'a Path) -> Result<Self> {
        let histogram = Self { tracepoint };
        // Of a run that was killed.
        let _ = histogram.trigger("!hist:keys=exit_reason");
        let started = histogram.trigger("hist:keys=exit_reason");
        started.context("starting the histogram of KVM exits")?;
        Ok(histogram)
    }

    fn trigger(&self, command: &str) -> std::io::Result<()> {
        fs::write(self.tracepoint.join("trigger"), command)
    }

    fn reasons(&self) -> Result<BTreeMap<u64, u64>> {
        Ok(parse_histogram(&fs::read_to_string(self.tracepoint.join("hist"))?))
    }
}

impl Drop for Histogram<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.trigger("!hist:keys=exit_reason") {
            eprintln!("the histogram of KVM exits cannot be removed: {error}");
        }
    }
}

fn parse_histogram(text: &str) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let numbers: Vec<u64> = line
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        if let [reason, count] = numbers[..] {
            counts.insert(reason, count);
        }
    }
    counts
}

fn print(
    plan: &Plan<'_>,
    vcpus: u8,
    sides: &[(String, Vmm)],
    samples: &mut [BTreeMap<&str, Sample>],
    traced: bool,
) {
    let mut rows = Vec::new();
    for (phase, text) in PHASES {
        for ((name, _), samples) in sides.iter().zip(samples.iter_mut()) {
            let Some(sample) = samples.get_mut(phase) else { continue };
            let us = table::median(&mut sample.us);
            let (best, worst) = (sample.us[0], sample.us[sample.us.len() - 1]);
            rows.push(vec![
                text.to_owned(),
                name.clone(),
                format!("{:.0} ms", us as f64 / 1e3),
                format!("{:.0}-{:.0}", best as f64 / 1e3, worst as f64 / 1e3),
                table::median(&mut sample.exits).to_string(),
                table::median(&mut sample.halts).to_string(),
                table::median(&mut sample.interrupts).to_string(),
                if traced { table::median(&mut sample.faults).to_string() } else { "-".into() },
            ]);
        }
    }
    table::print(
        &format!(
            "TCP over a tap: {} MiB each way, {} round trips of a byte ({vcpus} vCPUs, {MEMORY} MiB, \
             same kernel, median of {}, in turns)",
            plan.amount, plan.trips, plan.rounds
        ),
        &["", "VMM", "time", "spread", "KVM exits", "halts", "interrupts", "MMIO faults"],
        &rows,
    );
}

struct Guest {
    vmm: Ended,
    connection: BufReader<TcpStream>,
    _folder: tempfile::TempDir,
}

impl Guest {
    fn start(plan: &Plan<'_>, vmm: &Vmm, shape: Shape, listener: &TcpListener) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path();
        pack(&plan.bin.join(LOAD), path)?;
        let initramfs = path.join("guest.cpio");
        let mut command = match vmm {
            Vmm::Nacelle(binary) => {
                let mut command = Command::new(binary);
                command.arg("boot").arg("--kernel").arg(plan.guest.join("vmlinux"));
                command.arg("--initramfs").arg(&initramfs).args(["--tap", TAP]);
                command.args(["--vcpus", &shape.vcpus.to_string()]);
                command.args(["--memory", &shape.memory.to_string()]);
                command
            }
            Vmm::Qemu => {
                let initramfs = boot::padded(&initramfs, path)?;
                let mut command = boot::microvm(plan.guest, &initramfs, shape, "");
                let tap = format!("tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off");
                command.args(["-netdev", &tap]);
                command.args(["-device", "virtio-net-pci,netdev=n,romfile="]);
                command
            }
        };
        let log = File::create(path.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let vmm = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut vmm = Ended(vmm);
        let said = || {
            let all = fs::read(path.join("log")).unwrap_or_default();
            String::from_utf8_lossy(&all[all.len().saturating_sub(4096)..]).into_owned()
        };
        let begin = Instant::now();
        let stopped = |vmm: &mut Ended| -> Result<()> {
            ensure!(vmm.0.try_wait()?.is_none(), "the VMM ended by itself; it said: {}", said());
            ensure!(begin.elapsed() < LIMIT, "not after {LIMIT:?}; it said: {}", said());
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        };
        while !Path::new("/sys/class/net").join(TAP).exists() {
            stopped(&mut vmm).context("waiting for the tap")?;
        }
        ip(&["addr", "add", HOST, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        listener.set_nonblocking(true)?;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    stopped(&mut vmm).context("waiting for the guest")?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let connection = BufReader::with_capacity(BLOCK, stream);
        Ok(Self { vmm, connection, _folder: folder })
    }

    fn phase(&mut self, phase: &str, count: u64) -> Result<()> {
        writeln!(self.connection.get_mut(), "{phase} {count}")?;
        match phase {
            "out" => {
                let mut all = self.connection.by_ref().take(count);
                let got = std::io::copy(&mut all, &mut std::io::sink())?;
                ensure!(got == count, "{got} bytes of {count}");
            }
            "in" => {
                let block = vec![0x5a; BLOCK];
                let mut rest = count;
                while rest > 0 {
                    let part = rest.min(BLOCK as u64);
                    self.connection.get_mut().write_all(&block[..part as usize])?;
                    rest -= part;
                }
                self.connection.read_exact(&mut [0])?;
            }
            "ping" => {
                for _ in 0..count {
                    self.connection.get_mut().write_all(&[7])?;
                    self.connection.read_exact(&mut [0])?;
                }
            }
            other => bail!("no phase {other:?}"),
        }
        Ok(())
    }

    /// Interrupts of virtio devices that the guest has taken.
    fn interrupts(&mut self) -> Result<u64> {
        self.connection.get_mut().write_all(b"interrupts\n")?;
        read_interrupts(&mut self.connection)
    }

    /// KVM's counts: exits, and exits because a vCPU halted.
    fn counts(&self) -> Result<(u64, u64)> {
        let pid = self.vmm.0.id();
        Ok((measure::exits(pid)?, measure::count(pid, "halt_exits")?))
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("starting ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words:?}: {said}");
    Ok(())
}

/// The guest's /proc/interrupts, which ends with an empty line: the sum of those of virtio devices.
fn read_interrupts(connection: &mut impl BufRead) -> Result<u64> {
    let mut sum = 0;
    loop {
        let mut line = String::new();
        ensure!(connection.read_line(&mut line)? > 0, "the guest closed the connection");
        if line.trim_end().is_empty() {
            return Ok(sum);
        }
        if line.contains("virtio") {
            let counts = line.split_whitespace().skip(1).map_while(|w| w.parse::<u64>().ok());
            sum += counts.sum::<u64>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_is_removed_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let trigger = || fs::read_to_string(dir.path().join("trigger")).unwrap();
        let phase = || -> Result<()> {
            let _histogram = Histogram::start(dir.path())?;
            assert_eq!(trigger(), "hist:keys=exit_reason");
            bail!("the guest closed the connection")
        };
        phase().unwrap_err();
        assert_eq!(trigger(), "!hist:keys=exit_reason");
    }

    #[test]
    fn interrupts_of_virtio_devices_are_summed_and_a_closed_connection_is_an_error() {
        let text = "           CPU0       CPU1\n\
                    24:  3  4  PCI-MSIX-0000:00:01.0  0-edge  virtio0-config\n\
                    25: 10 20  PCI-MSIX-0000:00:01.0  1-edge  virtio0-input.0\n\
                    NMI:  7  7  Non-maskable interrupts\n";
        assert_eq!(read_interrupts(&mut format!("{text}\n").as_bytes()).unwrap(), 37);
        for cut in ["", text] {
            let error = read_interrupts(&mut cut.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("closed the connection"), "{error}");
        }
    }
}
