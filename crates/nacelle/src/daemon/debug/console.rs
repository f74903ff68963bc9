//! The console output of a guest, optionally followed.

use std::time::Duration;

use cri::errors::sandbox_status;
use sandbox::Sandboxes;
use sandbox::model::PodState;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::streamed::Streamed;
use crate::api;

/// Between two reads of a console that is followed.
const INTERVAL: Duration = Duration::from_millis(100);
/// Chunks queued for a slow reader.
const AHEAD: usize = 4;
const CHUNK: usize = 64 << 10;

pub(super) fn console(
    sandboxes: &Sandboxes,
    request: api::ConsoleRequest,
) -> Result<Streamed<api::ConsoleChunk>, Status> {
    let pod = sandboxes.pod(&request.pod).map_err(sandbox_status)?.id;
    let sandboxes = sandboxes.clone();
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let mut from = request.from;
        loop {
            let last = sandboxes.pod(&pod).map_or(true, |view| view.state != PodState::Ready);
            match sandboxes.console(&pod, from) {
                Ok((data, next)) => {
                    from = next;
                    for part in data.chunks(CHUNK) {
                        let chunk = api::ConsoleChunk { data: part.to_vec(), next };
                        if sender.send(Ok(chunk)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) => {
                    let _ = sender.send(Err(sandbox_status(error))).await;
                    return;
                }
            }
            if !request.follow || last {
                return;
            }
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}
