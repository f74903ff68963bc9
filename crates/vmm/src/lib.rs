//! `nacelle-vmm`: puts a virtual machine together, runs it, and answers for it.
//!
//! ```text
//!   main thread      control socket, signals, end of the VM         never waits for anybody
//!   orders           plug, pull, pause, resume                      may wait for a device
//!   vcpu N           KVM_RUN and what it exits for
//!   disk, net        engines of the devices (virtio::Worker)
//! ```
//! Has never heard of pods, images or networks: it is given descriptors ([`vmm_api::VmConfig`]) and
//! gives up everything else ([`jail`], [`seccomp`]).

pub mod assemble;
pub mod boot;
pub mod cmdline;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod end;
mod glue;
pub mod jail;
pub mod log;
mod memory;
pub mod platform;
pub mod processors;
pub mod seccomp;
mod tap;

/// An error and its causes in one line, for another process or a log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    message
}
