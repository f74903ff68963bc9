//! Virtio 1.2 devices over PCI: block, net, vsock, fs (vhost-user front end), rng, console, mem,
//! balloon.
//!
//! The guest is hostile: bytes in its memory and register writes are checked before use. A
//! malformed descriptor chain is returned with length 0 and counted; an invalid ring index sets
//! DEVICE_NEEDS_RESET; every size that a guest or a peer chooses has a named cap.
//!
//! - [`device`]: a device as its transport sees it ([`VirtioDevice`]), and its data path
//!   ([`Engine`]).
//! - [`worker`]: the epoll thread that runs engines. vCPU threads never access a queue.
//! - [`pci`]: the transport (virtio 1.2, section 4.1).
//! - [`queue`], [`chain`]: the only code that reads rings and converts guest addresses.
//!
//! Does not depend on KVM, pods or the control API. Threads and epoll, no async runtime.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod device;
mod discard;
pub mod features;
pub mod fs;
pub mod granted;
pub mod limit;
pub mod mem;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod vsock;
pub mod worker;

pub use device::{Activation, DeviceCounters, DeviceKind, Engine, Interrupt, Poll, VirtioDevice};
pub use granted::Granted;
pub use worker::{Worker, WorkerError, WorkerHandle};
