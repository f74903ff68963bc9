//! Ioctls of the tap, whose packets have a 12-byte `virtio_net_hdr` each.
#![allow(unsafe_code)] // ioctls of linux/if_tun.h

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::spec::HEADER_LEN;

/// `_IOW('T', 208, unsigned int)`
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// `_IOW('T', 216, int)`
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// Sets O_NONBLOCK and the header length of 12 bytes.
pub(super) fn prepare(tap: &File) -> io::Result<()> {
    let len = HEADER_LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int through its argument, which points to `len`.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(tap, FcntlArg::F_GETFL)?);
    fcntl(tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sets what packets read from the tap may use (TUN_F_*).
pub(super) fn set_offloads(tap: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
