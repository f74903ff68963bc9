//! What the owner task of a pod receives.

use std::time::SystemTime;

use oci_spec::runtime::LinuxResources;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::model::{ContainerId, PodResources};
use crate::observe::DeathCause;
use crate::policy::{Change, Container};
use crate::reservation::Reservation;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Request {
    Stop(Reply<()>),
    Remove(Reply<()>),
    CreateContainer { container: Box<Container>, reserved: Reservation, reply: Reply<()> },
    StartContainer { id: ContainerId, reply: Reply<()> },
    RemoveContainer { id: ContainerId, reply: Reply<()> },
    UpdateContainer { id: ContainerId, resources: Box<LinuxResources>, reply: Reply<()> },
    UpdatePod { change: PodResources, reply: Reply<()> },
}

pub(crate) enum Msg {
    Request(Request),
    Commit {
        changes: Vec<Change>,
        reply: Reply<()>,
    },
    /// The VMM has exited; its output was read as far as available.
    VmmEnded {
        cause: ExitCause,
    },
    /// The guest did not answer its pings.
    GuestUnresponsive,
}

/// Why a VMM, or the agent of a host pod, ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExitCause {
    pub(crate) reason: String,
    pub(crate) cause: DeathCause,
}

impl ExitCause {
    pub(super) fn change(self, at: SystemTime) -> Change {
        let Self { reason, cause } = self;
        match cause {
            DeathCause::OutOfMemory => Change::OutOfMemory { reason, at },
            _ => Change::VmDied { reason, at },
        }
    }
}
