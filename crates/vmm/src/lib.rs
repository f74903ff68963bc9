//! `nacelle-vmm`: assembles a virtual machine, runs it, and serves its control socket.
//!
//! ```text
//!   main thread      control socket, signals, exit of the VM            never blocks on a device
//!   control          plug, unplug, pause, resume, resize                may wait for a device
//!   vcpu N           KVM_RUN and its exits
//!   disk, net        engines of the devices (virtio::Worker)
//! ```
//! Does not depend on pods, images or networks: it inherits file descriptors
//! ([`vmm_api::VmConfig`]) and drops all other privileges ([`jail`], [`seccomp`]).

pub mod assemble;
pub mod boot;
pub mod cmdline;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod exit;
mod glue;
pub mod jail;
pub mod log;
mod memory;
pub mod platform;
pub mod seccomp;
pub mod snapshot;
mod tap;
pub mod vcpus;

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    message
}
