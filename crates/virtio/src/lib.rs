//! Virtio 1.2 devices over PCI: block, net, vsock, fs (served by another process), rng, console,
//! mem, balloon.
//!
//! The guest is hostile: every byte in its memory and every register write is an attack until
//! checked. A malformed descriptor chain is handed back unused and counted; an impossible ring
//! state sets DEVICE_NEEDS_RESET; every size a guest or a peer chooses has a named cap.
//!
//! - [`device`]: what a device is to its transport ([`VirtioDevice`]), and the part of it that runs
//!   once the driver is ready ([`Engine`]).
//! - [`worker`]: the epoll thread that runs engines. vCPU threads never touch a queue.
//! - [`pci`]: the transport (virtio 1.2, section 4.1).
//! - [`queue`], [`chain`]: the only code that reads rings and turns guest addresses into memory.
//!
//! Has never heard of KVM, of pods, or of the control API. No tokio: threads and epoll.

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
