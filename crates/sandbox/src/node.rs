//! State that all pods of a node share.

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
use crate::template::Templates;

pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) cgroup_root: PathBuf,
    /// Boot id of the host (proc(5), /proc/sys/kernel/random/boot_id).
    pub(crate) boot_id: String,
    pub(crate) network: Arc<dyn Network>,
    pub(crate) launcher: Arc<dyn Launch>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) journal: Journal,
    pub(crate) scratch: Scratch,
    pub(crate) registry: Registry,
    pub(crate) templates: Arc<Templates>,
    pub(crate) watcher: Watcher,
    pub(crate) failpoints: Failpoints,
    /// Limits concurrent starts; a start holds one permit until its agent answers.
    pub(crate) starts: Semaphore,
    /// Lifecycle events for subscribers.
    pub(crate) events: broadcast::Sender<Event>,
    /// Cancelled when the daemon stops; pods keep running.
    pub(crate) shutdown: CancellationToken,
}

impl Node {
    /// Directory of a pod's sockets.
    pub(crate) fn state_dir(&self, pod: &str) -> PathBuf {
        self.config.state.join("pods").join(pod)
    }
}
