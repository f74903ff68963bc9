//! How a block engine reaches its file: through io_uring, or by plain system calls.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::direct::Direct;
use super::ring::Ring;
use crate::chain::Buffer;

/// One system call's worth of work.
pub(super) enum Io<'a> {
    Read {
        offset: u64,
        data: &'a Buffer,
    },
    /// `durable`: on stable storage when it completes.
    Write {
        offset: u64,
        data: &'a Buffer,
        durable: bool,
    },
    /// Everything completed before is on stable storage when it completes.
    Sync,
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// What the host's page cache holds of the file is written and dropped; what is being written
    /// just then stays.
    DropCache,
}

/// A finished [`Io`]: the number it was started under, and bytes moved (0 where none are).
pub(super) struct Done {
    pub(super) slot: usize,
    pub(super) result: io::Result<usize>,
}

pub(super) enum Backend {
    Ring(Box<Ring>),
    Direct(Direct),
}

impl Backend {
    /// io_uring where the host allows it. Without it (`ENOSYS`, `EPERM` from a sysctl or a filter,
    /// `EINVAL` from a kernel before 5.10, whose rings cannot be restricted) every request blocks
    /// the worker while it runs: correct, but slow under load, so it is said once.
    pub(super) fn open(file: &Arc<File>, slots: usize) -> Self {
        match Ring::new(file.clone(), slots) {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(error) => {
                tracing::warn!(%error, "io_uring is unavailable; disk requests run one by one");
                Self::Direct(Direct::new(file.clone()))
            }
        }
    }

    /// Becomes readable when something completes later; nothing does without a ring.
    pub(super) fn event_fd(&self) -> Option<RawFd> {
        match self {
            Self::Ring(ring) => Some(ring.event_fd()),
            Self::Direct(_) => None,
        }
    }

    /// Starts one; at most `slots` are under way at once, each under its own number.
    pub(super) fn start(&mut self, slot: usize, io: &Io<'_>, mem: &Arc<GuestMemoryMmap>) {
        match self {
            Self::Ring(ring) => ring.start(slot, io, mem),
            Self::Direct(direct) => direct.run(slot, io, mem),
        }
    }

    /// Hands what was started to the kernel. An error is passing: call again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.submit(),
            Self::Direct(_) => Ok(()),
        }
    }

    /// Whether something has finished already that no event tells of.
    pub(super) fn has_finished(&self) -> bool {
        match self {
            Self::Ring(_) => false,
            Self::Direct(direct) => !direct.done.is_empty(),
        }
    }

    /// What has finished since the last call.
    pub(super) fn finished(&mut self, out: &mut Vec<Done>) {
        match self {
            Self::Ring(ring) => ring.finished(out),
            Self::Direct(direct) => out.append(&mut direct.done),
        }
    }
}
