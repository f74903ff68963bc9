//! GetContainerEvents, for kubelets with EventedPLEG: each change with the pod's and its containers'
//! status at the time of sending.

use std::collections::HashMap;

use sandbox::model::{Event, EventKind, Filter};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use super::Runtime;
use super::paged::Streamed;
use crate::convert::{status, time::nanos};
use crate::v1;

struct Follower {
    runtime: Runtime,
    events: Receiver<Event>,
    /// Last known status of each pod: a kubelet wants to know which pod it was that went.
    pods: HashMap<String, v1::PodSandboxStatus>,
}

impl Runtime {
    pub(super) async fn get_container_events(
        &self,
        _: v1::GetEventsRequest,
    ) -> Result<Streamed<v1::ContainerEventResponse>, Status> {
        // Subscribed first: changes during the listing are sent afterwards.
        let events = self.sandboxes.events();
        let known = self.sandboxes.pods(&Filter::default());
        let pods = known.iter().map(|view| (view.id.clone(), status::pod_status(view))).collect();
        let follower = Follower { runtime: self.clone(), events, pods };
        Ok(Box::pin(futures_util::stream::unfold(follower, |mut follower| async {
            loop {
                let event = follower.next().await?;
                if let Some(response) = follower.response(event) {
                    return Some((Ok::<_, Status>(response), follower));
                }
            }
        })))
    }
}

impl Follower {
    /// None: the node stops.
    async fn next(&mut self) -> Option<Event> {
        loop {
            let event = tokio::select! {
                event = self.events.recv() => event,
                () = self.runtime.stopping.cancelled() => return None,
            };
            match event {
                Ok(event) => return Some(event),
                Err(RecvError::Closed) => return None,
                // A kubelet also lists everything from time to time.
                Err(RecvError::Lagged(lost)) => {
                    tracing::warn!(lost, "a client reads container events too slowly");
                }
            }
        }
    }

    /// None of a pod that went before we have seen it: a kubelet takes the pod's status for granted.
    fn response(&mut self, event: Event) -> Option<v1::ContainerEventResponse> {
        if let Ok(view) = self.runtime.sandboxes.pod(&event.pod) {
            self.pods.insert(event.pod.clone(), status::pod_status(&view));
        }
        let gone = event.kind == EventKind::Deleted && event.container.is_none();
        let pod = if gone {
            let last = self.pods.remove(&event.pod);
            last.map(|status| v1::PodSandboxStatus {
                state: v1::PodSandboxState::SandboxNotready as i32,
                ..status
            })
        } else {
            self.pods.get(&event.pod).cloned()
        };
        Some(v1::ContainerEventResponse {
            container_event_type: kind(event.kind) as i32,
            created_at: nanos(event.at),
            pod_sandbox_status: Some(pod?),
            containers_statuses: self.runtime.statuses_of(&event.pod),
            // Events of the pod itself carry its id.
            container_id: event.container.unwrap_or(event.pod),
        })
    }
}

fn kind(kind: EventKind) -> v1::ContainerEventType {
    match kind {
        EventKind::Created => v1::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => v1::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
    }
}
