//! Boot of PID 1: mounts, a root that pivot_root(2) can leave, limits, loopback.
//!
//! The kernel unpacks the initramfs into `rootfs`, which pivot_root(2) refuses to leave, but
//! containers need it. So an empty tmpfs is moved over `/`. The agent's binary stays in the
//! initramfs below, reachable by `/proc/self/exe` only, without a copy in memory.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::modules;
use crate::error::{Context, Result};
use crate::oci::cgroup;

/// Major and minor of the null device, in case devtmpfs cannot be mounted.
const NULL: (u64, u64) = (1, 3);

struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
    /// The kernel must know the options in `data`.
    required: bool,
}

const fn nosuid_nodev_noexec() -> MsFlags {
    MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC)
}

/// In mount order, each with its use.
const MOUNTS: [Mount; 6] = [
    // Processes, sysctls, /proc/self/exe for the helpers.
    Mount {
        source: "proc",
        target: "/proc",
        kind: "proc",
        flags: nosuid_nodev_noexec(),
        data: "",
        required: true,
    },
    // Disks by serial, PCI rescan and remove.
    Mount {
        source: "sysfs",
        target: "/sys",
        kind: "sysfs",
        flags: nosuid_nodev_noexec(),
        data: "",
        required: true,
    },
    // Device nodes of disks.
    Mount {
        source: "devtmpfs",
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0755",
        required: true,
    },
    // Terminals without a container's own devpts.
    Mount {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,gid=5,ptmxmode=0666",
        required: true,
    },
    // Each container and each exec is moved to its cgroup. `favordynmods`: without it, the first move
    // after a pause waits for an RCU grace period (cgroup-v2.rst; Linux 6.0).
    Mount {
        source: "cgroup2",
        target: cgroup::MOUNT,
        kind: "cgroup2",
        flags: nosuid_nodev_noexec(),
        data: "favordynmods",
        required: false,
    },
    // The pod's message queues; the IPC namespace is the guest's.
    Mount {
        source: "mqueue",
        target: "/dev/mqueue",
        kind: "mqueue",
        flags: nosuid_nodev_noexec(),
        data: "",
        required: true,
    },
];

fn apply(mount_: &Mount) -> Result<()> {
    let what = || format!("mount {} on {}", mount_.kind, mount_.target);
    fs::create_dir_all(mount_.target).context(what)?;
    let with = |data| {
        mount(Some(mount_.source), mount_.target, Some(mount_.kind), mount_.flags, Some(data))
    };
    match with(mount_.data) {
        // An older kernel does not know the options, without which everything works as well.
        Err(Errno::EINVAL) if !mount_.required => with(""),
        mounted => mounted,
    }
    .context(what)
}

/// Mounts an empty tmpfs as `/`.
fn switch_root() -> Result<()> {
    let what = || "switch to the tmpfs root".to_owned();
    let new = "/newroot";
    fs::create_dir_all(new).context(what)?;
    // Holds OCI bundles only; volumes and images are mounts of their own.
    mount(
        Some("root"),
        new,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755,size=64m"),
    )
    .context(what)?;
    nix::unistd::chdir(new).context(what)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context(what)?;
    nix::unistd::chroot(".").context(what)?;
    nix::unistd::chdir("/").context(what)
}

/// Opens `/dev/console` as standard streams, for an initramfs without that node, where the kernel
/// could not.
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

/// Resource limits that containers inherit unless their spec sets them. The kernel's defaults
/// depend on the VM's memory or are too low.
fn limits() -> Result<()> {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let what = || "set resource limits".to_owned();
    // The soft limit is one for which programs that close every possible descriptor stay fast.
    setrlimit(Resource::RLIMIT_NOFILE, 65536, 1 << 20).context(what)?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).context(what)?;
    setrlimit(Resource::RLIMIT_SIGPENDING, RLIM_INFINITY, RLIM_INFINITY).context(what)
}

/// Boots. Continues after errors and returns them: a guest that reports an error is more useful
/// than a kernel panic.
pub fn run() -> Vec<crate::error::Error> {
    let mut errors = modules::load_all();
    modules::delete_files();
    // First, so that no mount has to be moved.
    errors.extend(switch_root().err());
    errors.extend(MOUNTS.iter().filter_map(|mount| apply(mount).err()));
    if !Path::new("/dev/null").exists() {
        let mode = Mode::from_bits_truncate(0o666);
        let _ = mknod("/dev/null", SFlag::S_IFCHR, mode, makedev(NULL.0, NULL.1));
    }
    console();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    crate::log::install(parameter(&cmdline, "nacelle.log").as_deref());
    for dir in ["/run", "/tmp", "/dev/shm"] {
        errors.extend(fs::create_dir_all(dir).context(|| format!("create {dir}")).err());
    }
    errors.extend(super::network::loopback_up().err());
    errors.extend(crate::oci::apparmor::mount_securityfs().err());
    // The maximum: each container has its own pids limit.
    let _ = fs::write("/proc/sys/kernel/pid_max", "4194304");
    errors.extend(limits().err());
    // Mounting, unmounting and namespaces wait for RCU grace periods, of some 30 ms each with 100 ticks
    // a second; expedited, the waiting call asks the busy CPUs itself (RCU/whatisRCU.rst).
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    if parameter(&cmdline, "nacelle.log").is_none() {
        // Containers can cause kernel messages (one per OOM kill), and each costs a dozen VM exits.
        // Panics and oopses are printed at any level.
        let _ = fs::write("/proc/sys/kernel/printk", "2");
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_parameter_wins() {
        let line = "console=hvc0 nacelle.log=info quiet nacelle.log=debug\n";
        assert_eq!(parameter(line, "nacelle.log").as_deref(), Some("debug"));
        assert_eq!(parameter(line, "quiet"), None);
    }
}
