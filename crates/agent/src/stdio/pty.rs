//! Terminals: the slave side is made inside the container (so that its `/dev/pts` knows it), the
//! master side comes here through a Unix socket.
#![allow(unsafe_code)] // TIOCSWINSZ and TIOCGPTPEER have no safe wrapper; a received descriptor is a bare number

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::pty::Winsize;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{Uid, fchown};

use crate::error::{Doing, Error, Result};

mod ioctl {
    nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, nix::pty::Winsize);
}

/// Sets the size of a terminal; 0 by 0 leaves it.
pub fn resize(master: BorrowedFd<'_>, width: u32, height: u32) -> Result<()> {
    if width == 0 || height == 0 {
        return Ok(());
    }
    let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let size = Winsize { ws_row: cells(height), ws_col: cells(width), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one `Winsize` from a pointer that is valid for the call.
    unsafe { ioctl::tiocswinsz(master.as_raw_fd(), &raw const size) }
        .doing(|| format!("set terminal size to {width}x{height}"))?;
    Ok(())
}

/// Gives the terminal to a user, who may then open it again by its name. Its group stays that of
/// terminals. Answers the slave side.
pub fn give(master: BorrowedFd<'_>, uid: u32) -> Result<OwnedFd> {
    let what = || "give the terminal to its user".to_owned();
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let slave = Errno::result(slave).doing(what)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    fchown(&slave, Some(Uid::from_raw(uid)), None).doing(what)?;
    Ok(slave)
}

/// Takes the master side from the socket it was sent to; it was sent before, so nothing is waited
/// for.
pub fn receive(socket: impl AsFd) -> Result<OwnedFd> {
    // The sender names the device in the message's bytes.
    let mut name = [0u8; 64];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut iov, Some(&mut space), flags)
        .doing(|| "receive the terminal".to_owned())?;
    for control in message.cmsgs().doing(|| "receive the terminal".to_owned())? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(Error::Helper { doing: "receive the terminal", why: "no descriptor came".to_owned() })
}
