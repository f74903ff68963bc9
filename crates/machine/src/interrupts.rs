//! Message-signalled interrupts (GSI routes and irqfds) and doorbells (ioeventfds). Linux
//! `Documentation/virt/kvm/api.rst`, 4.52, 4.59, 4.75.
//!
//! An [`InterruptRoute`] is one GSI with one eventfd. The kernel injects the routed message
//! whenever any process writes the eventfd. Changing the routing table makes the kernel wait for a
//! grace period, so it is written only when a message changes. A masked route stays in the table;
//! only its irqfd is removed. The eventfd's count then stays pending and is delivered when the
//! route is unmasked, as MSI-X requires.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most GSIs of a VM (`KVM_MAX_IRQ_ROUTES`). They are reused when devices are unplugged.
const GSI_MAX: usize = 4096;

/// A message on the bus (PCI Local Bus 3.0, 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    #[error("all {GSI_MAX} GSIs are in use")]
    Exhausted,
    #[error("cannot create an eventfd; raise the limit of open files")]
    Eventfd(#[source] io::Error),
}

/// Allocates the GSIs of a VM.
#[derive(Debug, Clone)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    /// Index: GSI.
    gsis: Mutex<Vec<GsiState>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GsiState {
    Free,
    /// With the message that is in the routing table, if any.
    Used(Option<Message>),
}

impl Interrupts {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { shared: Arc::new(Shared { vm, gsis: Mutex::new(Vec::new()) }) }
    }

    /// A route without a message; its GSI is free again when it is dropped. Fails if all GSIs are
    /// in use or no eventfd can be created.
    pub fn allocate(&self) -> Result<InterruptRoute, InterruptError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(InterruptError::Eventfd)?;
        let mut gsis = self.shared.lock();
        let gsi = match gsis.iter().position(|state| *state == GsiState::Free) {
            Some(gsi) => gsi,
            None if gsis.len() < GSI_MAX => {
                gsis.push(GsiState::Free);
                gsis.len() - 1
            }
            None => return Err(InterruptError::Exhausted),
        };
        gsis[gsi] = GsiState::Used(None);
        drop(gsis);
        let gsi = gsi as u32;
        Ok(InterruptRoute { shared: self.shared.clone(), gsi, event, bound: Mutex::new(false) })
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<GsiState>> {
        // A panic leaves the table consistent: every change is a single assignment.
        self.gsis.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut gsis = self.lock();
        let state = &mut gsis[gsi as usize];
        let former = *state;
        if former == GsiState::Used(Some(message)) {
            return Ok(());
        }
        *state = GsiState::Used(Some(message));
        let done = self.write(&gsis);
        if done.is_err() {
            gsis[gsi as usize] = former;
        }
        done
    }

    fn write(&self, gsis: &[GsiState]) -> io::Result<()> {
        let entries: Vec<_> = gsis
            .iter()
            .enumerate()
            .filter_map(|(gsi, state)| match state {
                GsiState::Used(Some(message)) => Some(route(gsi as u32, *message)),
                GsiState::Used(None) | GsiState::Free => None,
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

/// One GSI and its eventfd.
#[derive(Debug)]
pub struct InterruptRoute {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
    bound: Mutex<bool>,
}

impl InterruptRoute {
    /// Sets the message and delivers interrupts, pending ones included.
    pub fn unmask(&self, message: Message) -> io::Result<()> {
        self.shared.set(self.gsi, message)?;
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if !*bound {
            self.shared.vm.register_irqfd(&self.event, self.gsi)?;
            *bound = true;
        }
        Ok(())
    }

    /// Stops delivery; interrupts are pending until [`Self::unmask`].
    pub fn mask(&self) -> io::Result<()> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if *bound {
            self.shared.vm.unregister_irqfd(&self.event, self.gsi)?;
            *bound = false;
        }
        Ok(())
    }

    /// A duplicate of the eventfd, for another process.
    pub fn event(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    /// Raises the interrupt.
    pub fn trigger(&self) -> io::Result<()> {
        match self.event.write(1) {
            // EAGAIN: the count is full while the route is masked; the interrupt is pending
            // already.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Drop for InterruptRoute {
    fn drop(&mut self) {
        // An error has no consequence: closing the eventfd removes the irqfd, and a route without
        // irqfd is never used.
        let _ = self.mask();
        self.shared.lock()[self.gsi as usize] = GsiState::Free;
    }
}

/// Doorbells (ioeventfds) of a VM.
#[derive(Debug, Clone)]
pub struct Doorbells {
    vm: Arc<VmFd>,
}

impl Doorbells {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    /// A guest write of any length to the guest-physical `address` signals `event` without an exit
    /// to user space.
    pub fn bind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    /// Removes the ioeventfd that [`Self::bind`] has registered.
    pub fn unbind(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests::vm;

    #[test]
    fn the_gsi_of_a_dropped_route_is_reused_without_its_message() {
        let Some(vm) = vm() else { return };
        let interrupts = Interrupts::new(vm);
        let (first, second) = (interrupts.allocate().unwrap(), interrupts.allocate().unwrap());
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        first.unmask(message).unwrap();
        second.unmask(message).unwrap();
        assert_eq!((first.gsi, second.gsi), (0, 1));
        drop(first);
        let third = interrupts.allocate().unwrap();
        assert_eq!(third.gsi, 0);
        assert_eq!(interrupts.shared.lock()[0], GsiState::Used(None));
        third.unmask(message).unwrap();
    }

    #[test]
    fn interrupts_raised_while_masked_stay_pending() {
        let Some(vm) = vm() else { return };
        let route = Interrupts::new(vm).allocate().unwrap();
        route.unmask(Message { address: 0xfee0_0000, data: 0x41 }).unwrap();
        route.mask().unwrap();
        route.trigger().unwrap();
        route.trigger().unwrap();
        assert_eq!(route.event.read().unwrap(), 2);
    }

    #[test]
    fn allocation_fails_when_all_gsis_are_in_use() {
        let Some(vm) = vm() else { return };
        let interrupts = Interrupts::new(vm);
        *interrupts.shared.lock() = vec![GsiState::Used(None); GSI_MAX];
        assert!(matches!(interrupts.allocate(), Err(InterruptError::Exhausted)));
    }
}
