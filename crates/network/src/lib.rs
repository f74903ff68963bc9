//! Host side of pod networks: a network namespace for each pod, CNI plugins that configure it (spec
//! versions 0.3.0 to 1.1.0), and taps for the pod's VM.
//!
//! Knows nothing of sandboxes, VMs or the CRI. The API is [`Cni`]; all its calls are idempotent and
//! can be repeated after a crash. A record is on disk before the first plugin runs ([`record`]), so
//! every network can be removed.
//!
//! All work blocks (plugins are processes, namespaces belong to threads), so it runs on tokio's
//! blocking threads and, inside a namespace, on short-lived threads.

mod cidr;
mod config;
mod default;
mod error;
pub mod existing;
mod garbage;
mod host;
mod libcni_cache;
mod model;
mod netns;
mod nic;
pub mod observe;
mod plugin;
mod plugin_lock;
mod pod_locks;
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
pub use default::{DEFAULT_IPV4, DEFAULT_IPV6, SubnetError, default_conflist, host_ipv6};
pub use error::Error;
pub use host::PREFIX;
pub use model::{Attachment, Dns, Interface, Pod, PortMapping, Protocol, Route};
pub use netns::NetnsError;
pub use nic::NicError;
pub use plugin::conf::ConfError;
pub use plugin::error::{PluginError, Verb};
pub use plugin::exec::ExecError;
pub use plugin::params::PodError;
pub use plugin::reply::Failure;
pub use record::RecordError;
pub use rtnl::RtnlError;

use host::Host;

/// Pod networks by CNI plugins. A cheap handle.
///
/// A call whose future is dropped still runs to completion in the background; a later call for the
/// same pod waits for it.
#[derive(Debug, Clone)]
pub struct Cni {
    host: Arc<Host>,
    /// Limits concurrent attaches: each runs several processes.
    attaching: Arc<Semaphore>,
    /// Separate limit for detaches, so that plugins that hang in ADD do not block removals.
    detaching: Arc<Semaphore>,
}

/// Delay before the first retry of a postponed GC; doubles up to the configured interval.
const FIRST_RETRY: Duration = Duration::from_secs(5);

impl Cni {
    pub fn new(config: Config) -> Self {
        Self::observed(config, Arc::new(observe::Unobserved))
    }

    /// [`Self::new`], with an observer of measurements.
    pub fn observed(config: Config, observer: Arc<dyn observe::Observer>) -> Self {
        let permits = || Arc::new(Semaphore::new(config.parallelism()));
        let (attaching, detaching) = (permits(), permits());
        Self { host: Arc::new(Host::new(config, observer)), attaching, detaching }
    }

    /// Path of the pod's network namespace; known before [`Cni::attach`].
    pub fn netns_path(&self, pod: &str) -> PathBuf {
        self.host.netns_path(pod)
    }

    /// Creates the namespace, runs the plugins and creates the taps. Remains of an earlier attach
    /// are removed first; a failed attach is undone.
    pub async fn attach(&self, pod: Pod) -> Result<Attachment, Error> {
        self.attach_unless(pod, std::future::pending()).await
    }

    /// Like [`Cni::attach`], but ends with [`Error::Cancelled`] if `cancelled` resolves before the
    /// plugins run. Plugins that run are waited for.
    pub async fn attach_unless(
        &self,
        pod: Pod,
        cancelled: impl Future<Output = ()> + Send,
    ) -> Result<Attachment, Error> {
        let permit = tokio::select! {
            permit = self.attaching.clone().acquire_owned() => permit,
            () = cancelled => return Err(Error::Cancelled),
        };
        self.without_permit(move |host| {
            // The semaphore is never closed.
            let _permit = permit;
            host.attach(&pod)
        })
        .await
    }

    /// Opens the tap of each interface, by the names in [`Attachment::interfaces`] and in their order.
    pub async fn open_taps(
        &self,
        pod: &str,
        interfaces: Vec<String>,
    ) -> Result<Vec<OwnedFd>, Error> {
        let pod = pod.to_owned();
        self.without_permit(move |host| host.open_taps(&pod, &interfaces)).await
    }

    /// Undoes [`Cni::attach`]; continues after failures and returns all errors. An unknown pod is
    /// success.
    pub async fn detach(&self, pod: &str) -> Result<(), Error> {
        let pod = pod.to_owned();
        self.with_permit(&self.detaching, move |host| host.detach(&pod)).await?;
        if self.host.is_gc_due() {
            let (cni, host) = (self.clone(), self.host.clone());
            // In the background: the removal of the pod is complete.
            let running_gc = spawn_blocking(move || host.gc());
            tokio::spawn(async move {
                let _ = running_gc.await;
                cni.spawn_gc_retry();
            });
        }
        Ok(())
    }

    /// Checks whether the pod's network is still as it was created.
    pub async fn check(&self, pod: &str, attachment: &Attachment) -> Result<(), Error> {
        let (pod, attachment) = (pod.to_owned(), attachment.clone());
        self.with_permit(&self.attaching, move |host| host.check(&pod, &attachment)).await
    }

    /// The reason why pods cannot be attached, as text; None if they can. A host without CNI
    /// configuration is not ready, whether or not the built-in network would work.
    pub async fn trouble(&self) -> Option<String> {
        self.trouble_of(false).await
    }

    /// The same for pods with [`Pod::default_network`].
    pub async fn default_trouble(&self) -> Option<String> {
        self.trouble_of(true).await
    }

    async fn trouble_of(&self, default: bool) -> Option<String> {
        match self.without_permit(move |host| Ok(host.trouble(default))).await {
            Ok(trouble) => trouble,
            Err(e) => Some(e.to_string()),
        }
    }

    /// Whether the host has a CNI configuration, valid or not.
    pub async fn is_configured(&self) -> bool {
        self.without_permit(|host| Ok(host.is_configured())).await.unwrap_or(true)
    }

    /// Descriptions of damaged records, as text.
    pub async fn damaged(&self) -> Vec<String> {
        match self.without_permit(|host| Ok(host.damaged())).await {
            Ok(damaged) => damaged,
            Err(e) => vec![e.to_string()],
        }
    }

    /// Removes networks of pods that are neither in `known` nor attached through this handle. The
    /// plugins' GC may run later if pods are being attached or detached.
    pub async fn collect(&self, known: &[String]) -> Result<(), Error> {
        let known = known.to_vec();
        // Without a permit: a hanging plugin must not take one from pods.
        let collected = self.without_permit(move |host| host.collect(&known)).await;
        self.spawn_gc_retry();
        collected
    }

    /// Starts a task that retries a postponed GC, if necessary. It ends with the last handle.
    fn spawn_gc_retry(&self) {
        if !self.host.plugin_lock.begin_retry() {
            return;
        }
        let host: Weak<Host> = Arc::downgrade(&self.host);
        let longest = self.host.plugin_lock.interval().max(FIRST_RETRY);
        tokio::spawn(async move {
            let mut pause = FIRST_RETRY;
            loop {
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 2);
                let Some(host) = host.upgrade() else { return };
                let running_gc = host.clone();
                let _ = spawn_blocking(move || running_gc.gc()).await;
                if host.plugin_lock.end_retry() {
                    return;
                }
            }
        });
    }

    async fn with_permit<T: Send + 'static>(
        &self,
        permits: &Arc<Semaphore>,
        work: impl FnOnce(&Host) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = permits.clone().acquire_owned().await;
        self.without_permit(move |host| {
            // The semaphore is never closed.
            let _permit = permit;
            work(host)
        })
        .await
    }

    /// Runs without a permit: for short calls, and those that must not wait for attaches.
    async fn without_permit<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Host) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let host = self.host.clone();
        spawn_blocking(move || work(&host)).await?
    }
}
