//! What the life cycle needs from the rest of the house, as traits, so that it can be tested with
//! fakes and has never heard of CNI.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;

use tokio_util::sync::CancellationToken;

use crate::model::{PodId, PodSpec};

/// One interface of a pod, as the guest has to set it up.
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

/// A pod's network as it stands on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    pub netns: PathBuf,
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    pub addresses: Vec<IpAddr>,
    pub dns: crate::model::Dns,
}

/// An error of a port. Its text includes the causes; it has no source, because whoever prints an
/// error with its causes would print them twice.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct PortError(pub anyhow::Error);

/// Host side of pod networks.
///
/// All calls are idempotent and may be repeated after a crash of the caller: `attach` after a
/// half-done `attach` starts by undoing it; `detach` of something unknown succeeds.
#[async_trait]
pub trait Network: Send + Sync {
    /// Path at which the netns of a pod will stand; known before `attach` so that it can be
    /// journaled first.
    fn netns_path(&self, pod: &PodId) -> PathBuf;
    /// Makes the netns, attaches it to the networks, makes the taps.
    /// `cancel` ends the wait for other pods' attachments. An attachment that has begun runs to its
    /// end: a CNI plugin that is still running would race with its own undoing.
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
    /// Undoes `attach`, goes on past failures and reports them all.
    async fn detach(&self, pod: &PodId, spec: &PodSpec) -> Result<(), PortError>;
    /// What keeps pods from being attached, for people; none: all is well.
    async fn trouble(&self) -> Option<String>;
    /// Records that cannot be read, each with the reason, for people.
    async fn damaged(&self) -> Vec<String> {
        Vec::new()
    }
    /// Frees what belongs to no pod in `known` and was not attached by this process. Runs beside
    /// other calls, and may take long.
    async fn collect(&self, known: &[PodId]) -> Result<(), PortError>;
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
