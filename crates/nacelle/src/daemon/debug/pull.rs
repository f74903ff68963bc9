//! A pull that tells how far it is.

use cri::errors::image_status;
use image::{Auth, Images, Phase, Progress};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::Streamed;
use crate::api;

/// A reader that is slower than this sees fewer steps, for each is the latest state.
const PACE: std::time::Duration = std::time::Duration::from_millis(100);

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
                // Nobody waits any more: dropping the pull gives it up.
                () = sender.closed() => return,
                () = tokio::time::sleep(PACE) => {
                    if seen.has_changed().unwrap_or(false) {
                        let now = to_api(&seen.borrow_and_update());
                        // Never waits: a reader that has not taken the last state skips this one.
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
