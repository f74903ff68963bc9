//! `nacelle stats`: a line per pod, with its network and processes, and a line per container.

use anyhow::Result;
use cri::v1;

use super::arguments::Output;
use super::connect::{Client, call_error};
use super::table::{self, bytes};

pub(super) async fn stats(client: &mut Client, output: Output) -> Result<()> {
    let request = v1::ListPodSandboxStatsRequest::default();
    let reply = client.runtime.list_pod_sandbox_stats(request).await.map_err(call_error)?;
    let pods = reply.into_inner().stats;
    if output == Output::Json {
        return Ok(table::json(&serde_json::to_value(&pods)?)?);
    }
    let mut rows = Vec::new();
    for pod in &pods {
        let attributes = pod.attributes.clone().unwrap_or_default();
        let name = attributes.metadata.map(|metadata| metadata.name).unwrap_or_default();
        let Some(linux) = &pod.linux else { continue };
        let network = linux.network.as_ref().and_then(|n| n.default_interface.as_ref());
        let value = |number: &Option<v1::UInt64Value>| number.as_ref().map_or(0, |n| n.value);
        rows.push(vec![
            name.clone(),
            "(pod)".into(),
            cpu(linux.cpu.as_ref()),
            memory(linux.memory.as_ref()),
            String::new(),
            network.map_or("-".into(), |n| {
                format!("{} / {}", bytes(value(&n.rx_bytes)), bytes(value(&n.tx_bytes)))
            }),
            linux.process.as_ref().map_or("-".into(), |p| value(&p.process_count).to_string()),
        ]);
        for container in &linux.containers {
            let attributes = container.attributes.clone().unwrap_or_default();
            let layer = container.writable_layer.as_ref();
            rows.push(vec![
                name.clone(),
                attributes.metadata.map(|metadata| metadata.name).unwrap_or_default(),
                cpu(container.cpu.as_ref()),
                memory(container.memory.as_ref()),
                layer.map_or("-".into(), |l| bytes(value(&l.used_bytes))),
            ]);
        }
    }
    let head = ["POD", "CONTAINER", "CPU", "MEMORY", "DISK", "NET IN / OUT", "PROCESSES"];
    Ok(table::print(&head, &rows)?)
}

/// Percent of one CPU; after only one sample, the CPU time so far.
fn cpu(usage: Option<&v1::CpuUsage>) -> String {
    let Some(usage) = usage else { return "-".into() };
    let value = |number: Option<v1::UInt64Value>| number.map_or(0, |n| n.value);
    match value(usage.usage_nano_cores) {
        0 => format!("{:.1} s", value(usage.usage_core_nano_seconds) as f64 / 1e9),
        nano_cores => format!("{:.1} %", nano_cores as f64 / 1e7),
    }
}

fn memory(usage: Option<&v1::MemoryUsage>) -> String {
    let set = usage.and_then(|usage| usage.working_set_bytes);
    set.map_or("-".into(), |set| bytes(set.value))
}
