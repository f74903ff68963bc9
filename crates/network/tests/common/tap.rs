#![allow(unsafe_code)] // the tun driver is set up by ioctl
//! The guest's end of a connection: a tap with virtio-net headers, as on the pod's side.

use std::os::fd::{AsRawFd, OwnedFd};

nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

pub fn open(name: &str) -> OwnedFd {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all-zero bytes are a valid ifreq: integers and arrays of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads one ifreq through the pointer, which outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &request) }.unwrap();
    file.into()
}
