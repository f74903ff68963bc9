//! Drives the real binaries end to end, through the real CRI socket, on a host with a real KVM
//! (or in the lab). The stories are in `stories`; the other modules are their helpers.
//!
//! What a story may assume: root, `/dev/kvm`, Debian's CNI plugins, a registry on loopback with the
//! images of [`images`], nacelle's binaries beside the running one, the guest's files in
//! `$NACELLE_GUEST`.

pub mod client;
pub mod host;
pub mod hostile;
pub mod images;
pub mod layout;
pub mod leftovers;
pub mod node;
pub mod registry;
pub mod shard;
pub mod stories;
pub mod wait;
pub mod watch;
