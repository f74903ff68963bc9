//! A container's id and name, reserved while its creation is requested.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::model::ContainerId;
use crate::node::Node;

/// Reservation of a container's id and name; released on drop unless the pod's owner has taken it.
pub(crate) struct Reservation {
    node: Arc<Node>,
    id: Option<ContainerId>,
    /// Cancelled when the caller goes away.
    cancel: CancellationToken,
}

impl Reservation {
    /// After [`crate::registry::Registry::reserve_container`].
    pub(crate) fn new(node: Arc<Node>, id: ContainerId, cancel: CancellationToken) -> Self {
        node.registry.mark_creating(&id);
        Self { node, id: Some(id), cancel }
    }

    /// Passes the responsibility for the release to the creation.
    pub(crate) fn into_cancel_token(mut self) -> CancellationToken {
        self.id = None;
        self.cancel.clone()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.node.registry.release_container(id);
        }
    }
}
