//! A container's output: read from the guest, sent to attached clients, written to the log.

mod format;
mod pump;
mod writer;

pub(crate) use pump::{LogHandle, LogPaths, Source, resume, start};
pub(crate) use writer::LogWriter;
