//! Stories of the whole crate, with a fake network, a fake VMM (a sleeping process with a control
//! socket) and a fake agent behind its vsock listener. They assume root and cgroup v2, nothing
//! else of a host; no KVM.

mod agent;
mod dead_volume;
mod failpoints;
mod follow;
mod host_pods;
mod life;
mod listing;
mod observe;
mod reboot;
mod resize;
mod scratch;
mod trouble;
mod unread;
mod volumes;
mod world;
