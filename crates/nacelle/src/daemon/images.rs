//! Keeps the images of containers: a removed image stays on the disk until the last container that
//! uses it, as root file system or volume, is removed.

use std::collections::HashMap;

use image::{Hold, Images};
use sandbox::Sandboxes;
use sandbox::model::{ContainerId, ContainerView, Event, EventKind, Filter, PodId, VolumeSource};
use tokio::sync::broadcast::error::RecvError;

/// The images that containers use; follows events for as long as the daemon runs.
pub(super) struct Keeper {
    sandboxes: Sandboxes,
    images: Images,
    held: HashMap<ContainerId, (PodId, Vec<Hold>)>,
}

impl Keeper {
    /// Holds the images of existing containers, deletes unused ones, then follows events.
    pub(super) async fn start(sandboxes: Sandboxes, images: Images) -> Result<(), image::Error> {
        let mut events = sandboxes.events();
        let mut keeper = Self { sandboxes, images, held: HashMap::new() };
        keeper.resync();
        let garbage = keeper.images.collect_garbage().await?;
        tracing::info!(
            held = keeper.held.len(),
            images = garbage.images,
            blobs = garbage.blobs,
            bytes = garbage.bytes,
            "image garbage collection finished"
        );
        tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => keeper.follow(&event),
                    // Events were lost: list the containers again.
                    Err(RecvError::Lagged(_)) => keeper.resync(),
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Ok(())
    }

    fn resync(&mut self) {
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
