//! I/O of the block engine: io_uring ([`Ring`]), or synchronous system calls ([`Direct`]).

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::direct::Direct;
use super::ring::Ring;
use crate::chain::Buffer;

/// One system call.
pub(super) enum Io<'a> {
    Read {
        offset: u64,
        data: &'a Buffer,
    },
    /// `durable`: on stable storage at completion (RWF_DSYNC).
    Write {
        offset: u64,
        data: &'a Buffer,
        durable: bool,
    },
    /// All writes completed before are on stable storage at completion (fdatasync).
    Sync,
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// Writes back and drops the file's pages in the host's page cache (POSIX_FADV_DONTNEED); pages
    /// under writeback stay.
    DropCache,
}

/// A completed [`Io`]: its slot, and the bytes transferred (0 if none are).
pub(super) struct Done {
    pub(super) slot: usize,
    pub(super) result: io::Result<usize>,
}

pub(super) enum Backend {
    Ring(Box<Ring>),
    Direct(Direct),
}

impl Backend {
    /// Uses io_uring if the host allows it. Without it (`ENOSYS`, `EPERM` from a sysctl or a
    /// seccomp filter, `EINVAL` from a kernel before 5.10, whose rings cannot be restricted) every
    /// request blocks the worker while it runs, which is slow under load, so it is logged once.
    pub(super) fn open(file: &Arc<File>, slots: usize) -> Self {
        match Ring::new(file.clone(), slots) {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(error) => {
                tracing::warn!(%error, "io_uring is unavailable; disk requests run one at a time");
                Self::Direct(Direct::new(file.clone()))
            }
        }
    }

    /// Readable after an asynchronous completion; none for synchronous calls.
    pub(super) fn event_fd(&self) -> Option<RawFd> {
        match self {
            Self::Ring(ring) => Some(ring.event_fd()),
            Self::Direct(_) => None,
        }
    }

    /// Starts one; at most `slots` are in flight, each in its own slot.
    pub(super) fn start(&mut self, slot: usize, io: &Io<'_>, mem: &Arc<GuestMemoryMmap>) {
        match self {
            Self::Ring(ring) => ring.start(slot, io, mem),
            Self::Direct(direct) => direct.run(slot, io, mem),
        }
    }

    /// Submits started operations to the kernel. An error is temporary: call again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.submit(),
            Self::Direct(_) => Ok(()),
        }
    }

    /// Whether an operation has completed without an event.
    pub(super) fn has_finished(&self) -> bool {
        match self {
            Self::Ring(_) => false,
            Self::Direct(direct) => !direct.done.is_empty(),
        }
    }

    /// Appends the operations completed since the last call.
    pub(super) fn finished(&mut self, out: &mut Vec<Done>) {
        match self {
            Self::Ring(ring) => ring.finished(out),
            Self::Direct(direct) => out.append(&mut direct.done),
        }
    }
}
