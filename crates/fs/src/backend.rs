//! The vhost-user back end: that of `virtiofsd` without the features that this server does not use:
//! state transfer, dirty logging, requests to the VMM.

use std::io;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use virtiofsd::vhost_user::VhostUserFsBackend;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_api::shares::REQUEST_QUEUES_MAX;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::passthrough::Passthrough;

type Inner = VhostUserFsBackend<Passthrough>;
type Bitmap = <Inner as VhostUserBackend>::Bitmap;

/// Dirty logging, for migration (vhost-user, `VHOST_F_LOG_ALL`).
const F_LOG_ALL: u64 = 1 << 26;
pub(crate) struct Backend(pub(crate) Inner);

impl VhostUserBackend for Backend {
    type Bitmap = Bitmap;
    type Vring = <Inner as VhostUserBackend>::Vring;

    fn num_queues(&self) -> usize {
        1 + usize::from(REQUEST_QUEUES_MAX)
    }

    /// One thread serves all queues. More than one needs a lock between the LOOKUP of a name and its
    /// UNLINK or RENAME, which record in the node where its file is found: Linux revalidates names
    /// without the lock of their directory. The requests of a queue must be answered in order, on which
    /// the VMM relies after the server has failed.
    fn queues_per_thread(&self) -> Vec<u64> {
        vec![(1 << self.num_queues()) - 1]
    }

    fn max_queue_size(&self) -> usize {
        self.0.max_queue_size()
    }

    fn features(&self) -> u64 {
        self.0.features() & !F_LOG_ALL
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn set_event_idx(&self, enabled: bool) {
        self.0.set_event_idx(enabled);
    }

    fn update_memory(&self, mem: GuestMemoryAtomic<GuestMemoryMmap<Bitmap>>) -> io::Result<()> {
        self.0.update_memory(mem)
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.0.exit_event(thread)
    }

    fn handle_event(
        &self,
        event: u16,
        set: EventSet,
        vrings: &[Self::Vring],
        thread: usize,
    ) -> io::Result<()> {
        // `event` is an index into the queues of this thread. The crate treats a request queue as it does
        // the hiprio queue, so each is passed as its first one.
        let Some(vring) = vrings.get(usize::from(event)) else { return Ok(()) };
        let handled = self.0.handle_event(0, set, std::slice::from_ref(vring), thread);
        if let Err(error) = &handled {
            // The thread would end and the guest would wait forever; the VMM notices when the
            // process exits.
            eprintln!("nacelle-fs: virtqueue {event} of thread {thread} failed: {error}");
            std::process::exit(1);
        }
        handled
    }
}
