//! What the guest reports: exits and OOM verdicts. Journaled first, acknowledged then, so that a
//! crash in between makes the guest report them again.

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

/// A container that has ended is shown as ended when what it printed stands in the log, at the latest
/// after this time: the log may be on a full disk. What is printed later still gets there.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// A start that is not decided after this time does not hold back the container's end any more.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Acknowledgements are gathered for this long: execs come in bursts.
const ACK_AFTER: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(250);

/// Follows the guest's events for ever, over as many connections as it takes.
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
            take(handle, kind).await;
        }
        handled = event.sequence;
    }
}

/// Returns when the event is journaled, however long a full disk makes that take.
async fn take(handle: &Arc<Handle>, event: Kind) {
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
        // A short program's end comes before the answer that it runs; and the end of one that could
        // not be started is told by that answer.
        let _ = tokio::time::timeout(START_LIMIT, handle.start_decided(id)).await;
    }
    if says_nothing_new(handle, &change) {
        return;
    }
    loop {
        match handle.commit(vec![change.clone()]).await {
            Ok(()) => break,
            // Removed meanwhile, or made up by the guest.
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
                cpuset::pin_again(&handle).await;
                oom_score::apply(&handle).await;
            };
            tokio::join!(freed, show_end(&handle, id));
        });
    }
}

/// What a guest repeats is not written to the disk again: it could do so without end.
fn says_nothing_new(handle: &Handle, change: &Change) -> bool {
    let pod = handle.pod();
    match change {
        Change::ContainerOom { id } => pod.containers.get(id).is_some_and(|c| c.oom),
        Change::ContainerEnded { id, .. } => {
            pod.containers.get(id).is_some_and(|c| c.exit.is_some() && c.drained)
        }
        _ => false,
    }
}

/// Shows a container as ended that has ended.
pub(super) async fn show_end(handle: &Handle, id: String) {
    let settled = async {
        if let Some(log) = handle.log(&id) {
            let _ = tokio::time::timeout(SETTLE_LIMIT, log.settled()).await;
        }
    };
    tokio::join!(settled, write_back(handle, &id));
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

/// A guest's clock may say anything; what no `SystemTime` can be becomes our own.
fn time(unix_ns: i64) -> SystemTime {
    let since = u64::try_from(unix_ns).ok().map(Duration::from_nanos);
    since.and_then(|s| UNIX_EPOCH.checked_add(s)).unwrap_or_else(SystemTime::now)
}
