//! Disk requests through io_uring.
//!
//! The kernel holds pointers into guest memory, and to arrays of such pointers, from submission to
//! completion. This module owns both for just as long: a slot keeps the arrays and a handle on the
//! memory until its completion has been seen.
//!
//! A ring does what disks need and nothing else: it could open files and sockets behind the back of
//! the filter on the thread that uses it.
#![allow(unsafe_code)] // submission entries with pointers

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Done, Io};
use crate::chain::Buffer;

/// `IORING_REGISTER_ENABLE_RINGS`, linux/io_uring.h.
const REGISTER_ENABLE_RINGS: u8 = 12;

/// What the kernel may be pointing to.
struct Held {
    iovecs: Vec<libc::iovec>,
    _mem: Option<Arc<GuestMemoryMmap>>,
}

// SAFETY: the pointers go to guest memory, which `_mem` keeps mapped and which any thread may
// access; they are never dereferenced here.
unsafe impl Send for Held {}

pub(super) struct Ring {
    uring: IoUring,
    event: EventFd,
    file: Arc<File>,
    slots: Vec<Option<Held>>,
}

impl Ring {
    pub(super) fn new(file: Arc<File>, slots: usize) -> io::Result<Self> {
        let uring: IoUring = IoUring::builder().setup_r_disabled().build(slots as u32)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        uring.submitter().register_eventfd(event.as_raw_fd())?;
        restrict(&uring)?;
        let slots = std::iter::repeat_with(|| None).take(slots).collect();
        Ok(Self { uring, event, file, slots })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn in_flight(&self) -> bool {
        self.slots.iter().any(Option::is_some)
    }

    pub(super) fn start(&mut self, slot: usize, io: &Io<'_>, mem: &Arc<GuestMemoryMmap>) {
        debug_assert!(self.slots[slot].is_none());
        let fd = types::Fd(self.file.as_raw_fd());
        let (held, entry) = match io {
            Io::Read { offset, data } => {
                let held = Held::new(data, mem);
                let (iovecs, count) = held.array();
                (held, opcode::Readv::new(fd, iovecs, count).offset(*offset).build())
            }
            Io::Write { offset, data, durable } => {
                let held = Held::new(data, mem);
                let (iovecs, count) = held.array();
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                let entry = opcode::Writev::new(fd, iovecs, count).offset(*offset);
                (held, entry.rw_flags(flags).build())
            }
            Io::Sync => {
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
                (Held::nothing(), entry.build())
            }
            Io::Fallocate { mode, offset, len } => {
                let entry = opcode::Fallocate::new(fd, *len).offset(*offset).mode(*mode);
                (Held::nothing(), entry.build())
            }
            Io::DropCache => {
                // Length 0: to the end.
                let entry = opcode::Fadvise::new(fd, 0, libc::POSIX_FADV_DONTNEED);
                (Held::nothing(), entry.build())
            }
        };
        self.slots[slot] = Some(held);
        self.push(&entry.user_data(slot as u64));
    }

    fn push(&mut self, entry: &Entry) {
        // SAFETY: the entry's file is `self.file`, open as long as `self`; its pointers are to the
        // slot's iovecs, whose heap storage does not move, and through them to guest memory; the
        // slot keeps both until `finished` has seen the completion, or for ever (see Drop).
        //
        // The submission queue has as many entries as there are slots, so it has room.
        if unsafe { self.uring.submission().push(entry) }.is_err() {
            unreachable!("more requests in flight than slots");
        }
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub(super) fn finished(&mut self, out: &mut Vec<Done>) {
        let _ = self.event.read();
        for completion in self.uring.completion() {
            let slot = completion.user_data() as usize;
            self.slots[slot] = None;
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            out.push(Done { slot, result });
        }
    }
}

/// Lets a ring that has not been enabled yet do what [`Ring::start`] asks for, and enables it.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::Fadvise::CODE),
        // A ring is enabled once; nothing can be registered after that.
        Restriction::register_op(REGISTER_ENABLE_RINGS),
    ])?;
    submitter.register_enable_rings()
}

impl Held {
    fn new(data: &Buffer, mem: &Arc<GuestMemoryMmap>) -> Self {
        let mut iovecs = Vec::new();
        data.iovecs(mem, data.len(), &mut iovecs);
        // The kernel takes no more at once; the rest is moved by a second request.
        iovecs.truncate(libc::UIO_MAXIOV as usize);
        Self { iovecs, _mem: Some(mem.clone()) }
    }

    fn nothing() -> Self {
        Self { iovecs: Vec::new(), _mem: None }
    }

    fn array(&self) -> (*const libc::iovec, u32) {
        (self.iovecs.as_ptr(), self.iovecs.len() as u32)
    }
}

impl Drop for Ring {
    /// Closing a ring does not wait for what is in flight. A disk that has not answered for the
    /// whole drain limit may still write to guest memory, so that memory stays mapped for ever.
    fn drop(&mut self) {
        if self.in_flight() {
            tracing::error!("disk requests still in flight; their guest memory stays mapped");
            Box::leak(Box::new(std::mem::take(&mut self.slots)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_does_nothing_but_what_disks_need() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let Ok(mut ring) = Ring::new(file, 4) else {
            println!("SKIP: no io_uring on this host: the ring was not tested");
            return;
        };
        ring.push(&opcode::Nop::new().build());
        ring.uring.submit_and_wait(1).unwrap();
        let mut done = Vec::new();
        ring.finished(&mut done);
        let error = done.pop().unwrap().result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        let mem = Arc::new(GuestMemoryMmap::new());
        ring.start(1, &Io::DropCache, &mem);
        ring.submit().unwrap();
        while done.is_empty() {
            ring.finished(&mut done);
        }
        assert!(matches!(done[0], Done { slot: 1, result: Ok(0) }));
        let again = ring.uring.submitter().register_eventfd(ring.event.as_raw_fd());
        assert_eq!(again.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
