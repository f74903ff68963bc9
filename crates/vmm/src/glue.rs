//! Joins the PCI crate's ports to KVM: MSI-X vectors on interrupt lines, doorbells on ioeventfds.

use std::io;

use machine::interrupts::{InterruptError, Interrupts, Line, Message};
use pci::MsixMessage;
use vmm_sys_util::eventfd::EventFd;

/// The vectors of one device.
pub(crate) struct Vectors {
    lines: Vec<Line>,
}

impl Vectors {
    pub(crate) fn new(interrupts: &Interrupts, count: u16) -> Result<Self, InterruptError> {
        Ok(Self { lines: (0..count).map(|_| interrupts.line()).collect::<Result<_, _>>()? })
    }

    fn line(&self, vector: u16) -> io::Result<&Line> {
        self.lines.get(usize::from(vector)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl pci::Vectors for Vectors {
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()> {
        let line = self.line(vector)?;
        let MsixMessage { address, data, masked } = message;
        if masked { line.mask() } else { line.unmask(Message { address, data }) }
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        self.line(vector)?.trigger()
    }

    fn event(&self, vector: u16) -> io::Result<EventFd> {
        self.line(vector)?.event()
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
