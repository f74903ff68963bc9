//! `nacelle inspect`: all that nacelled reports about a pod, container or image, as JSON.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use cri::v1;
use serde_json::{Value, json};

use super::connect::{Client, call_error};
use super::find::{self, Found};
use super::{images, table};

/// Prints a list with an element per name, like docker.
pub(super) async fn inspect(client: &mut Client, names: &[String]) -> Result<()> {
    let mut list = Vec::new();
    for name in names {
        list.push(match find::any(client, name).await? {
            Some(Found::Pod(pod)) => of_pod(client, &pod.id).await?,
            Some(Found::Container(container)) => of_container(client, &container.id).await?,
            None => match images::lookup(client, name).await? {
                Some(image) => json!({ "image": serde_json::to_value(&image)? }),
                None => bail!("no such pod, container or image: {name}"),
            },
        });
    }
    Ok(table::json(&list.into())?)
}

async fn of_pod(client: &mut Client, id: &str) -> Result<Value> {
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
    let reply = client.runtime.pod_sandbox_status(request).await.map_err(call_error)?.into_inner();
    let mut containers = Vec::new();
    for container in find::all_containers(client).await? {
        if container.pod_sandbox_id == id {
            containers.push(of_container(client, &container.id).await?);
        }
    }
    Ok(json!({
        "pod": serde_json::to_value(&reply.status)?,
        "info": parsed(&reply.info),
        "containers": containers,
    }))
}

async fn of_container(client: &mut Client, id: &str) -> Result<Value> {
    let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: true };
    let reply = client.runtime.container_status(request).await.map_err(call_error)?.into_inner();
    Ok(json!({
        "container": serde_json::to_value(&reply.status)?,
        "info": parsed(&reply.info),
    }))
}

/// The values of a verbose status are JSON in strings.
fn parsed(info: &BTreeMap<String, String>) -> Value {
    let value = |text: &str| serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
    info.iter().map(|(key, text)| (key.clone(), value(text))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_verbose_status_are_shown_as_json() {
        let info = BTreeMap::from([
            ("vmm".to_string(), r#"{"pid":7}"#.to_string()),
            ("note".to_string(), "plain text".to_string()),
        ]);
        assert_eq!(parsed(&info), json!({ "note": "plain text", "vmm": { "pid": 7 } }));
    }
}
