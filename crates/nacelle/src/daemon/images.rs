//! Keeps the images of containers: removed ones stay on the disk until the last container made from
//! them, or with them as a volume, is gone.

use std::collections::HashMap;

use image::{Hold, Images};
use sandbox::Sandboxes;
use sandbox::model::{ContainerId, ContainerView, Event, EventKind, Filter, PodId, VolumeSource};
use tokio::sync::broadcast::error::RecvError;

/// What the node's containers hold; runs as long as there are pods to watch.
pub(super) struct Keeper {
    sandboxes: Sandboxes,
    images: Images,
    held: HashMap<ContainerId, (PodId, Vec<Hold>)>,
}

impl Keeper {
    /// Holds the images of the containers that an earlier daemon left, deletes what nobody holds,
    /// and follows what happens from then on.
    pub(super) async fn start(sandboxes: Sandboxes, images: Images) -> Result<(), image::Error> {
        let mut events = sandboxes.events();
        let mut keeper = Self { sandboxes, images, held: HashMap::new() };
        keeper.look();
        let garbage = keeper.images.collect_garbage().await?;
        tracing::info!(
            held = keeper.held.len(),
            images = garbage.images,
            blobs = garbage.blobs,
            bytes = garbage.bytes,
            "images that nobody needs are deleted"
        );
        tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => keeper.follow(&event),
                    // Too many at once; the listing says what they come to.
                    Err(RecvError::Lagged(_)) => keeper.look(),
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Ok(())
    }

    fn look(&mut self) {
        let listed = self.sandboxes.containers(&Filter::default());
        let mut before = std::mem::take(&mut self.held);
        for view in listed {
            let holds = before.remove(&view.id).unwrap_or_else(|| self.hold(&view));
            self.held.insert(view.id, holds);
        }
    }

    fn follow(&mut self, event: &Event) {
        match (event.kind, &event.container) {
            (EventKind::Created, Some(id)) => {
                if let Ok(view) = self.sandboxes.container(id) {
                    let holds = self.hold(&view);
                    self.held.insert(view.id, holds);
                }
            }
            (EventKind::Deleted, Some(id)) => drop(self.held.remove(id)),
            (EventKind::Deleted, None) => self.held.retain(|_, (pod, _)| *pod != event.pod),
            _ => {}
        }
    }

    fn hold(&self, view: &ContainerView) -> (PodId, Vec<Hold>) {
        let volumes = view.spec.volumes.iter().filter_map(|volume| match &volume.source {
            VolumeSource::Image { image, .. } => Some(image.as_path()),
            _ => None,
        });
        let files = volumes.chain([view.spec.rootfs.image.as_path()]);
        (view.pod.clone(), files.filter_map(|file| self.images.hold_file(file)).collect())
    }
}
