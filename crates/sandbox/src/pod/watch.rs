//! Tasks that run as long as a pod's VM: exit, pings, guest events, statistics.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::handle::Handle;
use super::message::Msg;
use super::{events, exit_cause, host_pod, recover, stats};
use crate::host::process::Process;

/// Time for the last output of containers to reach their logs after the VM's exit.
const LOG_FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Starts all tasks; with `reattach` the containers are recovered first.
pub(super) fn start(
    tasks: &mut JoinSet<()>,
    handle: &Arc<Handle>,
    process: Arc<Process>,
    reattach: bool,
) {
    tasks.spawn(watch_exit(handle.clone(), process));
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

async fn watch_exit(handle: Arc<Handle>, process: Arc<Process>) {
    process.ended().await;
    host_pod::kill_remaining(&handle, &handle.pod()).await;
    let logs = handle.logs();
    let flushed = futures_util::future::join_all(logs.iter().map(|log| log.flushed()));
    let _ = tokio::time::timeout(LOG_FLUSH_LIMIT, flushed).await;
    let cause = exit_cause::find(&handle).await;
    handle.send(Msg::VmmEnded { cause }).await;
}

async fn ping(handle: Arc<Handle>) {
    let config = &handle.node.config;
    let interval = config.ping_interval().max(Duration::from_millis(10));
    let mut missed = 0;
    while missed < config.ping_misses.max(1) {
        tokio::time::sleep(interval).await;
        match handle.guest.ping(interval).await {
            Ok(()) => missed = 0,
            // The pod is being stopped, which has its own deadlines.
            Err(_) if handle.ready_pod().is_err() => {}
            Err(error) => {
                missed += 1;
                tracing::warn!(pod = handle.id, missed, %error, "guest missed a ping");
            }
        }
    }
    handle.send(Msg::GuestUnresponsive).await;
}
