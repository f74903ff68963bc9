//! The first milliseconds of PID 1: mounts, a root that can be pivoted away from, loopback.
//!
//! The kernel unpacks the initramfs into `rootfs`, which pivot_root(2) refuses to leave; containers
//! need it. So an empty tmpfs is moved over `/`. The agent's own file stays below, where nothing
//! but `/proc/self/exe` reaches it: no copy, no second exec, no memory.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::modules;
use crate::error::{Doing, Result};
use crate::oci::cgroup;

/// Device node of the null device, wanted before devtmpfs is there.
const NULL: (u64, u64) = (1, 3);

struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const fn quiet() -> MsFlags {
    MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC)
}

/// In this order; the reason each is there.
const MOUNTS: [Mount; 6] = [
    // Processes, sysctls, /proc/self/exe for the helpers.
    Mount { source: "proc", target: "/proc", kind: "proc", flags: quiet(), data: "" },
    // Disks by serial, PCI rescan and removal.
    Mount { source: "sysfs", target: "/sys", kind: "sysfs", flags: quiet(), data: "" },
    // Nodes of disks; the kernel fills it.
    Mount {
        source: "devtmpfs",
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0755",
    },
    // Terminals opened before a container has its own devpts.
    Mount {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,gid=5,ptmxmode=0666",
    },
    Mount { source: "cgroup2", target: cgroup::MOUNT, kind: "cgroup2", flags: quiet(), data: "" },
    // The pod's message queues; the IPC namespace is the guest's.
    Mount { source: "mqueue", target: "/dev/mqueue", kind: "mqueue", flags: quiet(), data: "" },
];

fn apply(mount_: &Mount) -> Result<()> {
    let what = || format!("mount {} on {}", mount_.kind, mount_.target);
    fs::create_dir_all(mount_.target).doing(what)?;
    mount(Some(mount_.source), mount_.target, Some(mount_.kind), mount_.flags, Some(mount_.data))
        .doing(what)
}

/// An empty tmpfs becomes `/`.
fn switch_root() -> Result<()> {
    let what = || "switch to a root that can be left".to_owned();
    let new = "/newroot";
    fs::create_dir_all(new).doing(what)?;
    // Sizes are those of what the agent writes: specifications, volumes get mounts of their own.
    mount(
        Some("root"),
        new,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755,size=64m"),
    )
    .doing(what)?;
    nix::unistd::chdir(new).doing(what)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).doing(what)?;
    nix::unistd::chroot(".").doing(what)?;
    nix::unistd::chdir("/").doing(what)
}

/// Standard streams on the console. The kernel opens `/dev/console` of the initramfs for PID 1 if
/// it is there; this is for initramfs images without that node.
fn console() {
    use std::os::fd::AsFd;
    let Ok(console) = fs::OpenOptions::new().read(true).write(true).open("/dev/console") else {
        return;
    };
    let console = console.as_fd();
    let _ = nix::unistd::dup2_stdin(console);
    let _ = nix::unistd::dup2_stdout(console);
    let _ = nix::unistd::dup2_stderr(console);
}

/// Value of `name=` on the kernel's command line.
fn parameter(cmdline: &str, name: &str) -> Option<String> {
    cmdline
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value.to_owned())
        .next_back()
}

/// What containers inherit unless their specifications say otherwise. The kernel's own are sized by
/// the VM's memory, or date from when 1024 files were many.
fn limits() -> Result<()> {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let what = || "set resource limits".to_owned();
    // The soft limit stays where programs that close every possible file are still quick.
    setrlimit(Resource::RLIMIT_NOFILE, 65536, 1 << 20).doing(what)?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).doing(what)?;
    setrlimit(Resource::RLIMIT_SIGPENDING, RLIM_INFINITY, RLIM_INFINITY).doing(what)
}

/// All of it. Errors are told on the console; the caller goes on, as a guest that answers with an
/// error is worth more than a panic.
pub fn run() -> Vec<crate::error::Error> {
    let mut errors = modules::load_all();
    modules::forget();
    // Everything is mounted in the new root, so nothing has to be moved.
    errors.extend(switch_root().err());
    errors.extend(MOUNTS.iter().filter_map(|mount| apply(mount).err()));
    if !Path::new("/dev/null").exists() {
        let mode = Mode::from_bits_truncate(0o666);
        let _ = mknod("/dev/null", SFlag::S_IFCHR, mode, makedev(NULL.0, NULL.1));
    }
    console();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    crate::log::install(parameter(&cmdline, "nacelle.log").as_deref());
    for folder in ["/run", "/tmp", "/dev/shm"] {
        errors.extend(fs::create_dir_all(folder).doing(|| format!("make {folder}")).err());
    }
    errors.extend(super::network::loopback_up().err());
    errors.extend(crate::oci::apparmor::set_up().err());
    // Every container may have as many processes and files as its own limits allow.
    let _ = fs::write("/proc/sys/kernel/pid_max", "4194304");
    errors.extend(limits().err());
    if parameter(&cmdline, "nacelle.log").is_none() {
        // Containers can provoke kernel messages (each OOM kill is one), and each costs a dozen VM
        // exits. A panic or an oops is printed whatever this says.
        let _ = fs::write("/proc/sys/kernel/printk", "2");
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_parameter_counts() {
        let line = "console=hvc0 nacelle.log=info quiet nacelle.log=debug\n";
        assert_eq!(parameter(line, "nacelle.log").as_deref(), Some("debug"));
        assert_eq!(parameter(line, "quiet"), None);
    }
}
