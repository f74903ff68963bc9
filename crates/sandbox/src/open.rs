//! Opening: the journal is read, every pod gets its task back, what belongs to nobody is removed.

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
use crate::pod::{self, Begin};
use crate::policy::{Change, ContainerPhase, Effect, Phase, Pod};
use crate::ports::Network;
use crate::registry::Registry;
use crate::rescue::{self, Place};

/// Events kept for receivers that lag; one that lags more loses the oldest.
const EVENTS: usize = 4096;
/// A daemon that was just killed may hold the lock for a moment.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

pub(crate) struct Opened {
    pub(crate) node: Arc<Node>,
    /// While it is held, no other daemon works on the same journal.
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
    let originals = config.scratch_originals();
    for folder in [&config.root, &config.state, &originals] {
        make_folder(folder)?;
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
        scratch: Scratch::new(originals),
        registry: Registry::default(),
        starts: Semaphore::new(config.starts_at_once()),
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
        blocking(move || found.into_iter().filter_map(|found| take_up(&node, found)).collect())
    };
    let loaded: Vec<Pod> = loaded.await;
    remove_strangers(&node);
    for pod in loaded {
        let id = pod.id.clone();
        let (handle, owner) = pod::new(node.clone(), pod, Begin::Recover);
        node.registry.set_handle(&id, handle);
        tokio::spawn(owner);
    }
    Ok(Opened { node, lock })
}

fn check(config: &Config) -> Result<(), Error> {
    let longest = config.state.join("pods").join("0".repeat(config.id_length)).join("control.sock");
    if longest.as_os_str().len() > MAX_PATH {
        return Err(Error::invalid(format!(
            "state folder {} is too long: with a pod's id its sockets exceed {MAX_PATH} bytes",
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

fn make_folder(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
        .map_err(|e| Error::io(format!("make {}", path.display()), e))
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
                    "another nacelled works on {}",
                    path.parent().unwrap_or(path).display()
                )));
            }
        }
    }
}

/// Undoes in the record what a reboot has undone in fact, and ends what cannot end any more.
fn settle(mut pod: Pod, same_boot: bool) -> Pod {
    let at = std::time::SystemTime::now();
    if !same_boot {
        let is_process = |e: &&Effect| matches!(e, Effect::Vmm { .. } | Effect::FileServer { .. });
        let processes: Vec<Effect> = pod.ledger.iter().filter(is_process).cloned().collect();
        let died = Change::VmDied { reason: "the host was rebooted".into(), at };
        let changes = std::iter::once(died).chain(processes.into_iter().map(Change::Undone));
        for change in changes {
            // Neither refuses any state.
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

/// Reserves what a pod of the journal holds. Blocks.
fn take_up(node: &Node, found: Found) -> Option<Pod> {
    let registry = &node.registry;
    match found {
        Found::Empty { id } => {
            let _ = node.journal.remove(&id);
            None
        }
        Found::Unread(unread) => {
            let place = Place {
                cgroup_root: &node.cgroup_root,
                state_dir: node.state_dir(&unread.id),
                folder: node.journal.folder(&unread.id),
                boot_id: &node.boot_id,
            };
            let rescue::Known { pod, uids } = rescue::known(*unread, &place);
            tracing::error!(pod = pod.id, name = pod.spec.meta.name, pod.reason, "unread record");
            registry.enter_pod(&pod.id, &pod.spec.meta, &uids);
            Some(pod)
        }
        Found::Pod { pod, boot_id } => {
            let same_boot = boot_id == node.boot_id;
            let pod = settle(*pod, same_boot);
            // Found out once: when a container has ended must not change with the next start.
            if !same_boot && let Err(error) = node.journal.write(&pod, &node.boot_id) {
                tracing::warn!(pod = pod.id, %error, "what a reboot has ended is not journaled");
            }
            registry.enter_pod(&pod.id, &pod.spec.meta, &[pod.uid]);
            // A creation that was given up has lost its name, perhaps to another one.
            let (present, others): (Vec<_>, Vec<_>) =
                pod.containers.values().partition(|c| c.phase == ContainerPhase::Present);
            for container in present.into_iter().chain(others) {
                let (id, meta) = (&container.id, &container.spec.meta);
                // Names were given once; a limit lowered since then does not take them back.
                let _ = registry.reserve_container(&pod.id, id, meta, usize::MAX);
            }
            // Pods of former releases have none.
            if let Err(error) = node.journal.write_header(&pod) {
                tracing::warn!(pod = pod.id, %error, "header is not written");
            }
            Some(pod)
        }
    }
}

/// What no record knows: sockets of pods, networks.
fn remove_strangers(node: &Arc<Node>) {
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
    // Nobody waits for it: plugins that hang must not keep the daemon from serving.
    tokio::spawn(async move {
        let collected = tokio::select! {
            collected = network.collect(&known) => collected,
            () = shutdown.cancelled() => return,
        };
        if let Err(error) = collected {
            tracing::warn!(%error, "networks of unknown pods could not all be freed");
        }
    });
}
