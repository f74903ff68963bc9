//! Why this node cannot run pods: missing files, or KVM. KVM is tested by running guest code in a
//! separate process (`nacelle-vmm probe`), because `/dev/kvm` may exist and still be unusable.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sandbox::ports::Network;
use serde::Deserialize;
use tokio::process::Command;
use tokio::sync::watch;

use crate::settings::Settings;

/// Between two checks while one fails.
const INTERVAL: Duration = Duration::from_secs(30);
/// The probe takes a second or two; a host that needs longer than this is too slow for VMs.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// What `nacelle-vmm probe` prints.
#[derive(Debug, Deserialize)]
pub(crate) struct Probe {
    pub(crate) usable: bool,
    pub(crate) mips: f64,
    pub(crate) exit_us: f64,
    pub(crate) why: String,
}

/// Measures KVM; the error is a message for the operator.
pub(crate) async fn probe(vmm: &Path) -> Result<Probe, String> {
    let run = Command::new(vmm)
        .arg("probe")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(PROBE_LIMIT, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("{} probe: {error}", vmm.display())),
        Err(_) => return Err(format!("KVM did not answer within {PROBE_LIMIT:?}")),
    };
    serde_json::from_slice(&output.stdout).map_err(|error| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("{} probe: {error}; its error output: {}", vmm.display(), said.trim())
    })
}

pub(super) struct NodeHealth {
    runtime: watch::Receiver<Option<String>>,
    network: Arc<dyn Network>,
    facts: serde_json::Value,
}

impl NodeHealth {
    /// Starts the checks; [`cri::Health::runtime`] waits for the first result.
    pub(super) fn watch(settings: &Settings, network: Arc<dyn Network>) -> Self {
        let (sender, runtime) = watch::channel(Some(String::new()));
        let settings_for_task = settings.clone();
        tokio::spawn(async move {
            loop {
                let trouble = check(&settings_for_task).await;
                if let Some(trouble) = &trouble {
                    tracing::warn!(trouble, "this node cannot run pods");
                }
                let ok = trouble.is_none();
                if sender.send(trouble).is_err() {
                    return;
                }
                if ok {
                    // KVM does not disappear; only keep the channel open.
                    sender.closed().await;
                    return;
                }
                tokio::time::sleep(INTERVAL).await;
            }
        });
        let facts = serde_json::to_value(settings).unwrap_or_default();
        Self { runtime, network, facts }
    }
}

async fn check(settings: &Settings) -> Option<String> {
    if let Some(missing) = settings.missing_files() {
        return Some(missing);
    }
    match probe(&settings.vmm).await {
        Ok(probe) if probe.usable => None,
        Ok(probe) => Some(probe.why),
        Err(trouble) => Some(trouble),
    }
}

#[async_trait]
impl cri::Health for NodeHealth {
    async fn runtime(&self) -> Option<String> {
        let mut runtime = self.runtime.clone();
        // An empty text means that the first check has not ended yet.
        match runtime.wait_for(|known| known.as_deref() != Some("")).await {
            Ok(known) => known.clone(),
            Err(_) => Some("nacelled is stopping".into()),
        }
    }

    async fn network(&self) -> Option<String> {
        self.network.not_ready_reason().await
    }

    async fn damaged_networks(&self) -> Vec<String> {
        self.network.damaged_records().await
    }

    fn facts(&self) -> serde_json::Value {
        self.facts.clone()
    }
}
