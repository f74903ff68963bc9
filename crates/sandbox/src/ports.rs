//! Interfaces to other crates, as traits: tests use fakes, and this crate does not depend on CNI.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;

use tokio_util::sync::CancellationToken;

use crate::model::{PodId, PodSpec};

/// One network interface, as the guest configures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// e.g. `eth0`.
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// CIDR notation, both families.
    pub addresses: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// CIDR; empty: default route.
    pub destination: String,
    /// Empty: on link.
    pub gateway: String,
    pub interface: String,
}

/// A pod's network on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    pub netns: PathBuf,
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    pub addresses: Vec<IpAddr>,
    pub dns: crate::model::Dns,
}

/// An error of a port. Its text includes all causes. It has no source, because printing an error
/// with its causes would repeat them.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct PortError(pub anyhow::Error);

#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
struct Cancelled;

impl PortError {
    /// The call was cancelled and had no effect.
    pub fn cancelled() -> Self {
        Self(Cancelled.into())
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.is::<Cancelled>()
    }
}

/// Host side of pod networks.
///
/// All calls are idempotent and may be repeated after a crash of the caller: `attach` after an
/// incomplete `attach` first undoes it; `detach` of an unknown pod succeeds.
#[async_trait]
pub trait Network: Send + Sync {
    /// Path of the pod's network namespace; known before `attach` so that the journal records it
    /// first.
    fn netns_path(&self, pod: &PodId) -> PathBuf;
    /// Creates the network namespace, attaches it to the networks, creates the taps. `cancel` ends
    /// the wait for other pods' attachments, with [`PortError::cancelled`]. An attachment that has
    /// started completes: a CNI plugin that still runs would race with its own undo.
    async fn attach(
        &self,
        pod: &PodId,
        spec: &PodSpec,
        cancel: &CancellationToken,
    ) -> Result<Attachment, PortError>;
    /// Opens the tap of each interface, in the order of [`Attachment::interfaces`].
    async fn open_taps(
        &self,
        pod: &PodId,
        attachment: &Attachment,
    ) -> Result<Vec<OwnedFd>, PortError>;
    /// Undoes `attach`; continues after failures and reports them all.
    async fn detach(&self, pod: &PodId, spec: &PodSpec) -> Result<(), PortError>;
    /// Why pods cannot be attached, for the node condition; None if they can.
    async fn not_ready_reason(&self) -> Option<String>;
    /// Unreadable records, each with the reason.
    async fn damaged_records(&self) -> Vec<String> {
        Vec::new()
    }
    /// Frees networks of pods that are not in `known` and were not attached by this process. Runs
    /// concurrently with other calls; may take long.
    async fn collect_garbage(&self, known: &[PodId]) -> Result<(), PortError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_causes_of_a_port_error_are_printed_once() {
        let cause = anyhow::anyhow!("no such file").context("plugin bridge");
        let outer = anyhow::Error::new(PortError(cause)).context("network");
        assert_eq!(format!("{outer:#}"), "network: plugin bridge: no such file");
    }
}
