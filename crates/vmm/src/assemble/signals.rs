//! The signals that end a VM: SIGTERM, SIGINT, SIGHUP. They are blocked and read from a signalfd.

use std::os::fd::OwnedFd;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::error::{AssembleError, os};

fn termination_signals() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set
}

/// Blocks the signals that end a VM, in this thread and in threads started from now on. A caller of
/// [`super::run`] that starts threads before it must call this first.
pub fn block_signals() -> Result<(), AssembleError> {
    termination_signals().thread_block().map_err(os("cannot block signals"))
}

/// Blocks the signals that end a VM and returns a signalfd for them.
pub(super) fn signalfd() -> Result<OwnedFd, AssembleError> {
    block_signals()?;
    let set = termination_signals();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(OwnedFd::from(SignalFd::with_flags(&set, flags).map_err(os("cannot create a signalfd"))?))
}
