//! Handles guest events: exits and OOM kills. An event is journaled before it is acknowledged, so
//! that the guest reports it again after a crash in between.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::v1;
use agent_api::v1::event::Event as Kind;

use super::handle::Handle;
use super::write_back::write_back;
use super::{cpuset, oom_score};
use crate::error::Error;
use crate::model::ExitView;
use crate::policy::Change;

/// An exit is reported when the output is in the log, at the latest after this time: the log's disk
/// may be full. Later output is still written.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// Longest time that a pending start delays the report of the container's exit.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Acknowledgements are batched for this long: execs come in bursts.
const ACK_AFTER: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(250);

/// Consumes the guest's events; reconnects as needed.
pub(super) async fn consume(handle: &Arc<Handle>) {
    loop {
        if let Err(error) = follow(handle).await {
            tracing::debug!(pod = handle.id, %error, "stream of guest events broke");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(handle: &Arc<Handle>) -> Result<(), Error> {
    let opened =
        handle.guest.call("events", |mut c| async move { c.events(v1::EventsRequest {}).await });
    let mut stream = opened.await?;
    let (mut handled, mut acked) = (0, 0);
    loop {
        let next = if handled > acked {
            match tokio::time::timeout(ACK_AFTER, stream.message()).await {
                Ok(next) => next,
                Err(_) => {
                    let request = v1::AckEventsRequest { sequence: handled };
                    let call = handle.guest.call("acknowledge events", |mut c| async move {
                        c.ack_events(request).await
                    });
                    call.await?;
                    acked = handled;
                    continue;
                }
            }
        } else {
            stream.message().await
        };
        let broken = |e: tonic::Status| Error::unavailable(format!("guest: events: {e}"));
        let Some(event) = next.map_err(broken)? else { return Ok(()) };
        if let Some(kind) = event.event {
            handle_event(handle, kind).await;
        }
        handled = event.sequence;
    }
}

/// Returns when the event is journaled; retries while the disk is full.
async fn handle_event(handle: &Arc<Handle>, event: Kind) {
    let change = match event {
        Kind::Oom(v1::Oom { container_id }) => Change::ContainerOom { id: container_id },
        Kind::Exit(exit) if !exit.exec_id.is_empty() => {
            handle.exec_ended(&exit, time(exit.unix_time_ns));
            return;
        }
        Kind::Exit(exit) => ended(&exit),
    };
    let id = match &change {
        Change::ContainerEnded { id, .. } => Some(id.clone()),
        _ => None,
    };
    if let Some(id) = &id {
        // The exit of a short program may arrive before the reply to its start; the exit of one
        // that could not be started is reported by that reply.
        let _ = tokio::time::timeout(START_LIMIT, handle.wait_for_start(id)).await;
    }
    if is_duplicate(handle, &change) {
        return;
    }
    loop {
        match handle.commit(vec![change.clone()]).await {
            Ok(()) => break,
            // Removed meanwhile, or invented by the guest.
            Err(Error::NotFound { .. }) => return,
            Err(error) => {
                tracing::warn!(pod = handle.id, %error, "guest's event is not journaled yet");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    if let Some(id) = id {
        let handle = handle.clone();
        tokio::spawn(async move {
            let freed = async {
                cpuset::pin_or_log(&handle).await;
                oom_score::apply(&handle).await;
            };
            tokio::join!(freed, publish_exit(&handle, id));
        });
    }
}

/// A repeated event is not written to the disk again: a hostile guest could repeat it forever.
fn is_duplicate(handle: &Handle, change: &Change) -> bool {
    let pod = handle.pod();
    match change {
        Change::ContainerOom { id } => pod.containers.get(id).is_some_and(|c| c.oom),
        Change::ContainerEnded { id, .. } => {
            pod.containers.get(id).is_some_and(|c| c.exit.is_some() && c.drained)
        }
        _ => false,
    }
}

/// Reports an exited container as exited, after its output is in the log.
pub(super) async fn publish_exit(handle: &Handle, id: String) {
    let logged = async {
        if let Some(log) = handle.log(&id) {
            let _ = tokio::time::timeout(LOG_LIMIT, log.flushed()).await;
        }
    };
    tokio::join!(logged, write_back(handle, &id));
    let _ = handle.commit(vec![Change::LogsDrained { id }]).await;
}

pub(super) fn ended(exit: &v1::Exit) -> Change {
    let reason = match (exit.oom_killed, exit.code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    Change::ContainerEnded {
        id: exit.container_id.clone(),
        exit: ExitView {
            code: exit.code,
            oom_killed: exit.oom_killed,
            at: time(exit.unix_time_ns),
            reason: reason.into(),
            message: String::new(),
        },
    }
}

/// The guest's clock is untrusted; an invalid time becomes the host's.
fn time(unix_ns: i64) -> SystemTime {
    let since = u64::try_from(unix_ns).ok().map(Duration::from_nanos);
    since.and_then(|s| UNIX_EPOCH.checked_add(s)).unwrap_or_else(SystemTime::now)
}
