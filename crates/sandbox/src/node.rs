//! What all pods of a node share.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::failpoint::Failpoints;
use crate::host::scratch::Scratch;
use crate::host::watch::Watcher;
use crate::journal::Journal;
use crate::launcher::Launch;
use crate::model::Event;
use crate::observe::Observer;
use crate::ports::Network;
use crate::registry::Registry;

pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) cgroup_root: PathBuf,
    /// Of the host.
    pub(crate) boot_id: String,
    pub(crate) network: Arc<dyn Network>,
    pub(crate) launcher: Arc<dyn Launch>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) journal: Journal,
    pub(crate) scratch: Scratch,
    pub(crate) registry: Registry,
    pub(crate) watcher: Watcher,
    pub(crate) failpoints: Failpoints,
    /// Admits starts; a start holds one permit until its guest is up.
    pub(crate) starts: Semaphore,
    /// What has happened to pods and containers, for those who follow.
    pub(crate) events: broadcast::Sender<Event>,
    /// The daemon ends; pods go on.
    pub(crate) shutdown: CancellationToken,
}

impl Node {
    /// Folder of a pod's sockets.
    pub(crate) fn state_dir(&self, pod: &str) -> PathBuf {
        self.config.state.join("pods").join(pod)
    }
}
