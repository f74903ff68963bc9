//! Opens a tap by name (Linux `Documentation/networking/tuntap.rst`), for [`crate::boot`] only: the
//! daemon passes open taps.
#![allow(unsafe_code)] // TUNSETIFF has no safe wrapper

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Opens the tap `name` with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; creates it if it does not exist.
pub fn open(name: &str) -> io::Result<File> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "interface names have 1 to 15 bytes",
        ));
    }
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // `struct ifreq`: name, flags; 40 bytes in all.
    let mut request = [0u8; 40];
    request[..bytes.len()].copy_from_slice(bytes);
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads and writes one `struct ifreq`, and the array has its size.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}
