//! Pulls an image and reports progress.

use cri::errors::image_status;
use image::{Auth, Images, Phase, Progress};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::streamed::Streamed;
use crate::api;

/// Interval of progress messages. Each has the whole state, so a slow reader misses nothing.
const INTERVAL: std::time::Duration = std::time::Duration::from_millis(100);

pub(super) fn pull(images: Images, request: api::PullRequest) -> Streamed<api::PullProgress> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let auth = (!request.username.is_empty()).then(|| Auth {
            username: request.username,
            password: request.password,
            ..Auth::default()
        });
        let (progress, mut seen) = watch::channel(Progress::default());
        let mut pull = Box::pin(images.pull(&request.image, auth, Some(progress)));
        let outcome = loop {
            tokio::select! {
                outcome = &mut pull => break outcome,
                // The client has gone: dropping the future cancels the pull.
                () = sender.closed() => return,
                () = tokio::time::sleep(INTERVAL) => {
                    if seen.has_changed().unwrap_or(false) {
                        let now = to_api(&seen.borrow_and_update());
                        // Does not wait: a reader that has not taken the last message skips this.
                        let _ = sender.try_send(Ok(now));
                    }
                }
            }
        };
        let last = outcome
            .map(|id| api::PullProgress { image_id: id.to_string(), ..to_api(&seen.borrow()) })
            .map_err(image_status);
        let _ = sender.send(last).await;
    });
    Box::pin(ReceiverStream::new(receiver))
}

fn to_api(progress: &Progress) -> api::PullProgress {
    let phase = match progress.phase {
        Phase::Resolving => "resolving",
        Phase::Fetching => "fetching",
        Phase::Building => "building",
        Phase::Done => "done",
    };
    let layers = progress.layers.iter().map(|layer| api::Layer {
        digest: layer.digest.clone(),
        size: layer.size,
        fetched: layer.fetched,
        applied: layer.applied,
    });
    api::PullProgress { phase: phase.into(), layers: layers.collect(), image_id: String::new() }
}
