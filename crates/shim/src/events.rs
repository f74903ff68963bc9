//! Events to containerd, in the order in which they happened, by its ttrpc socket. A containerd that
//! is being restarted is waited for; nobody waits for the events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use tokio::sync::{mpsc, oneshot};

/// Events that wait for containerd; further ones are dropped.
const QUEUE: usize = 2048;
/// One event may take this long, and is tried this often.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(500);
/// What the last events get when the shim ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

/// A message with its type's name, as containerd's typeurl writes it: without a host.
pub(crate) fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

impl Publisher {
    /// `address` is that of containerd's ttrpc socket.
    pub(crate) fn start(namespace: String, address: String) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        tokio::spawn(forward(address, items));
        Self { namespace, queue }
    }

    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(event)),
            ..Default::default()
        };
        if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            tracing::warn!(topic, "containerd takes no events, one is dropped");
        }
    }

    /// Waits until what was published before has been told, for a moment.
    pub(crate) async fn flush(&self) {
        let (done, told) = oneshot::channel();
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            let _ = tokio::time::timeout(FLUSH_TIMEOUT, told).await;
        }
    }
}

async fn forward(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client: Option<EventsClient> = None;
    while let Some(item) = items.recv().await {
        let envelope = match item {
            Item::Event(envelope) => *envelope,
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let topic = envelope.topic.clone();
        let request =
            ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        for attempt in 1..=ATTEMPTS {
            match send(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS => {
                    tracing::warn!(topic, error, "event is dropped");
                }
                Err(error) => {
                    tracing::debug!(topic, error, "event is sent again");
                    client = None;
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), String> {
    let connected = match client.take() {
        Some(client) => client,
        None => EventsClient::new(Client::connect(address).await.map_err(|e| e.to_string())?),
    };
    let limit = i64::try_from(CALL_TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    let result = connected.forward(context::with_timeout(limit), request).await;
    *client = Some(connected);
    result.map(drop).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::events::task::TaskStart;

    use super::*;

    #[test]
    fn an_event_has_the_name_that_containerd_knows() {
        let event = TaskStart { container_id: "c".into(), pid: 7, ..Default::default() };
        let any = any(&event);
        assert_eq!(any.type_url, "containerd.events.TaskStart");
        assert_eq!(any.value, b"\x0a\x01c\x10\x07");
        let at = UNIX_EPOCH + Duration::new(5, 7);
        assert_eq!((timestamp(at).seconds, timestamp(at).nanos), (5, 7));
    }
}
