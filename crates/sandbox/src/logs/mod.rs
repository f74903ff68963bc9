//! A container's output: read from the guest, shown to whoever is attached, written to the log.

mod format;
mod pump;
mod writer;

pub(crate) use pump::{LogHandle, Place, Source, resume, start};
pub(crate) use writer::LogWriter;
