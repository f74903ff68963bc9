//! `nacelle-fs`: serves hostPath directories and volumes of a pod to its guest over virtio-fs.
//!
//! ```text
//!   nacelled --control socket, detached mounts--> mounter     CAP_SYS_ADMIN, no guest input
//!                                                    | same mount namespace: /shares/<name>
//!   nacelle-vmm --vhost-user: memory, rings, fds--> server   the tenant's files, guest input
//! ```
//! Two processes per pod, started for the pod's first share:
//!
//! - [`mounter`]: the first process of the pid namespace. It mounts what the daemon passes below
//!   /shares and unmounts it again, while the guest runs. In shares that follow the host's mounts
//!   it adds and removes copies of them ([`mirror`]). It makes mounts read-only that nobody in the
//!   guest may write to ([`protect`]).
//! - [`serve`]: answers the guest's FUSE requests. The `virtiofsd` crate parses requests and writes
//!   answers; [`passthrough`] is the file system. It has the capabilities to act as any user on
//!   shared files, and no others ([`jail`], [`seccomp`]).
//!
//! The VMM has no access to the files. This crate does not depend on pods, KVM or virtio devices.
//!
//! Neither VMM nor daemon takes part in a request. One thread serves all virtqueues
//! ([`backend`]) and answers their requests in order; the VMM relies on that order when it answers requests
//! after the server has exited. A request that waits for a disk blocks later ones, whatever their share.

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

/// Directory of the shares in the server's root.
pub const SHARES: &str = "/shares";
/// Directory of the mounts that shares following the host's mounts are copies of ([`mirror`]).
pub(crate) const SOURCES: &str = "/sources";
