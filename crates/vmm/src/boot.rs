//! `nacelle-vmm boot`: a VM from paths, for tests, benchmarks and manual use. It opens all files
//! itself, then starts the VM as from a configuration, and prints the console on standard output.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use vmm_api::{
    DiskConfig, Fd, JailConfig, NetConfig, RestoreConfig, VERSION, VmConfig, VsockConfig,
    console_ring,
};

use crate::tap;

/// Interval at which the console is read; it also delays the end of the process.
const FOLLOW: Duration = Duration::from_millis(5);

#[derive(Debug, clap::Args)]
pub struct Options {
    /// ELF vmlinux or bzImage
    #[arg(long)]
    pub kernel: PathBuf,
    #[arg(long)]
    pub initramfs: Option<PathBuf>,
    /// Raw image or block device, `FILE[:ro]`; serials are disk0, disk1, ...; repeatable
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    pub disks: Vec<String>,
    /// Name of a tap to open or create; repeatable
    #[arg(long = "tap", value_name = "NAME")]
    pub taps: Vec<String>,
    #[arg(long, default_value_t = 1)]
    pub vcpus: u8,
    /// vCPUs that the guest may bring online later; default: as --vcpus
    #[arg(long)]
    pub max_vcpus: Option<u8>,
    /// Guest memory, MiB
    #[arg(long, default_value_t = 256)]
    pub memory: u32,
    /// Guest memory that the VM can be resized to later, MiB; default: as --memory
    #[arg(long)]
    pub max_memory: Option<u32>,
    /// Without free page reporting (no balloon device)
    #[arg(long)]
    pub no_balloon: bool,
    /// Appended to the kernel command line
    #[arg(long, default_value = "")]
    pub cmdline: String,
    /// Unix socket for vsock connections to the guest (`CONNECT <port>`)
    #[arg(long)]
    pub vsock_path: Option<PathBuf>,
    #[arg(long, default_value_t = 3)]
    pub vsock_cid: u64,
    /// Path of the control socket; none by default
    #[arg(long)]
    pub control: Option<PathBuf>,
    /// Emulate an 8250 serial port and use it as the kernel's console; slow
    #[arg(long)]
    pub serial: bool,
    /// File for the exit report (JSON)
    #[arg(long)]
    pub status: Option<PathBuf>,
    /// Continue the VM that was saved in this directory (files `state` and `memory`) instead of
    /// booting the kernel; all other options must be those of the saved VM
    #[arg(long, value_name = "DIR")]
    pub restore: Option<PathBuf>,
    /// Enter the jail as this uid and gid
    #[arg(long, value_name = "UID")]
    pub jail: Option<u32>,
    /// Action for system calls that are not allowed
    #[arg(long, value_enum, default_value = "kill")]
    pub seccomp: Seccomp,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Seccomp {
    Kill,
    Log,
    Off,
}

/// Opens all files of the options; returns the configuration and the console ring file.
pub fn open(options: &Options) -> Result<(VmConfig, File)> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.context("cannot open /dev/kvm; see `nacelle-vmm probe`")?;
    let console = memfd("console")?;
    let status = match &options.status {
        Some(path) => {
            let mut file = OpenOptions::new();
            let file = file.read(true).write(true).create(true).truncate(true).open(path);
            file.with_context(|| format!("cannot write {}", path.display()))?
        }
        None => memfd("status")?,
    };
    let vsock = match &options.vsock_path {
        Some(path) => {
            let _ = std::fs::remove_file(path);
            let listener = UnixListener::bind(path);
            let listener = listener.with_context(|| format!("cannot bind {}", path.display()))?;
            let listener = fd(OwnedFd::from(listener));
            Some(VsockConfig { guest_cid: options.vsock_cid, listener })
        }
        None => None,
    };
    let disk = |(n, text): (usize, &String)| -> Result<DiskConfig> {
        let (path, read_only) = text.strip_suffix(":ro").map_or((&**text, false), |p| (p, true));
        let file = File::options().read(true).write(!read_only).open(path);
        let file = file.with_context(|| format!("cannot open disk {path}"))?;
        Ok(DiskConfig { serial: format!("disk{n}"), file: fd(file), read_only })
    };
    let net = |(n, name): (usize, &String)| -> Result<NetConfig> {
        let tap = tap::open(name).with_context(|| format!("cannot open tap {name}"))?;
        // A locally administered address, the same in every run.
        let mac = [0x02, 0x6e, 0x63, 0, 0, n as u8 + 1];
        Ok(NetConfig { id: format!("net{n}"), tap: fd(tap), mac, mtu: 1500 })
    };
    let config = VmConfig {
        version: VERSION,
        name: "boot".to_owned(),
        vcpus: options.vcpus,
        max_vcpus: options.max_vcpus.unwrap_or(options.vcpus),
        memory_mib: options.memory,
        max_memory_mib: options.max_memory.unwrap_or(options.memory),
        free_page_reporting: !options.no_balloon,
        kernel: fd(open_file(&options.kernel)?),
        initramfs: options.initramfs.as_deref().map(open_file).transpose()?.map(fd),
        cmdline: options.cmdline.clone(),
        kvm: fd(kvm),
        control: fd(control(options.control.as_deref())?),
        status: fd(status),
        console: fd(console.try_clone()?),
        log: None,
        vsock,
        disks: options.disks.iter().enumerate().map(disk).collect::<Result<_>>()?,
        nets: options.taps.iter().enumerate().map(net).collect::<Result<_>>()?,
        serial_console: options.serial,
        jail: options.jail.map(|uid| JailConfig { uid, gid: uid }),
        restore: options.restore.as_deref().map(saved).transpose()?,
    };
    Ok((config, console))
}

/// The configuration has file descriptors as numbers.
fn fd(owned: impl Into<OwnedFd>) -> Fd {
    Fd(owned.into().into_raw_fd())
}

fn open_file(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn saved(dir: &Path) -> Result<RestoreConfig> {
    let (state, memory) = (open_file(&dir.join("state"))?, open_file(&dir.join("memory"))?);
    Ok(RestoreConfig { state: fd(state), memory: fd(memory) })
}

fn memfd(name: &str) -> Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

/// A listening control socket; without a path an unnamed one, to which nobody can connect.
fn control(path: Option<&Path>) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let address = match path {
        Some(path) => {
            let _ = std::fs::remove_file(path);
            UnixAddr::new(path)
        }
        None => Ok(UnixAddr::new_unnamed()),
    };
    let shown = path.unwrap_or(Path::new("an unnamed socket")).display();
    bind(listener.as_raw_fd(), &address?).with_context(|| format!("cannot bind {shown}"))?;
    let Ok(backlog) = Backlog::new(16) else { bail!("listen backlog of 16 is invalid") };
    listen(&listener, backlog)?;
    Ok(listener)
}

/// Prints new console output on a thread.
#[derive(Debug)]
pub struct ConsoleFollower {
    done: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl ConsoleFollower {
    pub fn start(console: File) -> io::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let thread = std::thread::Builder::new().name("follower".to_owned()).spawn(move || {
            let mut from = 0;
            loop {
                let last = stop.load(Ordering::Acquire);
                if let Ok((bytes, next)) = console_ring::read(&console, from) {
                    from = next;
                    let mut out = io::stdout().lock();
                    if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
                        return;
                    }
                }
                if last {
                    return;
                }
                std::thread::sleep(FOLLOW);
            }
        })?;
        Ok(Self { done, thread })
    }

    /// Prints the rest and ends the thread.
    pub fn finish(self) {
        self.done.store(true, Ordering::Release);
        let _ = self.thread.join();
    }
}
