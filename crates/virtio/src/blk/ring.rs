//! Disk requests through io_uring.
//!
//! From submission to completion the kernel holds pointers into guest memory and to iovec arrays. A
//! slot keeps the arrays and a reference to the memory until its completion was read.
//!
//! The ring is restricted to the operations of disks: io_uring could otherwise open files and
//! sockets, which the seccomp filter of the thread does not see.
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

/// What the kernel may access for one slot.
struct InFlight {
    iovecs: Vec<libc::iovec>,
    _mem: Option<Arc<GuestMemoryMmap>>,
}

// SAFETY: the pointers go to guest memory, which `_mem` keeps mapped and which any thread may
// access; they are never dereferenced here.
unsafe impl Send for InFlight {}

pub(super) struct Ring {
    uring: IoUring,
    event: EventFd,
    file: Arc<File>,
    slots: Vec<Option<InFlight>>,
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

    fn has_in_flight(&self) -> bool {
        self.slots.iter().any(Option::is_some)
    }

    pub(super) fn start(&mut self, slot: usize, io: &Io<'_>, mem: &Arc<GuestMemoryMmap>) {
        debug_assert!(self.slots[slot].is_none());
        let fd = types::Fd(self.file.as_raw_fd());
        let (held, entry) = match io {
            Io::Read { offset, data } => {
                let held = InFlight::new(data, mem);
                let (iovecs, count) = held.array();
                (held, opcode::Readv::new(fd, iovecs, count).offset(*offset).build())
            }
            Io::Write { offset, data, durable } => {
                let held = InFlight::new(data, mem);
                let (iovecs, count) = held.array();
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                let entry = opcode::Writev::new(fd, iovecs, count).offset(*offset);
                (held, entry.rw_flags(flags).build())
            }
            Io::Sync => {
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
                (InFlight::nothing(), entry.build())
            }
            Io::Fallocate { mode, offset, len } => {
                let entry = opcode::Fallocate::new(fd, *len).offset(*offset).mode(*mode);
                (InFlight::nothing(), entry.build())
            }
            Io::DropCache => {
                // Length 0: to the end of the file.
                let entry = opcode::Fadvise::new(fd, 0, libc::POSIX_FADV_DONTNEED);
                (InFlight::nothing(), entry.build())
            }
        };
        self.slots[slot] = Some(held);
        self.push(&entry.user_data(slot as u64));
    }

    fn push(&mut self, entry: &Entry) {
        // SAFETY: the entry's file is `self.file`, open as long as `self`; its pointers are to the
        // slot's iovecs, whose heap storage does not move, and through them to guest memory; the
        // slot keeps both until `finished` has read the completion, or forever (see Drop).
        //
        // The submission queue has as many entries as there are slots, so it is never full.
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

/// Restricts a disabled ring to the operations of [`Ring::start`], and enables it.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::Fadvise::CODE),
        // The only registration left is the one that enables the ring, once.
        Restriction::register_op(REGISTER_ENABLE_RINGS),
    ])?;
    submitter.register_enable_rings()
}

impl InFlight {
    fn new(data: &Buffer, mem: &Arc<GuestMemoryMmap>) -> Self {
        let mut iovecs = Vec::new();
        data.iovecs(mem, data.len(), &mut iovecs);
        // IOV_MAX per operation; the rest is transferred by further ones.
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
    /// Closing a ring does not wait for operations in flight. They may still write to guest memory
    /// after the drain limit has passed, so that memory stays mapped forever.
    fn drop(&mut self) {
        if self.has_in_flight() {
            tracing::error!("disk requests still in flight; their guest memory stays mapped");
            Box::leak(Box::new(std::mem::take(&mut self.slots)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_refuses_operations_that_disks_do_not_need() {
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
        let registered = ring.uring.submitter().register_eventfd(ring.event.as_raw_fd());
        assert_eq!(registered.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
