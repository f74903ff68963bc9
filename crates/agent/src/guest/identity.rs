//! Settings that ConfigurePod applies to the guest: clock, entropy, hostname, sysctls.
#![allow(unsafe_code)] // RNDADDENTROPY and RNDRESEEDCRNG have no safe wrapper

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::error::{Context, Error, Result};

/// Maximum entropy of one request, bytes.
const MAX_ENTROPY: usize = 512;
/// Maximum length of a hostname (__NEW_UTS_LEN).
const MAX_HOSTNAME: usize = 64;
/// Sysctls with the path of a program that the kernel runs as root outside of all containers. All
/// others may be set, as the kernel belongs to the pod.
const FORBIDDEN: [&str; 6] = [
    "kernel.core_pattern",
    "kernel.hotplug",
    "kernel.modprobe",
    "kernel.poweroff_cmd",
    "kernel.usermodehelper",
    "fs.binfmt_misc",
];

pub fn set_clock(unix_time_ns: i64) -> Result<()> {
    if unix_time_ns <= 0 {
        return Ok(());
    }
    let time = TimeSpec::new(unix_time_ns / 1_000_000_000, unix_time_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).context(|| "set the clock".to_owned())
}

/// `struct rand_pool_info` of uapi/linux/random.h.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; MAX_ENTROPY],
}

mod ioctl {
    // _IOW('R', 0x03, int[2]); the bytes follow the two numbers.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    nix::ioctl_write_ptr_bad!(add, RNDADDENTROPY, super::PoolInfo);
    // _IO('R', 0x07)
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    nix::ioctl_none_bad!(reseed, RNDRESEEDCRNG);
}

/// Adds bytes to the kernel's random number generator with full credit; the host is trusted.
pub fn add_entropy(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    if bytes.len() > MAX_ENTROPY {
        return Err(Error::Exhausted { what: "bytes of entropy", limit: MAX_ENTROPY as u64 });
    }
    let mut info = PoolInfo {
        entropy_bits: bytes.len() as i32 * 8,
        size: bytes.len() as i32,
        bytes: [0; MAX_ENTROPY],
    };
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    let what = || "seed the random number generator".to_owned();
    let device = OpenOptions::new().write(true).open("/dev/random").context(what)?;
    // SAFETY: the kernel reads `size` bytes after the two numbers; `size` is at most the array's
    // length, and the struct lives until the call returns.
    unsafe { ioctl::add(device.as_raw_fd(), &raw const info) }.context(what)?;
    // Without a reseed the bytes take effect at the next one, up to a minute later.
    // SAFETY: the call takes no argument.
    match unsafe { ioctl::reseed(device.as_raw_fd()) } {
        // ENODATA: not initialized yet; the kernel seeds when it has enough entropy.
        Ok(_) | Err(nix::errno::Errno::ENODATA) => Ok(()),
        Err(error) => Err(error).context(what),
    }
}

pub fn set_hostname(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    if name.len() > MAX_HOSTNAME || name.contains(['\0', '\n', '/']) {
        return Err(Error::invalid("hostname", format!("{name:?} is not a valid hostname")));
    }
    nix::unistd::sethostname(name).context(|| format!("set hostname {name:?}"))
}

fn sysctl_path(name: &str) -> Result<PathBuf> {
    let bad = |reason: &str| Error::invalid("sysctls", format!("{name:?} {reason}"));
    let dotted = name.replace('/', ".");
    if FORBIDDEN.iter().any(|prefix| dotted.starts_with(prefix)) {
        return Err(bad("would let the kernel run a program outside of the containers"));
    }
    // Both notations of sysctl(8): the first separator decides. With dots, a slash denotes a dot
    // in a name (`net.ipv4.conf.eth0/1.mtu`).
    let slashes = name.find('/').is_some_and(|slash| name.find('.').is_none_or(|dot| slash < dot));
    let path: String = if slashes {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(bad("is malformed"));
    }
    Ok(Path::new("/proc/sys").join(path))
}

pub fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<()> {
    let mut names: Vec<_> = sysctls.iter().collect();
    // Sorted, so that the first failure is deterministic.
    names.sort();
    for (name, value) in names {
        let path = sysctl_path(name)?;
        if !path.exists() {
            return Err(Error::invalid("sysctls", format!("the kernel does not support {name:?}")));
        }
        fs::write(&path, value).context(|| format!("set sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

/// Sysctls with the kernel's default and the value that gives unprivileged processes what root of a
/// container expects.
const UNPRIVILEGED_SYSCTLS: [(&str, &str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "1024", "0"),
    ("net.ipv4.ping_group_range", "1\t0", "0\t2147483647"),
];

/// Opens low ports and ping to all users. Root of the pod's user namespace has no privileges over
/// the pod's network namespace. Values that the pod has set are kept.
pub fn allow_unprivileged_network() -> Result<()> {
    for (name, default, value) in UNPRIVILEGED_SYSCTLS {
        let path = sysctl_path(name)?;
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == default) {
            fs::write(&path, value).context(|| format!("set sysctl {name} to {value:?}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_become_paths_below_proc_sys_only() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net.ipv4.conf.eth0/1.forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ("vm.max_map_count", "/proc/sys/vm/max_map_count"),
            ("kernel.shmmax", "/proc/sys/kernel/shmmax"),
        ] {
            assert_eq!(sysctl_path(name).unwrap(), Path::new(path), "{name}");
        }
        for name in
            ["net/../kernel/core_pattern", "kernel.core_pattern", "kernel/modprobe", "", "net..x"]
        {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
