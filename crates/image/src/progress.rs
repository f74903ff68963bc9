//! Progress of a pull as a watch channel of the latest state: a slow receiver neither blocks the
//! pull nor accumulates a history.

use tokio::sync::watch;

/// Pass the sender to a pull and watch the receiver.
pub type ProgressSender = watch::Sender<Progress>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    /// In order from the lowest layer.
    pub layers: Vec<LayerProgress>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    /// Resolving the name at the registry.
    #[default]
    Resolving,
    /// Fetching layers; complete ones are applied concurrently.
    Fetching,
    /// All layers are fetched; the rest of the image is built.
    Building,
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    pub digest: String,
    /// Compressed bytes.
    pub size: u64,
    pub fetched: u64,
    /// Compressed bytes that were applied to the image.
    pub applied: u64,
}

/// Sending side of [`Progress`].
#[derive(Debug, Clone)]
pub(crate) struct Tracker(watch::Sender<Progress>);

impl Tracker {
    pub fn new() -> Self {
        Self(watch::Sender::default())
    }

    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.0.subscribe()
    }

    pub fn phase(&self, phase: Phase) {
        self.0.send_modify(|progress| progress.phase = phase);
    }

    pub fn layers(&self, layers: impl Iterator<Item = (String, u64)>) {
        let layers = layers
            .map(|(digest, size)| LayerProgress { digest, size, fetched: 0, applied: 0 })
            .collect();
        self.0.send_modify(|progress| progress.layers = layers);
    }

    pub fn fetched(&self, layer: usize, bytes: u64) {
        self.0.send_modify(|progress| progress.layers[layer].fetched = bytes);
    }

    pub fn applied(&self, layer: usize, bytes: u64) {
        self.0.send_modify(|progress| progress.layers[layer].applied = bytes);
    }
}
