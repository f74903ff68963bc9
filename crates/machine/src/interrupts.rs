//! Message-signalled interrupts into the guest (GSI routes and irqfds) and doorbells out of it
//! (ioeventfds). Linux `Documentation/virt/kvm/api.rst`, 4.52, 4.59, 4.75.
//!
//! A [`Line`] is one GSI with one eventfd. The kernel injects the routed message whenever the
//! eventfd is written, by whomever, without a system call into the VM. Changing a route makes the
//! kernel wait for a grace period, so routes are written only when a message really changes; a
//! masked line keeps its route and is merely cut off from its eventfd, whose count then stays
//! pending and is delivered when the line is unmasked (the semantics MSI-X asks for).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most lines of a VM. KVM routes 4096 GSIs; the attack is a guest that plugs and unplugs its way
/// through them, which is why lines are handed back.
const LINES_MAX: usize = 4096;

/// A message on the bus (PCI Local Bus 3.0, 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    #[error("all {LINES_MAX} interrupt lines are taken")]
    Exhausted,
    #[error("cannot create an eventfd; raise the limit of open files")]
    Eventfd(#[source] io::Error),
}

/// All lines of a VM.
#[derive(Debug, Clone)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    /// Index: GSI.
    lines: Mutex<Vec<Slot>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Taken(Option<Message>),
}

impl Interrupts {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { shared: Arc::new(Shared { vm, lines: Mutex::new(Vec::new()) }) }
    }

    /// A line without a message; it goes back to the pool when dropped.
    pub fn line(&self) -> Result<Line, InterruptError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(InterruptError::Eventfd)?;
        let mut lines = self.shared.lock();
        let gsi = match lines.iter().position(|slot| *slot == Slot::Free) {
            Some(gsi) => gsi,
            None if lines.len() < LINES_MAX => {
                lines.push(Slot::Free);
                lines.len() - 1
            }
            None => return Err(InterruptError::Exhausted),
        };
        lines[gsi] = Slot::Taken(None);
        drop(lines);
        let gsi = gsi as u32;
        Ok(Line { shared: self.shared.clone(), gsi, event, bound: Mutex::new(false) })
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Slot>> {
        // A panic elsewhere leaves the table whole: every change is a single assignment.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut lines = self.lock();
        let slot = &mut lines[gsi as usize];
        let former = *slot;
        if former == Slot::Taken(Some(message)) {
            return Ok(());
        }
        *slot = Slot::Taken(Some(message));
        let done = self.write(&lines);
        if done.is_err() {
            lines[gsi as usize] = former;
        }
        done
    }

    fn write(&self, lines: &[Slot]) -> io::Result<()> {
        let entries: Vec<_> = lines
            .iter()
            .enumerate()
            .filter_map(|(gsi, slot)| match slot {
                Slot::Taken(Some(message)) => Some(route(gsi as u32, *message)),
                Slot::Taken(None) | Slot::Free => None,
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

fn route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// One interrupt line.
#[derive(Debug)]
pub struct Line {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
    bound: Mutex<bool>,
}

impl Line {
    /// Gives the line its message and lets it through.
    pub fn unmask(&self, message: Message) -> io::Result<()> {
        self.shared.set(self.gsi, message)?;
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if !*bound {
            self.shared.vm.register_irqfd(&self.event, self.gsi)?;
            *bound = true;
        }
        Ok(())
    }

    /// Holds interrupts back until [`Self::unmask`].
    pub fn mask(&self) -> io::Result<()> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if *bound {
            self.shared.vm.unregister_irqfd(&self.event, self.gsi)?;
            *bound = false;
        }
        Ok(())
    }

    /// A duplicate of what raises the interrupt, for another process.
    pub fn event(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    /// Raises the interrupt.
    pub fn trigger(&self) -> io::Result<()> {
        match self.event.write(1) {
            // The count is full because nobody takes it: masked, and pending as it should be.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Nothing can be done about a failure; a stale route is harmless without its irqfd, and
        // closing the eventfd detaches that in any case.
        let _ = self.mask();
        self.shared.lock()[self.gsi as usize] = Slot::Free;
    }
}

/// Doorbells of a VM.
#[derive(Debug, Clone)]
pub struct Doorbells {
    vm: Arc<VmFd>,
}

impl Doorbells {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    /// Any write to `address`, of any length, signals `event` and does not leave the kernel.
    pub fn bind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    pub fn unbind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests::vm;

    #[test]
    fn a_dropped_lines_number_is_used_again_and_its_route_forgotten() {
        let Some(vm) = vm() else { return };
        let interrupts = Interrupts::new(vm);
        let (first, second) = (interrupts.line().unwrap(), interrupts.line().unwrap());
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        first.unmask(message).unwrap();
        second.unmask(message).unwrap();
        assert_eq!((first.gsi, second.gsi), (0, 1));
        drop(first);
        let third = interrupts.line().unwrap();
        assert_eq!(third.gsi, 0);
        assert_eq!(interrupts.shared.lock()[0], Slot::Taken(None));
        third.unmask(message).unwrap();
    }

    #[test]
    fn what_is_raised_while_masked_stays_pending() {
        let Some(vm) = vm() else { return };
        let line = Interrupts::new(vm).line().unwrap();
        line.unmask(Message { address: 0xfee0_0000, data: 0x41 }).unwrap();
        line.mask().unwrap();
        line.trigger().unwrap();
        line.trigger().unwrap();
        assert_eq!(line.event.read().unwrap(), 2);
    }

    #[test]
    fn lines_run_out_with_an_error() {
        let Some(vm) = vm() else { return };
        let interrupts = Interrupts::new(vm);
        *interrupts.shared.lock() = vec![Slot::Taken(None); LINES_MAX];
        assert!(matches!(interrupts.line(), Err(InterruptError::Exhausted)));
    }
}
