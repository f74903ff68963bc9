//! Cold boot on the same kernel, initramfs and shape, from the VMM's start until the agent in the
//! guest takes a vsock connection. Runs alternate between the VMMs, so a drift of the host hits
//! both.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{measure, table};

const AGENT_PORT: u32 = 1024;
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq)]
enum Vmm {
    Nacelle,
    /// The same with a memory device, through which it could have four times the memory later.
    NacelleGrowing,
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
pub fn run(bin: &Path, guest: &Path, runs: usize, vcpus: u8, memory: u32) -> Result<()> {
    let contenders = [
        ("nacelle-vmm", Vmm::Nacelle),
        ("nacelle-vmm, room to grow", Vmm::NacelleGrowing),
        ("QEMU -M microvm", Vmm::QemuMicrovm),
    ];
    let mut samples = [Samples::default(), Samples::default(), Samples::default()];
    for run in 0..=runs {
        for (at, &(name, vmm)) in contenders.iter().enumerate() {
            let sample = once(vmm, bin, guest, vcpus, memory, run)
                .with_context(|| format!("{name}, run {run}"))?;
            if run > 0 {
                // The first run of each warms the host's caches and does not count.
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
            "Cold boot to a listening agent ({vcpus} vCPU, {memory} MiB, same kernel and \
             initramfs, median of {runs}, alternating)"
        ),
        &["VMM", "ready", "ratio", "KVM exits", "VMM's own PSS", "guest PSS"],
        &rows,
    );
    Ok(())
}

fn once(
    vmm: Vmm,
    bin: &Path,
    guest: &Path,
    vcpus: u8,
    memory: u32,
    run: usize,
) -> Result<(u64, u64, u64, u64)> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock.sock");
    let cid = 100 + run as u32;
    let log = File::create(folder.path().join("log"))?;
    let mut command = match vmm {
        Vmm::Nacelle | Vmm::NacelleGrowing => {
            let mut command = Command::new(bin.join("nacelle-vmm"));
            command
                .arg("boot")
                .arg("--kernel")
                .arg(guest.join("vmlinux"))
                .arg("--initramfs")
                .arg(guest.join("initramfs.cpio"))
                .args(["--vcpus", &vcpus.to_string(), "--memory", &memory.to_string()])
                .arg("--vsock-path")
                .arg(&socket);
            if vmm == Vmm::NacelleGrowing {
                command.args(["--max-memory", &(4 * memory).to_string()]);
            }
            command
        }
        Vmm::QemuMicrovm => {
            let mut command = Command::new("qemu-system-x86_64");
            command
                .args(["-M", "microvm,accel=kvm,pcie=on,acpi=on,rtc=off,pit=off,pic=off"])
                .args(["-cpu", "host", "-nodefaults", "-no-user-config", "-nographic"])
                .args(["-smp", &vcpus.to_string(), "-m", &memory.to_string()])
                .arg("-kernel")
                .arg(guest.join("vmlinux"))
                .arg("-initrd")
                .arg(guest.join("initramfs.cpio"))
                .args(["-append", "console=hvc0 quiet panic=-1 reboot=t tsc=reliable"])
                .args(["-device", "virtio-serial-pci", "-chardev", "null,id=c"])
                .args(["-device", "virtconsole,chardev=c"])
                .args(["-device", &format!("vhost-vsock-pci,guest-cid={cid}")]);
            command
        }
    };
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let begin = Instant::now();
    let child = Running(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let ready = match vmm {
        Vmm::Nacelle | Vmm::NacelleGrowing => until(begin, || hybrid(&socket)),
        Vmm::QemuMicrovm => {
            until(begin, || vsock::VsockStream::connect_with_cid_port(cid, AGENT_PORT).is_ok())
        }
    };
    let Some(ready) = ready else {
        let said = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        bail!("no agent within {LIMIT:?}; it said: {said}");
    };
    let pid = child.0.id();
    let exits = measure::exits(pid)?;
    let (all, guest_kib) = measure::pss_kib(pid, memory)?;
    Ok((ready.as_micros() as u64, exits, all - guest_kib, guest_kib))
}

fn until(begin: Instant, mut ready: impl FnMut() -> bool) -> Option<Duration> {
    while begin.elapsed() < LIMIT {
        if ready() {
            return Some(begin.elapsed());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
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

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // A VMM that has ended already is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
