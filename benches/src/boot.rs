//! Cold boot on the same kernel, initramfs and shape, from the VMM's start until the agent in the
//! guest takes a vsock connection; and the same from a VM that was saved at that point. Runs alternate between the VMMs, so a drift of the host hits
//! both.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{measure, table};

/// Of the host's kernel, where each guest with a vhost-vsock device has its own.
static NEXT_CID: AtomicU32 = AtomicU32::new(100);

const AGENT_PORT: u32 = 1024;
const LIMIT: Duration = Duration::from_secs(60);
const SOCKET: &str = "vsock.sock";
const CONTROL: &str = "control.sock";

#[derive(Clone, Copy, PartialEq)]
enum Vmm {
    Nacelle,
    /// The same with a memory device, through which it could have four times the memory later.
    NacelleGrowing,
    /// Continues a VM that was saved when its agent listened.
    NacelleRestored,
    QemuMicrovm,
}

#[derive(Default)]
struct Samples {
    ready_us: Vec<u64>,
    exits: Vec<u64>,
    own_kib: Vec<u64>,
    guest_kib: Vec<u64>,
}

/// Runs the comparison and prints its table.
pub fn run(bin: &Path, guest: &Path, runs: usize, shape: Shape) -> Result<()> {
    let contenders = [
        ("nacelle-vmm", Vmm::Nacelle),
        ("nacelle-vmm, with memory hotplug", Vmm::NacelleGrowing),
        ("nacelle-vmm, from a saved VM", Vmm::NacelleRestored),
        ("QEMU -M microvm", Vmm::QemuMicrovm),
    ];
    let mut samples = contenders.map(|_| Samples::default());
    let saved = tempfile::tempdir()?;
    save(bin, guest, shape, saved.path()).context("saving a VM")?;
    for run in 0..=runs {
        for (at, &(name, vmm)) in contenders.iter().enumerate() {
            let sample = once(vmm, bin, guest, shape, saved.path())
                .with_context(|| format!("{name}, run {run}"))?;
            if run > 0 {
                // The first run of each fills the host's caches and is not counted.
                samples[at].ready_us.push(sample.0);
                samples[at].exits.push(sample.1);
                samples[at].own_kib.push(sample.2);
                samples[at].guest_kib.push(sample.3);
            }
        }
    }
    let base = table::median(&mut samples[contenders.len() - 1].ready_us).max(1);
    let rows = contenders
        .iter()
        .zip(&mut samples)
        .map(|((name, _), s)| {
            let ready = table::median(&mut s.ready_us);
            vec![
                (*name).to_owned(),
                format!("{} ms", ready / 1000),
                format!("{:.2}", ready as f64 / base as f64),
                table::median(&mut s.exits).to_string(),
                format!("{:.1} MiB", table::median(&mut s.own_kib) as f64 / 1024.0),
                format!("{:.1} MiB", table::median(&mut s.guest_kib) as f64 / 1024.0),
            ]
        })
        .collect::<Vec<_>>();
    table::print(
        &format!(
            "Cold boot to a listening agent ({} vCPU, {} MiB, same kernel and initramfs, median \
             of {runs}, alternating)",
            shape.vcpus, shape.memory
        ),
        &["VMM", "ready", "ratio", "KVM exits", "VMM's own PSS", "guest PSS"],
        &rows,
    );
    Ok(())
}

/// Boots one VM; when it became ready (microseconds), its KVM exits, the VMM's own KiB, the guest's.
fn once(
    vmm: Vmm,
    bin: &Path,
    guest: &Path,
    shape: Shape,
    saved: &Path,
) -> Result<(u64, u64, u64, u64)> {
    let mut vm = Vm::start(vmm, bin, guest, shape, saved)?;
    let ready = match vm.until_ready()? {
        End::Ready(ready) => ready,
        other => bail!("{}; output: {}", other.text(), vm.said()),
    };
    let pid = vm.child.id();
    let exits = measure::exits(pid)?;
    let (all, guest_kib) = measure::pss_kib(pid, shape.memory)?;
    Ok((ready.as_micros() as u64, exits, all - guest_kib, guest_kib))
}

/// Boots a VM and saves it in `into`, which is on tmpfs if the host's temporary folder is.
fn save(bin: &Path, guest: &Path, shape: Shape, into: &Path) -> Result<()> {
    let mut vm = Vm::start(Vmm::Nacelle, bin, guest, shape, into)?;
    match vm.until_ready()? {
        End::Ready(_) => {}
        other => bail!("{}; output: {}", other.text(), vm.said()),
    }
    // The connection of `until_ready` closes in the guest.
    std::thread::sleep(Duration::from_millis(500));
    let mut command = Command::new(bin.join("nacelle-vmm"));
    command.arg("save").arg("--control").arg(vm.folder.path().join(CONTROL)).arg(into);
    let output = command.output()?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Boots `boots` VMs of each VMM, `at_once` of them at a time, and counts how they end. The
/// counts of QEMU show which failures have their cause in the host (the emulator of a lab, nested KVM).
pub fn many(bin: &Path, guest: &Path, boots: usize, at_once: usize, shape: Shape) -> Result<()> {
    let mut rows = Vec::new();
    for (name, vmm) in [("nacelle-vmm", Vmm::Nacelle), ("QEMU -M microvm", Vmm::QemuMicrovm)] {
        let next = AtomicUsize::new(0);
        let ends = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once)
                .map(|_| {
                    scope.spawn(|| {
                        let mut ends = Vec::new();
                        while next.fetch_add(1, Ordering::Relaxed) < boots {
                            let mut vm = Vm::start(vmm, bin, guest, shape, Path::new(""))?;
                            let end = vm.until_ready()?;
                            if !matches!(end, End::Ready(_)) {
                                println!("{name}: {}: {}", end.text(), vm.said().trim_end());
                            }
                            ends.push(end);
                        }
                        Ok(ends)
                    })
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a worker does not panic"))
                .collect::<Result<Vec<_>>>()
        })?
        .concat();
        let mut ready: Vec<u64> = ends
            .iter()
            .filter_map(|end| match end {
                End::Ready(after) => Some(after.as_micros() as u64),
                _ => None,
            })
            .collect();
        let count = |wanted: &End| ends.iter().filter(|end| *end == wanted).count().to_string();
        rows.push(vec![
            name.to_owned(),
            ends.len().to_string(),
            ready.len().to_string(),
            count(&End::Ended),
            count(&End::TimedOut),
            format!("{} ms", table::median(&mut ready) / 1000),
        ]);
    }
    table::print(
        &format!(
            "Boots to a listening agent that came up ({} vCPU, {} MiB, {at_once} at a time, one \
             VMM after the other)",
            shape.vcpus, shape.memory
        ),
        &["VMM", "boots", "up", "ended by itself", "timed out", "ready"],
        &rows,
    );
    Ok(())
}

/// Size of a VM.
#[derive(Clone, Copy)]
pub struct Shape {
    pub vcpus: u8,
    /// MiB.
    pub memory: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    /// The agent listened after this time.
    Ready(Duration),
    /// The VMM ended first.
    Ended,
    /// Neither within [`LIMIT`].
    TimedOut,
}

impl End {
    fn text(self) -> String {
        match self {
            Self::Ready(after) => format!("ready after {after:?}"),
            Self::Ended => "the VMM ended by itself".to_owned(),
            Self::TimedOut => format!("no agent within {LIMIT:?}"),
        }
    }
}

struct Vm {
    child: Child,
    begin: Instant,
    vmm: Vmm,
    cid: u32,
    folder: tempfile::TempDir,
}

impl Vm {
    fn start(vmm: Vmm, bin: &Path, guest: &Path, shape: Shape, saved: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let cid = NEXT_CID.fetch_add(1, Ordering::Relaxed);
        let log = File::create(folder.path().join("log"))?;
        let mut command = match vmm {
            Vmm::Nacelle | Vmm::NacelleGrowing | Vmm::NacelleRestored => {
                let mut command = Command::new(bin.join("nacelle-vmm"));
                command
                    .arg("boot")
                    .arg("--kernel")
                    .arg(guest.join("vmlinux"))
                    .arg("--initramfs")
                    .arg(guest.join("initramfs.cpio"))
                    .args(["--vcpus", &shape.vcpus.to_string()])
                    .args(["--memory", &shape.memory.to_string()])
                    .arg("--vsock-path")
                    .arg(folder.path().join(SOCKET))
                    .arg("--control")
                    .arg(folder.path().join(CONTROL));
                if vmm == Vmm::NacelleRestored {
                    command.arg("--restore").arg(saved);
                }
                if vmm == Vmm::NacelleGrowing {
                    command.args(["--max-memory", &(4 * shape.memory).to_string()]);
                }
                command
            }
            Vmm::QemuMicrovm => {
                let initramfs = padded(&guest.join("initramfs.cpio"), folder.path())?;
                let mut command = microvm(guest, &initramfs, shape, "");
                command.args(["-device", &format!("vhost-vsock-pci,guest-cid={cid}")]);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let begin = Instant::now();
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        Ok(Self { child, begin, vmm, cid, folder })
    }

    fn until_ready(&mut self) -> Result<End> {
        while self.begin.elapsed() < LIMIT {
            let ready = match self.vmm {
                Vmm::Nacelle | Vmm::NacelleGrowing | Vmm::NacelleRestored => {
                    hybrid(&self.folder.path().join(SOCKET))
                }
                Vmm::QemuMicrovm => {
                    vsock::VsockStream::connect_with_cid_port(self.cid, AGENT_PORT).is_ok()
                }
            };
            if ready {
                return Ok(End::Ready(self.begin.elapsed()));
            }
            if self.child.try_wait()?.is_some() {
                return Ok(End::Ended);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(End::TimedOut)
    }

    /// Output of the VMM and of the guest's console.
    fn said(&self) -> String {
        let all = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&all[all.len().saturating_sub(4096)..]).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The VMM may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's microvm with a console on its standard streams; `machine` goes on with the machine's options.
pub fn microvm(guest: &Path, initramfs: &Path, shape: Shape, machine: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let fixed = "microvm,accel=kvm,pcie=on,acpi=on,rtc=off,pit=off,pic=off";
    command
        .args(["-M", &format!("{fixed}{machine}")])
        .args(["-cpu", "host", "-nodefaults", "-no-user-config", "-nographic"])
        .args(["-smp", &shape.vcpus.to_string(), "-no-reboot"])
        .args(["-m", &shape.memory.to_string()])
        .arg("-kernel")
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=hvc0 quiet panic=-1 reboot=t tsc=reliable"])
        .args(["-device", "virtio-serial-pci", "-chardev", "stdio,id=c"])
        .args(["-device", "virtconsole,chardev=c"]);
    command
}

/// A copy of an initramfs that QEMU's microvm can load: it puts the end of one into the last page of
/// memory, where its firmware has put the ACPI tables already, some way in. Zeros behind a cpio
/// archive mean nothing.
pub fn padded(initramfs: &Path, folder: &Path) -> Result<PathBuf> {
    const PAGE: u64 = 4096;
    let copy = folder.join("initramfs");
    let size = std::fs::copy(initramfs, &copy).context("copying the initramfs")?;
    File::options().write(true).open(&copy)?.set_len(size.next_multiple_of(PAGE) + 16)?;
    Ok(copy)
}

/// One try through the VMM's unix socket: `CONNECT` is answered only once the guest listens.
fn hybrid(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let limit = Some(Duration::from_millis(500));
    let mut answer = [0; 3];
    stream.set_read_timeout(limit).is_ok()
        && stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer == *b"OK "
}
