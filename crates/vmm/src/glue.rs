//! Implements the PCI crate's traits on KVM: MSI-X vectors as interrupt routes, doorbells as
//! ioeventfds.

use std::io;

use machine::interrupts::{InterruptError, InterruptRoute, Interrupts, Message};
use pci::MsixMessage;
use vmm_sys_util::eventfd::EventFd;

/// The vectors of one device.
pub(crate) struct Vectors {
    routes: Vec<InterruptRoute>,
}

impl Vectors {
    pub(crate) fn new(interrupts: &Interrupts, count: u16) -> Result<Self, InterruptError> {
        Ok(Self { routes: (0..count).map(|_| interrupts.allocate()).collect::<Result<_, _>>()? })
    }

    fn route(&self, vector: u16) -> io::Result<&InterruptRoute> {
        self.routes.get(usize::from(vector)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl pci::Vectors for Vectors {
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()> {
        let route = self.route(vector)?;
        let MsixMessage { address, data, masked } = message;
        if masked { route.mask() } else { route.unmask(Message { address, data }) }
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        self.route(vector)?.trigger()
    }

    fn event(&self, vector: u16) -> io::Result<EventFd> {
        self.route(vector)?.event()
    }
}

/// The VM's doorbells.
pub(crate) struct Doorbells(pub(crate) machine::interrupts::Doorbells);

impl pci::Doorbells for Doorbells {
    fn bind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.bind(address, event)
    }

    fn unbind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.unbind(address, event)
    }
}
