//! `nacelle pods`, `ps`, `version`.

use std::process::ExitCode;

use anyhow::Result;
use cri::v1;

use super::arguments::Output;
use super::connect::{Client, call_error};
use super::find::{all_containers, all_pods, container_name, pod_name};
use super::table::{self, ago, short};
use crate::api::InfoRequest;

pub(super) async fn pods(client: &mut Client, output: Output) -> Result<()> {
    let mut pods = all_pods(client).await?;
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    let mut rows = Vec::new();
    let mut list = Vec::new();
    for pod in &pods {
        let request =
            v1::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        // It may have been removed since it was listed.
        let Ok(status) = client.runtime.pod_sandbox_status(request).await else { continue };
        let network = status.into_inner().status.unwrap_or_default().network.unwrap_or_default();
        let ready = pod.state == v1::PodSandboxState::SandboxReady as i32;
        let state = if ready { "ready" } else { "not ready" };
        let metadata = pod.metadata.clone().unwrap_or_default();
        list.push(serde_json::json!({
            "id": pod.id, "name": metadata.name, "namespace": metadata.namespace,
            "uid": metadata.uid, "attempt": metadata.attempt, "state": state,
            "created_at": pod.created_at, "address": network.ip,
            "addresses": network.additional_ips.iter().map(|a| &a.ip).collect::<Vec<_>>(),
            "labels": pod.labels, "annotations": pod.annotations, "handler": pod.runtime_handler,
        }));
        rows.push(vec![
            short(&pod.id).to_string(),
            metadata.name,
            metadata.namespace,
            state.to_string(),
            if network.ip.is_empty() { "-".into() } else { network.ip },
            ago(pod.created_at),
        ]);
    }
    match output {
        Output::Json => table::json(&list.into())?,
        Output::Table => {
            table::print(&["POD", "NAME", "NAMESPACE", "STATE", "ADDRESS", "CREATED"], &rows)?;
        }
    }
    Ok(())
}

fn state_word(state: i32) -> &'static str {
    match v1::ContainerState::try_from(state) {
        Ok(v1::ContainerState::ContainerCreated) => "created",
        Ok(v1::ContainerState::ContainerRunning) => "running",
        Ok(v1::ContainerState::ContainerExited) => "exited",
        Ok(v1::ContainerState::ContainerUnknown) | Err(_) => "unknown",
    }
}

pub(super) async fn containers(client: &mut Client, all: bool, output: Output) -> Result<()> {
    let pods = all_pods(client).await?;
    let mut containers = all_containers(client).await?;
    containers.retain(|c| all || c.state == v1::ContainerState::ContainerRunning as i32);
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    let mut rows = Vec::new();
    let mut list = Vec::new();
    for container in &containers {
        let pod = pods.iter().find(|pod| pod.id == container.pod_sandbox_id);
        let pod = pod.map_or("-", pod_name);
        let image = container.image.as_ref().map_or("", |image| &image.image);
        let state = state_word(container.state);
        list.push(serde_json::json!({
            "id": container.id, "name": container_name(container),
            "pod_id": container.pod_sandbox_id, "pod": pod, "image": image,
            "image_id": container.image_id, "state": state, "created_at": container.created_at,
            "labels": container.labels, "annotations": container.annotations,
        }));
        rows.push(vec![
            short(&container.id).to_string(),
            container_name(container).to_string(),
            pod.to_string(),
            image.to_string(),
            state.to_string(),
            ago(container.created_at),
        ]);
    }
    match output {
        Output::Json => table::json(&list.into())?,
        Output::Table => {
            table::print(&["CONTAINER", "NAME", "POD", "IMAGE", "STATE", "CREATED"], &rows)?;
        }
    }
    Ok(())
}

pub(super) async fn version(client: Option<Client>, output: Output) -> Result<ExitCode> {
    let own = env!("CARGO_PKG_VERSION");
    let daemon = match client {
        Some(mut client) => {
            Some(client.debug.info(InfoRequest {}).await.map_err(call_error)?.into_inner().version)
        }
        None => None,
    };
    match output {
        Output::Json => table::json(&serde_json::json!({ "nacelle": own, "nacelled": daemon }))?,
        Output::Table => {
            crate::say(format_args!("nacelle   {own}"))?;
            crate::say(format_args!("nacelled  {}", daemon.as_deref().unwrap_or("not running")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
