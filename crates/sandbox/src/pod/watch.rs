//! Tasks that live as long as a pod's VM: its end, its silence, its events, its usage.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::handle::Handle;
use super::owner::Msg;
use super::{death, events, host_pod, recover, stats};
use crate::host::process::Process;

/// After a VM's end, what its containers printed last gets this long to reach their logs.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Starts them all; with `reattach` the containers are taken up first.
pub(super) fn start(
    tasks: &mut JoinSet<()>,
    handle: &Arc<Handle>,
    process: Arc<Process>,
    reattach: bool,
) {
    tasks.spawn(until_vm_ends(handle.clone(), process));
    tasks.spawn(ping(handle.clone()));
    tasks.spawn(stats::poll(handle.clone()));
    let handle = handle.clone();
    tasks.spawn(async move {
        if reattach {
            recover::reattach(&handle).await;
        }
        events::consume(&handle).await;
    });
}

async fn until_vm_ends(handle: Arc<Handle>, process: Arc<Process>) {
    process.ended().await;
    host_pod::end_rest(&handle, &handle.pod()).await;
    let logs = handle.logs();
    let settled = futures_util::future::join_all(logs.iter().map(|log| log.settled()));
    let _ = tokio::time::timeout(LAST_WORDS, settled).await;
    let death = death::cause(&handle).await;
    handle.tell(Msg::VmmEnded { death }).await;
}

async fn ping(handle: Arc<Handle>) {
    let config = &handle.node.config;
    let interval = config.ping_interval().max(Duration::from_millis(10));
    let mut missed = 0;
    while missed < config.ping_misses.max(1) {
        tokio::time::sleep(interval).await;
        match handle.guest.ping(interval).await {
            Ok(()) => missed = 0,
            // Being stopped, which has deadlines of its own.
            Err(_) if handle.ready_pod().is_err() => {}
            Err(error) => {
                missed += 1;
                tracing::warn!(pod = handle.id, missed, %error, "guest missed a ping");
            }
        }
    }
    handle.tell(Msg::GuestSilent).await;
}
