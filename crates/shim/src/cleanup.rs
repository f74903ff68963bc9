//! `delete`: containerd runs it when a shim does not respond. The resources of the pod are in the
//! sandbox's journal; they are removed.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
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
/// Time for a shim to exit after Shutdown: it sends its events and removes its pod.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(3);

pub(crate) fn delete(arguments: &Arguments) -> Result<()> {
    let settings = Settings::load()?;
    let bundle = arguments.bundle()?;
    // config.json may be missing, e.g. after a failed start: the task is then treated as a pod's.
    let pod_of_container = spec::read(&bundle)
        .and_then(|spec| spec::container_type(&spec))
        .ok()
        .and_then(|kind| match kind {
            ContainerType::PodContainer { pod } if pod != arguments.id => Some(pod),
            _ => None,
        });
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
            spawn_cleanup(arguments, pod)
        }
        (Some(_), false) => spawn_cleanup(arguments, pod),
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
fn spawn_cleanup(arguments: &Arguments, pod: &str) -> Result<()> {
    let program = std::env::current_exe().context("locating the shim's executable")?;
    let mut child = Command::new(program)
        .args(["-namespace", &arguments.namespace, "-id", pod, "cleanup"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting the cleanup")?;
    let begin = Instant::now();
    while begin.elapsed() < CLEANUP_WAIT {
        if let Some(status) = child.try_wait().context("waiting for the cleanup")? {
            ensure!(status.success(), "the cleanup of pod {pod} failed ({status})");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Stops the pod's VM and removes all resources listed in the journal.
pub(crate) fn cleanup(arguments: &Arguments) -> Result<()> {
    let settings = &Settings::load()?;
    let paths = &PodPaths::new(settings, &arguments.namespace, &arguments.id);
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
    debug_assert_eq!(paths.key.len(), paths::KEY_LENGTH);
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
