//! The door of the crate: one method a verb.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;

use crate::config::Config;
use crate::error::Error;
use crate::model::{
    ContainerId, ContainerSpec, ContainerView, ExecOutput, ExecSpec, Filter, PodId, PodSpec,
    PodView, TracePhase,
};
use crate::ports::Network;
use crate::session::{AttachSession, ExecSession};
use crate::stats::{ContainerStatsView, PodStatsView};

/// All pods and containers of a node. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes {
    _inner: Arc<PathBuf>,
}

fn absent<T>() -> Result<T, Error> {
    Err(Error::unavailable("the life cycle is not wired up yet"))
}

impl Sandboxes {
    /// Reads the journal, starts one task a pod, and returns; re-attachment to running VMs and the
    /// end of half-done work go on in those tasks.
    pub async fn open(config: Config, network: Arc<dyn Network>) -> Result<Self, Error> {
        let _ = network;
        Ok(Self { _inner: Arc::new(config.root) })
    }

    pub async fn run_pod(&self, _spec: PodSpec) -> Result<PodId, Error> {
        absent()
    }

    /// Ends every container and the VM, frees the network. Idempotent.
    pub async fn stop_pod(&self, _id: &str) -> Result<(), Error> {
        absent()
    }

    /// Stops if need be and forgets the pod with its containers. An unknown id is no error.
    pub async fn remove_pod(&self, _id: &str) -> Result<(), Error> {
        absent()
    }

    /// By id or an unambiguous beginning of it.
    pub fn pod(&self, _id: &str) -> Result<PodView, Error> {
        absent()
    }

    pub fn pods(&self, _filter: &Filter) -> Vec<PodView> {
        Vec::new()
    }

    pub async fn create_container(
        &self,
        _pod: &str,
        _spec: ContainerSpec,
    ) -> Result<ContainerId, Error> {
        absent()
    }

    pub async fn start_container(&self, _id: &str) -> Result<(), Error> {
        absent()
    }

    /// Asks with the container's stop signal, kills after `grace`. Idempotent.
    pub async fn stop_container(&self, _id: &str, _grace: Duration) -> Result<(), Error> {
        absent()
    }

    /// Kills what still runs. An unknown id is no error.
    pub async fn remove_container(&self, _id: &str) -> Result<(), Error> {
        absent()
    }

    pub fn container(&self, _id: &str) -> Result<ContainerView, Error> {
        absent()
    }

    pub fn containers(&self, _filter: &Filter) -> Vec<ContainerView> {
        Vec::new()
    }

    pub async fn update_container(
        &self,
        _id: &str,
        _resources: LinuxResources,
    ) -> Result<(), Error> {
        absent()
    }

    pub async fn exec(&self, _id: &str, _spec: ExecSpec) -> Result<ExecSession, Error> {
        absent()
    }

    /// Runs a command to its end. Of each stream at most `output_limit` bytes are kept; the rest is
    /// read and thrown away. A command that outlives `timeout` is killed: [`Error::ExecTimeout`].
    pub async fn exec_sync(
        &self,
        _id: &str,
        _spec: ExecSpec,
        _timeout: Option<Duration>,
        _output_limit: usize,
    ) -> Result<ExecOutput, Error> {
        absent()
    }

    pub async fn attach(&self, _id: &str) -> Result<AttachSession, Error> {
        absent()
    }

    /// Goes on writing the log at its path, in a new file if the old one has been renamed.
    pub async fn reopen_log(&self, _id: &str) -> Result<(), Error> {
        absent()
    }

    /// From a cache; a pod that has never been measured is measured now, with a short deadline.
    pub async fn pod_stats(&self, _id: &str) -> Result<PodStatsView, Error> {
        absent()
    }

    pub async fn container_stats(&self, _id: &str) -> Result<ContainerStatsView, Error> {
        absent()
    }

    /// Phases of the pod's start.
    pub fn trace(&self, _pod: &str) -> Result<Vec<TracePhase>, Error> {
        absent()
    }

    /// The guest's console from position `from` on, and the position to go on from.
    pub fn console(&self, _pod: &str, _from: u64) -> Result<(Vec<u8>, u64), Error> {
        absent()
    }

    /// Ends our tasks; pods keep running and are found again by the next [`Self::open`].
    pub async fn shutdown(&self) {}
}
