//! Host side of pod networks: a network namespace a pod, CNI plugins that connect it (spec versions
//! 0.3.0 to 1.1.0), and taps that lead from there into the pod's VM.
//!
//! Has never heard of sandboxes, VMs or the CRI. The entry is [`Cni`]; all its calls are idempotent
//! and may be repeated after a crash of the caller. What a pod was given is on disk before the
//! first plugin runs ([`record`]), so nothing is ever leaked for good.
//!
//! Everything blocks (plugins are processes, namespaces belong to threads), so all of it happens on
//! tokio's blocking threads and, inside a namespace, on threads that end with the job.

mod alone;
mod cidr;
mod config;
mod default;
pub mod existing;
mod garbage;
mod host;
mod model;
mod netns;
mod nic;
mod peers;
mod plugin;
mod record;
mod rtnl;
mod tap;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

pub use config::Config;
pub use default::{DEFAULT_IPV4, DEFAULT_IPV6, SubnetError, default_conflist};
pub use host::{Error, PREFIX};
pub use model::{Attachment, Dns, Interface, Pod, PortMapping, Protocol, Route};
pub use netns::NetnsError;
pub use nic::NicError;
pub use plugin::chain::{PluginError, Verb};
pub use plugin::conf::ConfError;
pub use plugin::exec::ExecError;
pub use plugin::params::PodError;
pub use plugin::reply::Failure;
pub use record::RecordError;
pub use rtnl::RtnlError;

use host::Host;

/// Pod networks made by CNI plugins. A cheap handle.
///
/// A call whose future is dropped goes on to its end in the background, and a later call for the
/// same pod waits for it: giving up never leaves half a network unseen.
#[derive(Debug, Clone)]
pub struct Cni {
    host: Arc<Host>,
    /// Each start of a pod runs several processes; hundreds at once would only slow each other.
    attaching: Arc<Semaphore>,
    /// Apart from the above: plugins that hang at ADD must not keep pods from being removed.
    detaching: Arc<Semaphore>,
}

/// First pause before a GC that was put off is tried again; doubles up to the configured interval.
const FIRST_RETRY: Duration = Duration::from_secs(5);

impl Cni {
    pub fn new(config: Config) -> Self {
        let permits = || Arc::new(Semaphore::new(config.parallelism()));
        let (attaching, detaching) = (permits(), permits());
        Self { host: Arc::new(Host::new(config)), attaching, detaching }
    }

    /// Where the pod's network namespace will be mounted; known before [`Cni::attach`].
    pub fn netns_path(&self, pod: &str) -> PathBuf {
        self.host.netns_path(pod)
    }

    /// Makes the namespace, runs the plugins, makes the taps. Whatever an earlier attach of this pod
    /// left is taken away first; after a failure nothing is left.
    pub async fn attach(&self, pod: Pod) -> Result<Attachment, Error> {
        self.work(&self.attaching, move |host| host.attach(&pod)).await
    }

    /// Opens the tap of each interface, in the order of [`Attachment::interfaces`].
    pub async fn open_taps(
        &self,
        pod: &str,
        attachment: &Attachment,
    ) -> Result<Vec<OwnedFd>, Error> {
        let (pod, attachment) = (pod.to_owned(), attachment.clone());
        self.at_once(move |host| host.open_taps(&pod, &attachment)).await
    }

    /// Undoes [`Cni::attach`]; goes on past failures and reports them all. An unknown pod is fine.
    pub async fn detach(&self, pod: &str) -> Result<(), Error> {
        let pod = pod.to_owned();
        self.work(&self.detaching, move |host| host.detach(&pod)).await?;
        if self.host.is_sweep_due() {
            let (cni, host) = (self.clone(), self.host.clone());
            // Nobody waits for it: a removal is done when the pod's own things are gone.
            let sweeping = spawn_blocking(move || host.sweep());
            tokio::spawn(async move {
                let _ = sweeping.await;
                cni.retry_later();
            });
        }
        Ok(())
    }

    /// Whether the pod's network still stands as it was made.
    pub async fn check(&self, pod: &str, attachment: &Attachment) -> Result<(), Error> {
        let (pod, attachment) = (pod.to_owned(), attachment.clone());
        self.work(&self.attaching, move |host| host.check(&pod, &attachment)).await
    }

    /// What keeps pods from being attached, for people; none: all is well.
    pub async fn trouble(&self) -> Option<String> {
        match self.at_once(|host| Ok(host.trouble())).await {
            Ok(trouble) => trouble,
            Err(e) => Some(e.to_string()),
        }
    }

    /// Records that cannot be read, for people.
    pub async fn damaged(&self) -> Vec<String> {
        match self.at_once(|host| Ok(host.damaged())).await {
            Ok(damaged) => damaged,
            Err(e) => vec![e.to_string()],
        }
    }

    /// Frees what belongs to no pod in `known` and was not attached through this handle. The
    /// plugins' own GC may come later, when pods are being attached or detached now.
    pub async fn collect(&self, known: &[String]) -> Result<(), Error> {
        let known = known.to_vec();
        // Without a permit: a plugin that hangs here must not take one from the pods.
        let collected = self.at_once(move |host| host.collect(&known)).await;
        self.retry_later();
        collected
    }

    /// Sees to a GC that was put off. Ends with the last handle.
    fn retry_later(&self) {
        if !self.host.turns.begin_retry() {
            return;
        }
        let host: Weak<Host> = Arc::downgrade(&self.host);
        let longest = self.host.turns.interval().max(FIRST_RETRY);
        tokio::spawn(async move {
            let mut pause = FIRST_RETRY;
            loop {
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 2);
                let Some(host) = host.upgrade() else { return };
                let sweeping = host.clone();
                let _ = spawn_blocking(move || sweeping.sweep()).await;
                if host.turns.end_retry() {
                    return;
                }
            }
        });
    }

    async fn work<T: Send + 'static>(
        &self,
        permits: &Arc<Semaphore>,
        work: impl FnOnce(&Host) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = permits.clone().acquire_owned().await;
        self.at_once(move |host| {
            // The semaphore is never closed; without a turn the work would still be right.
            let _turn = turn;
            work(host)
        })
        .await
    }

    /// For what is quick, or must not wait behind a storm of starts.
    async fn at_once<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Host) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let host = self.host.clone();
        spawn_blocking(move || work(&host)).await.unwrap_or(Err(Error::Panicked))
    }
}
