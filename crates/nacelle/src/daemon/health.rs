//! What keeps this node from running pods: missing files, and KVM, which is measured by running
//! guest code in a process of its own (`nacelle-vmm probe`), for its presence says little.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sandbox::ports::Network;
use serde::Deserialize;
use tokio::process::Command;
use tokio::sync::watch;

use crate::settings::Settings;

/// Between two looks while something is wrong; an operator who repairs it waits no longer.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The probe bounds itself to a second or two; a host so slow that this passes is no host for VMs.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// What `nacelle-vmm probe` prints.
#[derive(Debug, Deserialize)]
pub(crate) struct Probe {
    pub(crate) usable: bool,
    pub(crate) mips: f64,
    pub(crate) exit_us: f64,
    pub(crate) why: String,
}

/// Measures KVM; an error is a sentence for people.
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
        format!("{} probe: {error}; it said: {}", vmm.display(), said.trim())
    })
}

pub(super) struct NodeHealth {
    runtime: watch::Receiver<Option<String>>,
    network: Arc<dyn Network>,
    facts: serde_json::Value,
}

impl NodeHealth {
    /// Starts looking; until the first look has ended, [`cri::Health::runtime`] waits for it.
    pub(super) fn watch(settings: &Settings, network: Arc<dyn Network>) -> Self {
        let (sender, runtime) = watch::channel(Some(String::new()));
        let settings_for_task = settings.clone();
        tokio::spawn(async move {
            loop {
                let trouble = look(&settings_for_task).await;
                if let Some(trouble) = &trouble {
                    tracing::warn!(trouble, "this node cannot run pods");
                }
                let well = trouble.is_none();
                if sender.send(trouble).is_err() {
                    return;
                }
                if well {
                    // KVM does not get lost; keep the channel open.
                    sender.closed().await;
                    return;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        });
        let facts = serde_json::to_value(settings).unwrap_or_default();
        Self { runtime, network, facts }
    }
}

async fn look(settings: &Settings) -> Option<String> {
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
        // An empty text stands for "not looked yet".
        match runtime.wait_for(|known| known.as_deref() != Some("")).await {
            Ok(known) => known.clone(),
            Err(_) => Some("nacelled is stopping".into()),
        }
    }

    async fn network(&self) -> Option<String> {
        self.network.trouble().await
    }

    async fn damaged_networks(&self) -> Vec<String> {
        self.network.damaged().await
    }

    fn facts(&self) -> serde_json::Value {
        self.facts.clone()
    }
}
