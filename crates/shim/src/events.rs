//! Events to containerd's ttrpc socket, in order. Events are queued while containerd is down, so that
//! it learns of exits after a restart. Publishing never blocks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::context;
use containerd_shim_protos::ttrpc::{Code, Error};
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};

/// Maximum number of queued events.
const QUEUE_CAPACITY: usize = 2048;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of one Forward call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between attempts to deliver an event: doubled after each failure.
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Time to deliver queued events before the shim exits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// A bounded queue. When it is full, the oldest event that is not a TaskExit is dropped: containerd
/// reads all other state again after a restart.
#[derive(Default)]
struct Queue {
    items: Mutex<VecDeque<Item>>,
    changed: Notify,
}

impl Queue {
    fn items(&self) -> MutexGuard<'_, VecDeque<Item>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Item) {
        let mut items = self.items();
        if items.len() >= QUEUE_CAPACITY {
            let is_droppable = |item: &Item| matches!(item, Item::Event(event) if event.topic != topics::TASK_EXIT_EVENT_TOPIC);
            let index = items.iter().position(is_droppable).unwrap_or(0);
            if let Some(Item::Event(event)) = items.remove(index) {
                tracing::warn!(topic = event.topic, "the event queue is full, an event is dropped");
            }
        }
        items.push_back(item);
        drop(items);
        self.changed.notify_one();
    }

    async fn pop(&self) -> Item {
        loop {
            if let Some(item) = self.items().pop_front() {
                return item;
            }
            self.changed.notified().await;
        }
    }
}

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
}

pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

/// An `Any` as containerd's typeurl encodes it: the type URL has no host.
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
        let queue = Arc::new(Queue::default());
        tokio::spawn(forward_events(address, queue.clone()));
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
        self.queue.push(Item::Event(Box::new(envelope)));
    }

    /// Waits until all events published before are delivered, for at most [`FLUSH_TIMEOUT`].
    pub(crate) async fn flush(&self) {
        let (done, delivered) = oneshot::channel();
        self.queue.push(Item::Flush(done));
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, delivered).await;
    }
}

async fn forward_events(address: String, queue: Arc<Queue>) {
    let mut client: Option<EventsClient> = None;
    loop {
        let envelope = match queue.pop().await {
            Item::Event(envelope) => *envelope,
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let topic = envelope.topic.clone();
        let request =
            ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let mut backoff = MIN_BACKOFF;
        loop {
            match send(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(error) if is_rejection(&error) => {
                    tracing::warn!(topic, %error, "containerd rejects an event");
                    break;
                }
                Err(error) => {
                    tracing::debug!(topic, %error, "delivery of an event failed, it is retried");
                    client = None;
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(MAX_BACKOFF);
                }
            }
        }
    }
}

/// Whether containerd has handled the event and refused it; it would refuse it again.
fn is_rejection(error: &Error) -> bool {
    let Error::RpcStatus(status) = error else { return false };
    let transient =
        [Code::UNAVAILABLE, Code::DEADLINE_EXCEEDED, Code::CANCELLED, Code::RESOURCE_EXHAUSTED];
    !transient.iter().any(|code| status.code == (*code).into())
}

async fn connect(address: &str) -> Result<EventsClient, Error> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    // ttrpc's own connect would have no timeout.
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await;
    let stream = match connected {
        Ok(stream) => stream.map_err(|error| Error::Socket(format!("{path}: {error}")))?,
        Err(_) => return Err(Error::Socket(format!("{path}: connecting timed out"))),
    };
    Ok(EventsClient::new(Client::new(Socket::new(stream))))
}

async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), Error> {
    let connected = match client.take() {
        Some(client) => client,
        None => connect(address).await?,
    };
    let timeout = i64::try_from(CALL_TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    let result = connected.forward(context::with_timeout(timeout), request).await;
    *client = Some(connected);
    result.map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskExit, TaskStart};
    use containerd_shim_protos::shim_async::{Events, create_events};
    use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
    use containerd_shim_protos::ttrpc::asynchronous::{Server, TtrpcContext};
    use containerd_shim_protos::ttrpc::get_status;
    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn an_event_has_the_type_url_that_containerd_expects() {
        let event = TaskStart { container_id: "c".into(), pid: 7, ..Default::default() };
        let any = any(&event);
        assert_eq!(any.type_url, "containerd.events.TaskStart");
        assert_eq!(any.value, b"\x0a\x01c\x10\x07");
        let at = UNIX_EPOCH + Duration::new(5, 7);
        assert_eq!((timestamp(at).seconds, timestamp(at).nanos), (5, 7));
    }

    /// containerd's side. Refuses events of the topic "refused".
    struct Receiver(mpsc::UnboundedSender<String>);

    #[async_trait]
    impl Events for Receiver {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> Result<Empty, Error> {
            let topic = request.envelope.topic.clone();
            let _ = self.0.send(topic.clone());
            if topic == "refused" {
                return Err(Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, "refused")));
            }
            Ok(Empty::new())
        }
    }

    async fn serve(socket: &Path) -> (Server, mpsc::UnboundedReceiver<String>) {
        let _ = std::fs::remove_file(socket);
        let (topics, received) = mpsc::unbounded_channel();
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let services = create_events(Arc::new(Receiver(topics)));
        let mut server =
            Server::new().add_listener(Listener::from(listener)).register_service(services);
        server.start().await.unwrap();
        (server, received)
    }

    async fn next(received: &mut mpsc::UnboundedReceiver<String>) -> String {
        tokio::time::timeout(Duration::from_secs(30), received.recv()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn events_are_delivered_in_order_after_containerd_was_down() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock.ttrpc");
        let publisher = Publisher::start("default".into(), format!("unix://{}", socket.display()));
        let publish = |topic: &str| publisher.publish(topic, &TaskExit::default());
        publish("1");
        publish("refused");
        publish("2");
        // The first attempts fail, for longer than the sum of the first pauses.
        tokio::time::sleep(Duration::from_millis(400)).await;
        let (mut server, mut received) = serve(&socket).await;
        for topic in ["1", "refused", "2"] {
            assert_eq!(next(&mut received).await, topic);
        }
        server.shutdown().await.unwrap();
        drop(server);
        publish("3");
        publish("4");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (_server, mut received) = serve(&socket).await;
        assert_eq!(next(&mut received).await, "3");
        assert_eq!(next(&mut received).await, "4");
        tokio::time::timeout(Duration::from_secs(10), publisher.flush()).await.unwrap();
    }

    #[tokio::test]
    async fn a_full_queue_keeps_all_exits_and_their_order() {
        let queue = Queue::default();
        let push = |topic: &str| {
            queue.push(Item::Event(Box::new(Envelope {
                topic: topic.into(),
                ..Default::default()
            })));
        };
        push(topics::TASK_START_EVENT_TOPIC);
        for _ in 0..10 {
            push(topics::TASK_EXIT_EVENT_TOPIC);
        }
        for n in 0..QUEUE_CAPACITY {
            push(&n.to_string());
        }
        assert_eq!(queue.items().len(), QUEUE_CAPACITY);
        for _ in 0..10 {
            let Item::Event(event) = queue.pop().await else { panic!("not an event") };
            assert_eq!(event.topic, topics::TASK_EXIT_EVENT_TOPIC);
        }
        let Item::Event(event) = queue.pop().await else { panic!("not an event") };
        assert_eq!(event.topic, "10");
    }
}
