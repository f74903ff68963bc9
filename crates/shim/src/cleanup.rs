//! `delete`: containerd runs it when a shim does not respond. The resources of the pod are in the
//! sandbox's journal; they are removed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox::Sandboxes;
use sandbox::model::Filter;

use crate::args::Arguments;
use crate::events::timestamp;
use crate::network::ExistingNetns;
use crate::paths::PodPaths;
use crate::settings::Settings;
use crate::spec::{self, ContainerType};
use crate::{paths, rootfs};

/// 128 + SIGKILL.
const EXIT_STATUS_KILLED: u32 = 137;
/// Time for the guest to shut down; short, as containerd limits `delete` to a few seconds.
const SHUTDOWN_DEADLINE_MS: u64 = 300;

/// containerd kills `delete` after 5 s (1.6: `cleanupTimeout`). The cleanup continues in the background.
const CLEANUP_WAIT: Duration = Duration::from_secs(1);
/// Time for the shim to die or for another cleanup to end.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of dead pods that one shim cleans up.
const MAX_SWEEP: usize = 4;
/// Time for the cleanup of one dead pod until the next one is cleaned up.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a cleanup's errors that are reported.
const MAX_ERROR: usize = 4096;
/// Maximum size of the settings, bytes.
const MAX_SETTINGS: u64 = 1 << 20;
/// Time for a shim to exit after Shutdown: it sends its events and removes its pod.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(3);

pub(crate) fn delete(arguments: &Arguments) -> Result<()> {
    let bundle = arguments.bundle()?;
    // config.json may be missing, e.g. after a failed start: the task is then treated as a pod's.
    let pod_of_container = spec::read(&bundle)
        .and_then(|spec| spec::container_type(&spec))
        .ok()
        .and_then(|kind| match kind {
            ContainerType::PodContainer { pod } if pod != arguments.id => Some(pod),
            _ => None,
        });
    let settings = Settings::of_task(&bundle, pod_of_container.as_deref())?;
    let pod = pod_of_container.as_ref().unwrap_or(&arguments.id);
    let paths = PodPaths::new(&settings, &arguments.namespace, pod);
    // A lazy unmount: the file server may still use it.
    let unmounted = rootfs::unmount(&rootfs::rootfs_path(&bundle));
    let cleaned = match (&pod_of_container, paths.is_alive()) {
        // The pod keeps running; its shim manages the container.
        (Some(_), true) => Ok(()),
        (None, alive) => {
            // containerd also runs `delete` after Shutdown.
            let ended = alive && paths.shutdown_marker().exists() && wait_for_shim_exit(&paths);
            let pid = paths.shim_pid().and_then(|pid| i32::try_from(pid).ok());
            if let Some(pid) = pid.filter(|_| alive && !ended) {
                // The shim hangs.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            run(&settings, &paths.key, CLEANUP_WAIT).map(drop)
        }
        (Some(_), false) => run(&settings, &paths.key, CLEANUP_WAIT).map(drop),
    };
    let response = DeleteResponse {
        exit_status: EXIT_STATUS_KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?)?;
    cleaned.and(unmounted)
}

/// Waits for a shim to exit after Shutdown.
fn wait_for_shim_exit(paths: &PodPaths) -> bool {
    let begin = Instant::now();
    while paths.shim_pid().is_some() {
        if begin.elapsed() > SHUTDOWN_WAIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Runs `cleanup` for the pod with this key in a separate process, with the pod's settings as standard
/// input. False if it takes longer than `limit`: it continues in the background.
pub(crate) fn run(settings: &Settings, key: &str, limit: Duration) -> Result<bool> {
    // Not a pipe: nobody reads what a cleanup in the background writes.
    let errors = memfd_create(c"errors", MFdFlags::MFD_CLOEXEC).context("creating a memfd")?;
    let errors = File::from(errors);
    let program = std::env::current_exe().context("locating the shim's executable")?;
    let mut child = Command::new(program)
        .args(["-id", key, "cleanup"])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(errors.try_clone().context("passing the memfd")?)
        .process_group(0)
        .spawn()
        .context("starting the cleanup")?;
    let input = child.stdin.take().context("the cleanup has no standard input")?;
    serde_json::to_writer(input, settings).context("sending the settings to the cleanup")?;
    let begin = Instant::now();
    while begin.elapsed() < limit {
        if let Some(status) = child.try_wait().context("waiting for the cleanup")? {
            let mut text = vec![0; MAX_ERROR];
            let length = errors.read_at(&mut text, 0).unwrap_or_default();
            let text = String::from_utf8_lossy(&text[..length]);
            ensure!(
                status.success(),
                "the cleanup of pod {key} failed ({status}): {}",
                text.trim()
            );
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(false)
}

/// Removes pods without a shim, one after the other. Called once by the shim of each pod.
pub(crate) fn sweep(settings: &Settings) {
    let mut dead = PodPaths::dead_pods(settings);
    if !dead.is_empty() {
        // Pods whose cleanup always fails must not keep the others from theirs.
        let first = std::process::id() as usize % dead.len();
        dead.rotate_left(first);
    }
    for key in dead.into_iter().take(MAX_SWEEP) {
        match run(&settings.of_former_pod(&key), &key, SWEEP_TIMEOUT) {
            Ok(true) => tracing::info!(key, "a pod without a shim was removed"),
            Ok(false) => {
                tracing::warn!(key, limit = ?SWEEP_TIMEOUT, "removing a pod without a shim takes long");
            }
            Err(error) => tracing::warn!(
                key,
                error = format!("{error:#}"),
                "removing a pod without a shim failed"
            ),
        }
    }
}

/// Stops the pod's VM and removes all resources listed in the journal. Reads the settings from standard
/// input.
pub(crate) fn cleanup(arguments: &Arguments) -> Result<()> {
    let key = arguments.id.clone();
    ensure!(paths::is_key(&key), "{key:?} is not the key of a pod");
    let input = std::io::stdin().take(MAX_SETTINGS);
    let settings: Settings = serde_json::from_reader(input).context("reading the settings")?;
    let paths = PodPaths::from_key(&settings, key);
    // Also waits for another cleanup, which leaves nothing to do.
    let lock = paths.create_and_lock(LOCK_TIMEOUT)?;
    remove_locked(&settings, &paths)?;
    drop(lock);
    Ok(())
}

/// The cleanup of a pod whose lock the caller holds. Its root directory is removed with the lock.
fn remove_locked(settings: &Settings, paths: &PodPaths) -> Result<()> {
    if paths.root.join("pods").is_dir() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(remove_pods(settings, paths))?;
        runtime.shutdown_background();
    }
    paths.remove_all()
}

async fn remove_pods(settings: &Settings, paths: &PodPaths) -> Result<()> {
    paths.create_dirs()?;
    let mut config = settings.sandbox_config(paths, paths.allocate_uid()?);
    config.shutdown_deadline_ms = SHUTDOWN_DEADLINE_MS;
    let sandboxes =
        Sandboxes::open(config, Arc::new(ExistingNetns)).await.context("reading the journal")?;
    // A pod whose start did not complete is not listed; its owner task removes it.
    let ids: Vec<String> = std::iter::once(paths.key.clone())
        .chain(sandboxes.pods(&Filter::default()).into_iter().map(|pod| pod.id))
        .collect();
    for id in ids {
        sandboxes.remove_pod(&id).await.with_context(|| format!("removing pod {id}"))?;
    }
    sandboxes.shutdown().await;
    Ok(())
}
