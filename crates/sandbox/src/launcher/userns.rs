//! Creates a user namespace without processes: mount_setattr(2) takes one as the id mapping of a
//! mount.
//!
//! Spec: user_namespaces(7). A process must exist in it while the maps are written.
#![allow(unsafe_code)] // clone3 has no safe wrapper

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};

use super::protocol::IdRange;

/// Most ranges in a map; the kernel's limit (user_namespaces(7)).
const RANGES_MAX: usize = 340;

type Failure = (String, io::Error);

pub(super) fn make(uids: &[IdRange], gids: &[IdRange]) -> Result<OwnedFd, Failure> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| (what, e)
    };
    for map in [uids, gids] {
        if map.is_empty() || map.len() > RANGES_MAX {
            let e = io::Error::from_raw_os_error(libc::EINVAL);
            return Err((format!("map of {} ranges", map.len()), e));
        }
    }
    let (wait, go) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|e| ("create a pipe".to_owned(), e.into()))?;
    let pid = clone_waiting(&wait, &go).map_err(failed("clone3 into a user namespace"))?;
    // The process exits when `go` closes, also on an error.
    let write = |name: &str, map: &[IdRange]| {
        let text: String = map
            .iter()
            .map(|IdRange { inside, outside, count }| format!("{inside} {outside} {count}\n"))
            .collect();
        let path = format!("/proc/{pid}/{name}");
        let file = fs::OpenOptions::new().write(true).open(&path);
        // In one write: the kernel accepts only one.
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed(&path))
    };
    write("uid_map", uids)?;
    write("gid_map", gids)?;
    let path = format!("/proc/{pid}/ns/user");
    File::open(&path).map(OwnedFd::from).map_err(failed(&path))
}

/// A process in a new user namespace that exits when the other end of `wait` closes.
fn clone_waiting(wait: &OwnedFd, go: &OwnedFd) -> io::Result<i64> {
    // SAFETY: clone_args is plain old data, for which all zeros is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_NEWUSER as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM the child gets a copy of this process, which has one thread (the
    // contract of `launcher::main`), so no lock is held by a thread that the copy lacks. `args`
    // outlives the call.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let mut byte = 0u8;
            // SAFETY: closes and reads descriptors that the parent's copies of are still open, into
            // a byte of our own; _exit runs nothing of this process' copy.
            unsafe {
                libc::close(go.as_raw_fd());
                libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        pid => Ok(pid),
    }
}
