//! What is measured of pods, for an embedder that counts it. The crate keeps no counters itself.

use std::time::Duration;

use crate::error::Error;

/// Receives measurements. It is called on the paths that are measured, so it must not block.
pub trait Observer: std::fmt::Debug + Send + Sync {
    fn measured(&self, measured: Measured<'_>);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measured<'a> {
    /// A phase of a pod's start has ended, successful or not; the name is that of
    /// [`crate::model::TracePhase`].
    StartPhase {
        phase: &'a str,
        took: Duration,
    },
    /// A pod's start has ended.
    Start {
        kind: PodKind,
        outcome: Outcome,
        took: Duration,
    },
    /// From the launch of a VMM until the agent of its guest answers.
    Boot {
        from: StartedFrom,
        outcome: Outcome,
        took: Duration,
    },
    /// A VM was saved as a template, which pauses the start of its pod for this time.
    TemplateSave {
        outcome: Outcome,
        took: Duration,
    },
    /// The VMM of a ready pod exited without a request.
    VmmDeath {
        cause: DeathCause,
    },
    OomKill {
        victim: OomVictim,
    },
    /// A call to an agent; `call` is one of a fixed set of names.
    GuestCall {
        call: &'a str,
        outcome: Outcome,
        took: Duration,
    },
    /// A pod's record and header were written, with their syncs.
    JournalWrite {
        outcome: Outcome,
        took: Duration,
    },
    /// One fsync of a file or directory of the journal.
    JournalSync {
        took: Duration,
    },
}

/// What a guest starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartedFrom {
    /// Its kernel's entry point.
    Kernel,
    /// A saved VM.
    Template,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodKind {
    Vm,
    /// Without a VM.
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Failed,
    TimedOut,
    Cancelled,
}

impl Outcome {
    pub(crate) fn of<T>(result: &Result<T, Error>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(Error::Deadline { .. } | Error::ExecTimeout { .. }) => Self::TimedOut,
            Err(Error::Cancelled { .. }) => Self::Cancelled,
            Err(_) => Self::Failed,
        }
    }
}

/// Why a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeathCause {
    /// The guest powered off.
    Shutdown,
    /// The guest reset itself.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    TripleFault,
    /// The VMM failed.
    Error,
    /// The VMM received a kill request.
    Terminated,
    /// It was killed: it left no status.
    Killed,
    /// The OOM killer of the host ended it.
    OutOfMemory,
    /// The guest stopped answering, and the VMM was killed for that.
    Unresponsive,
    /// The agent of a pod without a VM has ended.
    HostAgent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OomVictim {
    /// The main process of a container, killed in the guest.
    Container,
    /// The VMM, or the agent of a pod without a VM, killed on the host.
    Vmm,
}

/// Receives measurements and does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn measured(&self, _: Measured<'_>) {}
}
