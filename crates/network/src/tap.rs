#![allow(unsafe_code)] // the tun driver is set up by ioctl
//! Tap devices (linux/if_tun.h, Documentation/networking/tuntap.rst). They are persistent, so they
//! exist before the VMM opens them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Frames without protocol header (IFF_NO_PI) and with `struct virtio_net_hdr`, so that checksum
/// and segmentation offloads are passed between guest and host.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
pub const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_int!(tun_set_persist, b'T', 203);
nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Opens a tap in the thread's network namespace; creates it if it does not exist.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let device = device()?;
    // SAFETY: all-zero bytes are a valid ifreq: integers and arrays of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: the kernel reads one ifreq through the pointer, which outlives the call; the file is
    // open.
    unsafe { tun_set_iff(device.as_raw_fd(), &request) }?;
    Ok(device.into())
}

/// Creates a persistent tap.
pub fn create(name: &str) -> io::Result<()> {
    let tap = open(name)?;
    // SAFETY: takes its argument by value; the file is open.
    unsafe { tun_set_persist(tap.as_raw_fd(), 1) }?;
    Ok(())
}

fn device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// The reason why taps cannot be created, if there is one.
pub fn trouble() -> Option<String> {
    let error = device().err()?;
    Some(match error.kind() {
        _ if !Path::new(DEVICE).exists() => {
            format!("{DEVICE} does not exist: load the kernel module tun (modprobe tun)")
        }
        _ => {
            format!("cannot open {DEVICE} ({error}): load the kernel module tun, run as root")
        }
    })
}
