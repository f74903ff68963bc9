//! Finds pods and containers by id, by an unambiguous beginning of an id, or by name.

use anyhow::{Result, bail};
use cri::v1;

use super::connect::{Client, call_error};
use super::table::short;

pub(super) async fn all_pods(client: &mut Client) -> Result<Vec<v1::PodSandbox>> {
    let reply = client.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await;
    Ok(reply.map_err(call_error)?.into_inner().items)
}

pub(super) async fn all_containers(client: &mut Client) -> Result<Vec<v1::Container>> {
    let reply = client.runtime.list_containers(v1::ListContainersRequest::default()).await;
    Ok(reply.map_err(call_error)?.into_inner().containers)
}

pub(super) fn pod_name(pod: &v1::PodSandbox) -> &str {
    pod.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

pub(super) fn container_name(container: &v1::Container) -> &str {
    container.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

/// The one item with this id or name. More than one is an error that lists their ids.
fn only<'a, T>(
    what: &str,
    called: &str,
    all: &'a [T],
    id: fn(&T) -> &str,
    name: fn(&T) -> &str,
) -> Result<Option<&'a T>> {
    if let Some(exact) = all.iter().find(|item| id(item) == called) {
        return Ok(Some(exact));
    }
    let mut found: Vec<&T> = all.iter().filter(|item| name(item) == called).collect();
    if found.is_empty() && !called.is_empty() {
        found = all.iter().filter(|item| id(item).starts_with(called)).collect();
    }
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => {
            let ids: Vec<&str> = several.iter().map(|item| short(id(item))).collect();
            bail!("{called:?} matches several {what}s, give an id: {}", ids.join(", "));
        }
    }
}

fn find_pod<'a>(pods: &'a [v1::PodSandbox], called: &str) -> Result<Option<&'a v1::PodSandbox>> {
    only("pod", called, pods, |pod| &pod.id, pod_name)
}

/// By its own id or name; otherwise the container of the pod with that id or name. If the pod has
/// several, the one with the pod's name, then the only one that runs.
fn find_container<'a>(
    pods: &[v1::PodSandbox],
    containers: &'a [v1::Container],
    called: &str,
) -> Result<Option<&'a v1::Container>> {
    let running = v1::ContainerState::ContainerRunning as i32;
    let own = only("container", called, containers, |c| &c.id, container_name);
    if let Ok(Some(container)) = own {
        return Ok(Some(container));
    }
    let Some(pod) = find_pod(pods, called)? else { return own };
    let inside: Vec<&v1::Container> =
        containers.iter().filter(|c| c.pod_sandbox_id == pod.id).collect();
    let by = |test: &dyn Fn(&v1::Container) -> bool| {
        let mut found = inside.iter().copied().filter(|c| test(c));
        found.next().filter(|_| found.next().is_none())
    };
    let found = by(&|_| true)
        .or_else(|| by(&|c| container_name(c) == pod_name(pod)))
        .or_else(|| by(&|c| c.state == running));
    match (found, inside.is_empty()) {
        (Some(container), _) => Ok(Some(container)),
        (None, true) => bail!("pod {called:?} has no container"),
        (None, false) => {
            let names: Vec<&str> = inside.iter().map(|c| container_name(c)).collect();
            bail!("pod {called:?} has several containers, give a name: {}", names.join(", "))
        }
    }
}

pub(super) async fn pod(client: &mut Client, called: &str) -> Result<v1::PodSandbox> {
    let pods = all_pods(client).await?;
    if let Some(pod) = find_pod(&pods, called)? {
        return Ok(pod.clone());
    }
    // The pod of a container with that name.
    let containers = all_containers(client).await?;
    let inside = only("container", called, &containers, |c| &c.id, container_name)?;
    match inside.and_then(|c| pods.iter().find(|pod| pod.id == c.pod_sandbox_id)) {
        Some(pod) => Ok(pod.clone()),
        None => bail!("no such pod: {called} (`nacelle pods` lists all)"),
    }
}

pub(super) async fn container(client: &mut Client, called: &str) -> Result<v1::Container> {
    let pods = all_pods(client).await?;
    let containers = all_containers(client).await?;
    match find_container(&pods, &containers, called)? {
        Some(container) => Ok(container.clone()),
        None => bail!("no such container: {called} (`nacelle ps -a` lists all)"),
    }
}

/// A pod or a container.
pub(super) enum Found {
    Pod(v1::PodSandbox),
    Container(v1::Container),
}

/// Pods take precedence: `nacelle run` creates a pod and a container of the same name.
pub(super) async fn any(client: &mut Client, called: &str) -> Result<Option<Found>> {
    let pods = all_pods(client).await?;
    if let Some(pod) = find_pod(&pods, called)? {
        return Ok(Some(Found::Pod(pod.clone())));
    }
    let containers = all_containers(client).await?;
    let found = only("container", called, &containers, |c| &c.id, container_name)?;
    Ok(found.map(|container| Found::Container(container.clone())))
}

/// As [`any`]; an error if there is none.
pub(super) async fn existing(client: &mut Client, called: &str) -> Result<Found> {
    match any(client, called).await? {
        Some(found) => Ok(found),
        None => bail!(
            "no such pod or container: {called} (`nacelle pods` and `nacelle ps -a` list all)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, name: &str) -> v1::PodSandbox {
        let metadata = v1::PodSandboxMetadata { name: name.into(), ..Default::default() };
        v1::PodSandbox { id: id.into(), metadata: Some(metadata), ..Default::default() }
    }

    fn container(id: &str, name: &str, pod: &str) -> v1::Container {
        v1::Container {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_is_found_by_id_by_prefix_and_by_name() {
        let pods = [pod("abc1", "web"), pod("abd2", "db")];
        for called in ["abc1", "abc", "web"] {
            assert_eq!(find_pod(&pods, called).unwrap().unwrap().id, "abc1", "{called}");
        }
        assert!(find_pod(&pods, "nobody").unwrap().is_none());
        assert!(find_pod(&pods, "").unwrap().is_none());
        let text = find_pod(&pods, "ab").unwrap_err().to_string();
        assert!(text.contains("abc1") && text.contains("abd2"), "{text}");
    }

    #[test]
    fn the_only_container_of_a_pod_is_found_by_the_pods_name() {
        let pods = [pod("p1", "web"), pod("p2", "empty"), pod("p3", "two")];
        let containers =
            [container("c1", "main", "p1"), container("c2", "a", "p3"), container("c3", "b", "p3")];
        let find = |called: &str| find_container(&pods, &containers, called);
        assert_eq!(find("web").unwrap().unwrap().id, "c1");
        assert_eq!(find("main").unwrap().unwrap().id, "c1");
        assert!(find("empty").unwrap_err().to_string().contains("no container"));
        assert!(find("two").unwrap_err().to_string().contains("a, b"));
        assert!(find("nobody").unwrap().is_none());
    }
}
