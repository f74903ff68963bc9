//! Disk requests by synchronous system calls: each is complete when `run` returns.
#![allow(unsafe_code)] // preadv, pwritev, fallocate, posix_fadvise; iovecs over guest memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::backend::{Done, Io};
use crate::chain::Buffer;

pub(super) struct Direct {
    file: Arc<File>,
    iovecs: Vec<libc::iovec>,
    pub(super) done: Vec<Done>,
    /// Errors for the next calls, last first, which then do nothing.
    #[cfg(test)]
    pub(super) faults: Vec<i32>,
    /// Counts [`Io::DropCache`].
    #[cfg(test)]
    pub(super) drops: Arc<std::sync::atomic::AtomicU32>,
}

// SAFETY: `iovecs` is a buffer that is cleared before each use; its pointers are not used after
// `run`.
unsafe impl Send for Direct {}

impl Direct {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self {
            file,
            iovecs: Vec::new(),
            done: Vec::new(),
            #[cfg(test)]
            faults: Vec::new(),
            #[cfg(test)]
            drops: Arc::default(),
        }
    }

    pub(super) fn run(&mut self, slot: usize, io: &Io<'_>, mem: &GuestMemoryMmap) {
        #[cfg(test)]
        if let Some(errno) = self.faults.pop() {
            let result = Err(io::Error::from_raw_os_error(errno));
            return self.done.push(Done { slot, result });
        }
        let fd = self.file.as_raw_fd();
        let result = match io {
            Io::Read { offset, data } => {
                let (iovecs, count) = self.array(data, mem);
                // SAFETY: the iovecs point into guest memory that `mem` keeps mapped during the
                // call.
                check(unsafe { libc::preadv(fd, iovecs, count, *offset as libc::off_t) })
            }
            Io::Write { offset, data, durable } => {
                let (iovecs, count) = self.array(data, mem);
                let offset = *offset as libc::off_t;
                // SAFETY: as for preadv.
                let written = check(unsafe { libc::pwritev(fd, iovecs, count, offset) });
                match written {
                    Ok(_) if *durable => self.file.sync_data().and(written),
                    written => written,
                }
            }
            Io::Sync => self.file.sync_data().map(|()| 0),
            Io::Fallocate { mode, offset, len } => {
                let (offset, len) = (*offset as libc::off_t, *len as libc::off_t);
                // SAFETY: takes no pointers.
                check(unsafe { libc::fallocate(fd, *mode, offset, len) } as libc::ssize_t)
            }
            Io::DropCache => {
                #[cfg(test)]
                self.drops.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                // SAFETY: takes no pointers.
                match unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) } {
                    0 => Ok(0),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            }
        };
        self.done.push(Done { slot, result });
    }

    fn array(&mut self, data: &Buffer, mem: &GuestMemoryMmap) -> (*const libc::iovec, libc::c_int) {
        self.iovecs.clear();
        data.iovecs(mem, data.len(), &mut self.iovecs);
        let count = self.iovecs.len().min(libc::UIO_MAXIOV as usize);
        (self.iovecs.as_ptr(), count as libc::c_int)
    }
}

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
