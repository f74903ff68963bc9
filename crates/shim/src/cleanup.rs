//! `delete`: containerd calls it when a shim does not answer. What the shim has left is in the
//! sandbox's journal, which is read and undone.

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
use crate::network::Joined;
use crate::place::Place;
use crate::settings::Settings;
use crate::spec::{self, Role};
use crate::{place, rootfs};

/// 128 + SIGKILL: what became of the processes.
const KILLED: u32 = 137;
/// Of a guest whose shim is gone nobody waits for an orderly end: containerd gives all of this some
/// seconds.
const SHUTDOWN_LIMIT_MS: u64 = 300;

/// containerd kills `delete` after 5 s (1.6: `cleanupTimeout`). The cleaning goes on by itself then.
const WAIT_LIMIT: Duration = Duration::from_secs(1);
/// Time for a shim that was told to shut down: its events are sent, its pod is removed.
const END_LIMIT: Duration = Duration::from_secs(3);

pub(crate) fn delete(arguments: &Arguments) -> Result<()> {
    let settings = Settings::load()?;
    let bundle = arguments.bundle()?;
    // Its configuration may be gone, as after a failed start: the task is then taken for a pod's.
    let member =
        spec::read(&bundle).and_then(|spec| spec::role(&spec)).ok().and_then(|role| match role {
            Role::Member { pod } if pod != arguments.id => Some(pod),
            _ => None,
        });
    let pod = member.as_ref().unwrap_or(&arguments.id);
    let place = Place::new(&settings, &arguments.namespace, pod);
    // Detached, so it does not wait for the file server that still uses it.
    let unmounted = rootfs::unmount(&rootfs::place(&bundle));
    let cleaned = match (&member, place.is_alive()) {
        // The pod goes on, and its shim knows of the container.
        (Some(_), true) => Ok(()),
        (None, alive) => {
            // containerd also calls `delete` after an orderly Shutdown.
            let ended = alive && place.ending().exists() && ends_by_itself(&place);
            let pid = place.pid().and_then(|pid| i32::try_from(pid).ok());
            if let Some(pid) = pid.filter(|_| alive && !ended) {
                // It does not respond.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            clean_beside(arguments, pod)
        }
        (Some(_), false) => clean_beside(arguments, pod),
    };
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?)?;
    cleaned.and(unmounted)
}

/// Waits for the end of a shim that was told to shut down.
fn ends_by_itself(place: &Place) -> bool {
    let begin = Instant::now();
    while place.pid().is_some() {
        if begin.elapsed() > END_LIMIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Cleans up in a process of its own, and waits for it as long as containerd allows.
fn clean_beside(arguments: &Arguments, pod: &str) -> Result<()> {
    let program = std::env::current_exe().context("finding the shim's own program")?;
    let mut child = Command::new(program)
        .args(["-namespace", &arguments.namespace, "-id", pod, "clean"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting the cleanup")?;
    let begin = Instant::now();
    while begin.elapsed() < WAIT_LIMIT {
        if let Some(status) = child.try_wait().context("waiting for the cleanup")? {
            ensure!(status.success(), "the cleanup of pod {pod} failed ({status})");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Ends the pod's VM and takes away all that the journal names.
pub(crate) fn clean(arguments: &Arguments) -> Result<()> {
    let settings = &Settings::load()?;
    let place = &Place::new(settings, &arguments.namespace, &arguments.id);
    if place.root.join("pods").is_dir() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(remove_pods(settings, place))?;
        runtime.shutdown_background();
    }
    place.clear()
}

async fn remove_pods(settings: &Settings, place: &Place) -> Result<()> {
    place.make()?;
    let mut config = settings.pods(place, place.take_uid()?);
    config.shutdown_deadline_ms = SHUTDOWN_LIMIT_MS;
    debug_assert_eq!(place.key.len(), place::KEY);
    let sandboxes =
        Sandboxes::open(config, Arc::new(Joined)).await.context("reading the journal")?;
    // One whose start was cut short is in no listing, and is undone by its own task.
    let ids: Vec<String> = std::iter::once(place.key.clone())
        .chain(sandboxes.pods(&Filter::default()).into_iter().map(|pod| pod.id))
        .collect();
    for id in ids {
        sandboxes.remove_pod(&id).await.with_context(|| format!("removing pod {id}"))?;
    }
    sandboxes.shutdown().await;
    Ok(())
}
