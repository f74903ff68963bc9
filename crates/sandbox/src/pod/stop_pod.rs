//! StopPod: kills the containers, asks the guest to power off, kills the VMM, frees the network.
//! Every step has a limit and runs whether or not the previous one succeeded.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::v1;

use super::handle::Handle;
use super::stop_container::kill;
use super::undo::undo;
use crate::error::Error;
use crate::host::process::Process;
use crate::policy::{Change, Phase};

/// Time for killed containers to exit and for the guest to report their exits.
const CONTAINERS_LIMIT: Duration = Duration::from_secs(3);

pub(super) async fn stop_pod(handle: &Arc<Handle>) -> Result<(), Error> {
    let was_ready = handle.pod().phase == Phase::Ready;
    if let Err(error) = handle.commit(vec![Change::Stopping]).await {
        if handle.pod().phase != Phase::Stopping {
            return Err(error);
        }
        tracing::warn!(pod = handle.id, %error, "stop is not journaled, continuing");
    }
    handle.stopping.cancel();
    if was_ready {
        end_guest(handle).await;
    }
    let (mut changes, result) = undo(handle, false).await;
    changes.push(Change::Stopped { at: SystemTime::now() });
    if let Err(error) = handle.commit(changes).await {
        if handle.pod().phase != Phase::NotReady {
            return Err(error);
        }
        tracing::warn!(pod = handle.id, %error, "end of the pod is not journaled yet");
    }
    result
}

/// Gets exit codes of the containers, and lets the guest power off. The undo of the VMM handles the
/// rest.
pub(super) async fn end_guest(handle: &Arc<Handle>) {
    let pod = handle.pod();
    let Some((pid, started)) = pod.vmm() else { return };
    let Ok(Some(process)) = Process::find(pid, started) else { return };
    let running: Vec<_> = pod.containers.values().filter(|c| c.is_running()).collect();
    if !running.is_empty() {
        let kills = running.iter().map(|c| kill(handle, &c.id));
        let ended = handle
            .wait_for(|pod| !pod.containers.values().any(|c| c.started_at.is_some() && !c.drained));
        let all = async {
            futures_util::future::join_all(kills).await;
            ended.await
        };
        let _ = tokio::time::timeout(CONTAINERS_LIMIT, all).await;
    }
    let limit = handle.node.config.shutdown_deadline();
    let requested = handle.guest.call_within(limit, "shut down", |mut c| async move {
        c.shutdown(v1::ShutdownRequest {}).await
    });
    let powered_off = async {
        // The reply may be lost; wait for the VM's exit.
        let _ = requested.await;
        process.ended().await;
    };
    let _ = tokio::time::timeout(limit, powered_off).await;
}
