//! `nacelle stop`, `kill` and `rm`, for pods and containers.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use cri::v1;

use super::connect::{Client, call_error};
use super::find::{self, Found};
use crate::api::InfoRequest;

/// The directory with the logs of a pod that `nacelle run` created.
pub(super) const LOGS_ANNOTATION: &str = "nacelle.run/logs";

pub(super) async fn stop(client: &mut Client, name: &str, grace: i64) -> Result<()> {
    match find::existing(client, name).await? {
        Found::Container(container) => stop_container(client, &container.id, grace).await,
        Found::Pod(pod) => {
            // StopPodSandbox would kill them without a grace period.
            for container in running_in(client, &pod.id).await? {
                stop_container(client, &container.id, grace).await?;
            }
            stop_pod(client, &pod.id).await
        }
    }
}

/// Kills the processes of a container, or of all containers of a pod. The pod's VM stays.
pub(super) async fn kill(client: &mut Client, name: &str) -> Result<()> {
    let victims = match find::existing(client, name).await? {
        Found::Container(container) if is_running(&container) => vec![container],
        Found::Container(_) => vec![],
        Found::Pod(pod) => running_in(client, &pod.id).await?,
    };
    if victims.is_empty() {
        bail!("{name} is not running");
    }
    for container in victims {
        // Without a grace period, SIGKILL is the only signal.
        stop_container(client, &container.id, 0).await?;
    }
    Ok(())
}

fn is_running(container: &v1::Container) -> bool {
    container.state == v1::ContainerState::ContainerRunning as i32
}

async fn running_in(client: &mut Client, pod: &str) -> Result<Vec<v1::Container>> {
    let mut containers = find::all_containers(client).await?;
    containers.retain(|container| container.pod_sandbox_id == pod && is_running(container));
    Ok(containers)
}

pub(super) async fn stop_container(client: &mut Client, id: &str, grace: i64) -> Result<()> {
    let request = v1::StopContainerRequest { container_id: id.into(), timeout: grace };
    client.runtime.stop_container(request).await.map(drop).map_err(call_error)
}

pub(super) async fn stop_pod(client: &mut Client, id: &str) -> Result<()> {
    let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.into() };
    client.runtime.stop_pod_sandbox(request).await.map(drop).map_err(call_error)
}

pub(super) async fn remove(client: &mut Client, name: &str, force: bool) -> Result<()> {
    let refuse = || bail!("{name} is running: stop it first, or use `nacelle rm -f {name}`");
    match find::existing(client, name).await? {
        Found::Container(container) => {
            if is_running(&container) && !force {
                return refuse();
            }
            let request = v1::RemoveContainerRequest { container_id: container.id };
            client.runtime.remove_container(request).await.map(drop).map_err(call_error)
        }
        Found::Pod(pod) => {
            let ready = pod.state == v1::PodSandboxState::SandboxReady as i32;
            let busy = ready && !running_in(client, &pod.id).await?.is_empty();
            if busy && !force {
                return refuse();
            }
            remove_pod(client, &pod).await
        }
    }
}

/// Removes the pod, and its logs if `nacelle run` created it.
pub(super) async fn remove_pod(client: &mut Client, pod: &v1::PodSandbox) -> Result<()> {
    stop_pod(client, &pod.id).await?;
    let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    client.runtime.remove_pod_sandbox(request).await.map_err(call_error)?;
    if let Some(folder) = pod.annotations.get(LOGS_ANNOTATION).map(Path::new) {
        // Any client can set the annotation, so only directories directly below ours are removed.
        if is_right_in(folder, &logs_folder(client).await?) {
            match std::fs::remove_dir_all(folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    eprintln!("nacelle: cannot remove the logs in {}: {error}", folder.display());
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The directory with the logs of all pods that `nacelle run` creates.
pub(super) async fn logs_folder(client: &mut Client) -> Result<PathBuf> {
    let info = client.debug.info(InfoRequest {}).await.map_err(call_error)?.into_inner();
    let config: serde_json::Value = serde_json::from_str(&info.config)?;
    let root = config["root"].as_str().context("nacelled did not report its root directory")?;
    Ok(Path::new(root).join("logs"))
}

fn is_right_in(path: &Path, folder: &Path) -> bool {
    let mut inside = match path.strip_prefix(folder) {
        Ok(rest) => rest.components(),
        Err(_) => return false,
    };
    matches!((inside.next(), inside.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_directly_below_ours_are_removed_with_a_pod() {
        let ours = Path::new("/r/logs");
        assert!(is_right_in(Path::new("/r/logs/web_1"), ours));
        for path in ["/etc", "/r/logs", "/r/logs/..", "/r/logs/../pods", "/r/logs/a/b", "logs/a"] {
            assert!(!is_right_in(Path::new(path), ours), "{path}");
        }
    }
}
