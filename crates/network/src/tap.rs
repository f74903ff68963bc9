#![allow(unsafe_code)] // the tun driver is set up by ioctl
//! Tap devices (linux/if_tun.h, Documentation/networking/tuntap.rst). They are made persistent, so
//! that they are there before the VMM is and can be opened again for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Frames bare of a protocol header and led by `struct virtio_net_hdr`, so that checksum and
/// segmentation offloads pass between guest and host untouched.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
pub const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_int!(tun_set_persist, b'T', 203);
nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Opens, and makes if needed, the tap of that name in the calling thread's network namespace.
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

/// The same, and keeps it when closed.
pub fn create(name: &str) -> io::Result<()> {
    let tap = open(name)?;
    // SAFETY: takes its argument by value; the file is open.
    unsafe { tun_set_persist(tap.as_raw_fd(), 1) }?;
    Ok(())
}

fn device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Says in words why taps cannot be made here, if so.
pub fn trouble() -> Option<String> {
    let error = device().err()?;
    Some(match error.kind() {
        _ if !Path::new(DEVICE).exists() => {
            format!("{DEVICE} is missing: load the kernel module tun (modprobe tun)")
        }
        _ => {
            format!("{DEVICE} cannot be opened ({error}): load the kernel module tun, run as root")
        }
    })
}
