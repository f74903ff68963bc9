//! Image files as loop devices (loop(4)), for the agent of a pod without a VM. With autoclear the
//! kernel frees a device after its last user, even if the agent dies.
#![allow(unsafe_code)] // ioctls without a safe wrapper

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

// uapi/linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_NAME_SIZE: usize = 64;
/// Maximum attempts: another process may take the free device between the two ioctls.
const ATTEMPTS: usize = 32;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LO_NAME_SIZE],
    crypt_name: [u8; LO_NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (Linux 5.8).
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

/// A loop device; freed when this is dropped and it is no longer mounted.
#[derive(Debug)]
pub struct Loop {
    node: PathBuf,
    _held: OwnedFd,
}

impl Loop {
    /// Attaches a file read-only.
    pub fn of(image: &File) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut last = Errno::EBUSY;
        for _ in 0..ATTEMPTS {
            // SAFETY: this request takes no argument and accesses no user memory.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE, 0) };
            let number = Errno::result(number)?;
            let node = PathBuf::from(format!("/dev/loop{number}"));
            let device = OpenOptions::new().read(true).open(&node)?;
            match configure(&device, image) {
                Ok(()) => return Ok(Self { node, _held: device.into() }),
                Err(Errno::EBUSY) => last = Errno::EBUSY,
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.into())
    }

    pub fn node(&self) -> &Path {
        &self.node
    }
}

fn configure(device: &File, image: &File) -> nix::Result<()> {
    let info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
        file_name: [0; LO_NAME_SIZE],
        crypt_name: [0; LO_NAME_SIZE],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = image.as_raw_fd().unsigned_abs();
    let config = Config { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the kernel reads one `struct loop_config`, with the layout of Config (size asserted
    // above), from a variable that outlives the call; both files are borrowed, so they stay open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    Errno::result(result).map(drop)
}
