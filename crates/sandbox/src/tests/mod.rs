//! Tests of the whole crate with a fake network, a fake VMM (a `sleep` process with a control
//! socket) and a fake agent behind its vsock listener. They need root and cgroup v2, no KVM.

mod agent;
mod events;
mod failpoints;
mod failures;
mod hanging_volume;
mod host_pods;
mod lifecycle;
mod listing;
mod observe;
mod reboot;
mod resize;
mod scratch;
mod templates;
mod test_node;
mod unreadable;
mod volumes;
mod warnings;
