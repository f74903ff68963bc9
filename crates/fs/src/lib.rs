//! `nacelle-fs`: serves a pod's hostPath folders and volumes to its guest, over virtio-fs.
//!
//! ```text
//!   nacelled --control socket, detached mounts--> mounter     CAP_SYS_ADMIN, no guest bytes
//!                                                    | same mount namespace: /shares/<name>
//!   nacelle-vmm --vhost-user: memory, rings, events--> server   the tenant's files, guest bytes
//! ```
//! Two processes, one a pod each, started when the pod's first share is needed:
//!
//! - [`mounter`]: first process of the pid namespace; puts what the daemon hands it below /shares
//!   and takes it away again. Shares come and go while the guest runs; in those that follow the
//!   host's mounts it shows copies of what comes and goes there ([`mirror`]). It keeps read-only what
//!   nobody in the guest may write to ([`protect`]).
//! - [`serve`]: answers the guest's FUSE requests: the `virtiofsd` crate reads and writes them, the
//!   file system is ours ([`passthrough`]). It holds the rights to act as any user on the shared
//!   files and none to do anything else ([`jail`], [`seccomp`]).
//!
//! The VMM has neither the files nor the rights. Has never heard of pods, KVM or virtio devices.
//!
//! Cost: a request makes a detour through neither VMM nor daemon. One thread answers them in order,
//! so a share on a disk that hangs holds up the pod's others; the VMM relies on that order when it
//! answers for a server that died.

mod backend;
pub mod jail;
pub mod log;
mod mirror;
pub mod mounter;
mod passthrough;
mod protect;
pub mod seccomp;
pub mod serve;
mod sys;
mod table;

pub use sys::{adopt, fork, pidfd_open};

/// Where the shares are, in the server's root.
pub const SHARES: &str = "/shares";
/// And what those that follow the host's mounts are copies of ([`mirror`]).
pub(crate) const SOURCES: &str = "/sources";
