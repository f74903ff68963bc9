//! Terminals: libcontainer creates the pair in the container's devpts; the agent receives the
//! master over a Unix socket (SCM_RIGHTS).
#![allow(unsafe_code)] // TIOCSWINSZ and TIOCGPTPEER have no safe wrapper; a received descriptor is a raw number

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::pty::Winsize;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{Uid, fchown};

use crate::error::{Context, Error, Result};

mod ioctl {
    nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, nix::pty::Winsize);
}

/// Sets the terminal size in cells; no change if one is 0.
pub fn resize(master: BorrowedFd<'_>, width: u32, height: u32) -> Result<()> {
    if width == 0 || height == 0 {
        return Ok(());
    }
    let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let size = Winsize { ws_row: cells(height), ws_col: cells(width), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one `Winsize` from a pointer that is valid for the call.
    unsafe { ioctl::tiocswinsz(master.as_raw_fd(), &raw const size) }
        .context(|| format!("set terminal size to {width}x{height}"))?;
    Ok(())
}

/// Sets the owner of the terminal, so that the user may reopen it by name. The group stays `tty`.
/// Returns the slave side.
pub fn set_owner(master: BorrowedFd<'_>, uid: u32) -> Result<OwnedFd> {
    let what = || "chown the terminal".to_owned();
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let slave = Errno::result(slave).context(what)?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    fchown(&slave, Some(Uid::from_raw(uid)), None).context(what)?;
    Ok(slave)
}

/// Receives the master side. The helper has already sent it, so this does not wait.
pub fn receive(socket: impl AsFd) -> Result<OwnedFd> {
    // The message holds the device name.
    let mut name = [0u8; 64];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut iov, Some(&mut space), flags)
        .context(|| "receive the terminal".to_owned())?;
    for control in message.cmsgs().context(|| "receive the terminal".to_owned())? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(Error::Helper {
        operation: "receive the terminal",
        reason: "no descriptor received".to_owned(),
    })
}
