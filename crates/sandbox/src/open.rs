//! Start of the daemon: reads the journal, starts one owner task per pod, removes what belongs to
//! no pod.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::Error;
use crate::failpoint::Failpoints;
use crate::host::scratch::Scratch;
use crate::host::sockets::MAX_PATH;
use crate::host::watch::Watcher;
use crate::host::{blocking, cgroup, process};
use crate::journal::{Found, Journal};
use crate::launcher::Launch;
use crate::node::Node;
use crate::observe::Observer;
use crate::pod::{self, InitialAction};
use crate::policy::{Change, ContainerPhase, Effect, Phase, Pod};
use crate::ports::Network;
use crate::registry::Registry;
use crate::template::Templates;
use crate::unreadable::{self, NodePaths};

/// Events buffered for slow receivers; a receiver that lags more loses the oldest.
const EVENTS: usize = 4096;
/// A daemon that was just killed may still hold the lock.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

pub(crate) struct Opened {
    pub(crate) node: Arc<Node>,
    /// Prevents another daemon from using the same journal.
    pub(crate) lock: Flock<File>,
}

pub(crate) async fn open(
    config: Config,
    network: Arc<dyn Network>,
    launcher: Arc<dyn Launch>,
    observer: Arc<dyn Observer>,
    failpoints: Failpoints,
) -> Result<Opened, Error> {
    check(&config)?;
    let cgroup_root = cgroup::find_root(&config.cgroup_root)?;
    let templates = config.scratch_templates();
    for directory in [&config.root, &config.state, &templates] {
        make_directory(directory)?;
    }
    let lock = lock(&config.root.join("lock")).await?;
    let pods = config.root.join("pods");
    let failed = |what: &str, path: &Path, e| Error::io(format!("{what} {}", path.display()), e);
    let journal = Journal::open(pods.clone(), observer.clone(), failpoints.clone());
    let journal = journal.map_err(|e| failed("open", &pods, e))?;
    let shutdown = CancellationToken::new();
    let node = Arc::new(Node {
        cgroup_root,
        boot_id: process::boot_id(),
        network,
        launcher,
        observer,
        scratch: Scratch::new(templates),
        registry: Registry::default(),
        templates: Arc::new(Templates::new(config.templates, config.template_max_age())),
        starts: Semaphore::new(config.max_concurrent_starts()),
        events: broadcast::Sender::new(EVENTS),
        watcher: Watcher::start(shutdown.clone()),
        failpoints,
        shutdown,
        journal: journal.clone(),
        config,
    });
    {
        let node = node.clone();
        blocking(move || node.scratch.remove_old()).await;
    }
    let found = {
        let journal = journal.clone();
        blocking(move || journal.load()).await.map_err(|e| failed("read", &pods, e))?
    };
    let loaded = {
        let node = node.clone();
        blocking(move || found.into_iter().filter_map(|found| load_pod(&node, found)).collect())
    };
    let loaded: Vec<Pod> = loaded.await;
    remove_unknown(&node);
    for pod in loaded {
        let id = pod.id.clone();
        let (handle, owner) = pod::new(node.clone(), pod, InitialAction::Recover);
        node.registry.set_handle(&id, handle);
        tokio::spawn(owner);
    }
    Ok(Opened { node, lock })
}

fn check(config: &Config) -> Result<(), Error> {
    let longest = config.state.join("pods").join("0".repeat(config.id_length)).join("control.sock");
    if longest.as_os_str().len() > MAX_PATH {
        return Err(Error::invalid(format!(
            "state directory {} is too long: socket paths would exceed {MAX_PATH} bytes",
            config.state.display()
        )));
    }
    if config.default_vcpus == 0 || config.default_memory_mib == 0 || config.uid_range == 0 {
        return Err(Error::invalid(
            "default_vcpus, default_memory_mib and uid_range must not be 0",
        ));
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
        .map_err(|e| Error::io(format!("create {}", path.display()), e))
}

async fn lock(path: &Path) -> Result<Flock<File>, Error> {
    let until = tokio::time::Instant::now() + LOCK_LIMIT;
    loop {
        let file = File::create(path);
        let file = file.map_err(|e| Error::io(format!("create {}", path.display()), e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::Error::EWOULDBLOCK)) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(_) => {
                return Err(Error::precondition(format!(
                    "{} is locked by another nacelled",
                    path.parent().unwrap_or(path).display()
                )));
            }
        }
    }
}

/// Applies the effects of a reboot to a record, and marks output of ended containers as drained.
fn apply_reboot(mut pod: Pod, same_boot: bool) -> Pod {
    let at = std::time::SystemTime::now();
    if !same_boot {
        let is_process = |e: &&Effect| matches!(e, Effect::Vmm { .. } | Effect::FileServer { .. });
        let processes: Vec<Effect> = pod.ledger.iter().filter(is_process).cloned().collect();
        let died = Change::VmDied { reason: "the host was rebooted".into(), at };
        let changes = std::iter::once(died).chain(processes.into_iter().map(Change::Undone));
        for change in changes {
            // These changes apply in any phase.
            let _ = pod.apply(change);
        }
    }
    if pod.phase != Phase::Ready {
        for container in pod.containers.values_mut() {
            container.drained = true;
        }
    }
    pod
}

/// Registers a pod of the journal with its names and uids. Blocks.
fn load_pod(node: &Node, found: Found) -> Option<Pod> {
    let registry = &node.registry;
    match found {
        Found::Empty { id } => {
            let _ = node.journal.remove(&id);
            None
        }
        Found::Unreadable(unreadable) => {
            let paths = NodePaths {
                cgroup_root: &node.cgroup_root,
                state_dir: node.state_dir(&unreadable.id),
                directory: node.journal.directory(&unreadable.id),
                boot_id: &node.boot_id,
            };
            let unreadable::Reconstructed { pod, uids } =
                unreadable::reconstruct(*unreadable, &paths);
            tracing::error!(
                pod = pod.id,
                name = pod.spec.meta.name,
                pod.reason,
                "unreadable record"
            );
            registry.insert_pod(&pod.id, &pod.spec.meta, &uids);
            Some(pod)
        }
        Found::Pod { pod, boot_id } => {
            let same_boot = boot_id == node.boot_id;
            let pod = apply_reboot(*pod, same_boot);
            // Written once: a container's exit time must not change with the next start.
            if !same_boot && let Err(error) = node.journal.write(&pod, &node.boot_id) {
                tracing::warn!(pod = pod.id, %error, "state after the reboot is not journaled");
            }
            registry.insert_pod(&pod.id, &pod.spec.meta, &[pod.uid]);
            // A cancelled creation has released its name, perhaps to another container.
            let (present, others): (Vec<_>, Vec<_>) =
                pod.containers.values().partition(|c| c.phase == ContainerPhase::Present);
            for container in present.into_iter().chain(others) {
                let (id, meta) = (&container.id, &container.spec.meta);
                // A limit that was lowered later does not apply to existing containers.
                let _ = registry.reserve_container(&pod.id, id, meta, usize::MAX);
            }
            // Pods of earlier releases have no header.
            if let Err(error) = node.journal.write_header(&pod) {
                tracing::warn!(pod = pod.id, %error, "header is not written");
            }
            Some(pod)
        }
    }
}

/// Removes socket directories and networks of pods without a record.
fn remove_unknown(node: &Arc<Node>) {
    let known = node.registry.pod_ids();
    if let Ok(entries) = fs::read_dir(node.config.state.join("pods")) {
        for entry in entries.flatten() {
            let name = entry.file_name();
            if !known.iter().any(|id| name == id.as_str()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    let (network, shutdown) = (node.network.clone(), node.shutdown.clone());
    // Runs in the background: hanging plugins must not block the daemon's start.
    tokio::spawn(async move {
        let collected = tokio::select! {
            collected = network.collect_garbage(&known) => collected,
            () = shutdown.cancelled() => return,
        };
        if let Err(error) = collected {
            tracing::warn!(%error, "cannot free all networks of unknown pods");
        }
    });
}
