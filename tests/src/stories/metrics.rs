//! Metrics, scraped with curl during the life of a pod.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Story;
use crate::client::container;
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[("metrics show a pod's start, usage, death and removal", metrics)];

/// The value of a series, as it stands in the text.
fn value(text: &str, series: &str) -> Option<f64> {
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

fn scrape(node: &Node) -> Result<String> {
    let socket = node.socket().with_file_name("metrics.sock");
    let output = Command::new("curl")
        .args(["-fsS", "--max-time", "60", "--unix-socket"])
        .arg(&socket)
        .arg("http://localhost/metrics")
        .output()
        .context("curl")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {error}", socket.display());
    Ok(String::from_utf8(output.stdout)?)
}

fn metrics() -> Result<()> {
    let node = Node::start_with(|config| {
        let state = config.lines().find_map(|line| line.strip_prefix("state = "));
        let state = state.unwrap_or_default().trim_matches('"');
        format!("{config}\n[metrics]\nlisten = \"unix:{state}/metrics.sock\"\n")
    })?;
    let before = scrape(&node)?;
    let is = |text: &str, series: &str, expected: f64| {
        let found = value(text, series);
        ensure!(found == Some(expected), "{series} is {found:?}, not {expected}:\n{text}");
        Ok(())
    };
    is(&before, "nacelle_pods{state=\"ready\"}", 0.0)?;
    is(&before, "nacelle_pod_starts_total{kind=\"vm\",result=\"ok\"}", 0.0)?;

    let image = node.image("busybox")?;
    let cri = node.cri();
    let pod = node.pod("metrics")?;
    let line = "while true; do head -c 1000000 /dev/zero > /big; done";
    cri.run(&pod, container("c", &image, &["sh", "-c", line]))?;
    ensure!(cri.status("0123456789abcdef").is_err(), "a container that does not exist");
    let text = scrape(&node)?;
    is(&text, "nacelle_pods{state=\"ready\"}", 1.0)?;
    is(&text, "nacelle_containers{state=\"running\"}", 1.0)?;
    is(&text, "nacelle_pod_starts_total{kind=\"vm\",result=\"ok\"}", 1.0)?;
    is(&text, "nacelle_vm_boots_total{from=\"kernel\",result=\"ok\"}", 1.0)?;
    is(&text, "nacelle_pod_start_phase_duration_seconds_count{phase=\"boot\"}", 1.0)?;
    let add = "nacelle_cni_operations_total{operation=\"ADD\",plugin=\"bridge\",result=\"ok\"}";
    is(&text, add, 1.0)?;
    is(&text, "nacelle_image_pulls_total{result=\"ok\"}", 1.0)?;
    is(&text, "nacelle_cri_requests_total{method=\"ContainerStatus\",code=\"NotFound\"}", 1.0)?;

    let of_pod = "pod=\"metrics\"";
    let used = wait::until("the pod's usage is served", Duration::from_secs(60), || {
        let text = scrape(&node)?;
        let mut lines = text.lines();
        let series = "nacelle_pod_cpu_usage_seconds_total{";
        let line = lines.find(|line| line.starts_with(series) && line.contains(of_pod));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(value.filter(|value| *value > 0.0))
    });
    used?;

    kill(Pid::from_raw(node.vmm_pid(&pod)?), Signal::SIGKILL)?;
    wait::until("the death is counted", Duration::from_secs(60), || {
        let died = value(&scrape(&node)?, "nacelle_vmm_deaths_total{cause=\"killed\"}");
        Ok((died == Some(1.0)).then_some(()))
    })?;
    cri.stop_pod(&pod)?;
    cri.remove_pod(&pod)?;
    let text = scrape(&node)?;
    is(&text, "nacelle_pods{state=\"not_ready\"}", 0.0)?;
    ensure!(!text.contains(of_pod), "series of a removed pod:\n{text}");
    node.finish()
}
