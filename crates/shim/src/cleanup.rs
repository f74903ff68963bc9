//! `delete`: containerd runs it when a shim does not respond. The resources of the pod are in the
//! sandbox's journal; they are removed.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
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
/// Maximum number of dead pods that one `start` cleans up.
const MAX_SWEEP: usize = 4;
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
            run_cleanup(&settings, &paths)
        }
        (Some(_), false) => run_cleanup(&settings, &paths),
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

/// Runs the cleanup in a separate process and waits for it as long as containerd allows.
fn run_cleanup(settings: &Settings, paths: &PodPaths) -> Result<()> {
    let mut child = spawn_cleanup(settings, &paths.key)?;
    let begin = Instant::now();
    while begin.elapsed() < CLEANUP_WAIT {
        if let Some(status) = child.try_wait().context("waiting for the cleanup")? {
            ensure!(status.success(), "the cleanup of {} failed ({status})", paths.root.display());
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Starts `cleanup` for the pod with this key, with the pod's settings as standard input.
fn spawn_cleanup(settings: &Settings, key: &str) -> Result<Child> {
    let program = std::env::current_exe().context("locating the shim's executable")?;
    let mut child = Command::new(program)
        .args(["-id", key, "cleanup"])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting the cleanup")?;
    let input = child.stdin.take().context("the cleanup has no standard input")?;
    serde_json::to_writer(input, settings).context("sending the settings to the cleanup")?;
    Ok(child)
}

/// Starts the cleanup of pods without a shim; does not wait. Called by `start` of each pod.
pub(crate) fn sweep(settings: &Settings) -> Result<()> {
    let mut dead = PodPaths::dead_pods(settings);
    if !dead.is_empty() {
        // Pods whose cleanup always fails must not keep the others from theirs.
        let first = std::process::id() as usize % dead.len();
        dead.rotate_left(first);
    }
    for key in dead.into_iter().take(MAX_SWEEP) {
        let saved = Settings::read_saved(&PodPaths::from_key(settings, key.clone()).settings());
        // They name the directory in which they were found, or they are of another pod.
        let saved = saved.filter(|saved| saved.root == settings.root);
        spawn_cleanup(saved.as_ref().unwrap_or(settings), &key)?;
    }
    Ok(())
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
pub(crate) fn remove_locked(settings: &Settings, paths: &PodPaths) -> Result<()> {
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
