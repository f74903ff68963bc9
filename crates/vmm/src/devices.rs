//! The devices of a VM: created from file descriptors, plugged, unplugged, listed.
//!
//! Two workers run the devices: `disk` (block, rng, console, fs, mem, balloon) and `net` (net,
//! vsock), so that bursts of packets do not delay disks. `net` does not preempt the vCPUs. Plugging
//! and unplugging may wait for a worker; listing does not: it reads atomics under a lock that is
//! held briefly.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machine::Ram;
use machine::interrupts::Interrupts;
use virtio::balloon::Balloon;
use virtio::blk::Block;
use virtio::console::Console as ConsoleDevice;
use virtio::fs::Fs;
use virtio::mem::{Mem, ResizeHandle};
use virtio::net::Net;
use virtio::pci::{DeviceView, VirtioPci, vector_count};
use virtio::rng::Rng;
use virtio::vsock::Vsock;
use virtio::{DeviceKind, Granted, VirtioDevice, Worker, WorkerError, WorkerHandle};
use vmm_api::shares::REQUEST_QUEUES_MAX;
use vmm_api::{DeviceStatus, Error};

use crate::console::Console;
use crate::glue;

/// Deadline for a worker to drain its devices; after it the pause fails.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// The devices, and what they need from the VM.
pub struct Devices {
    bus: Arc<pci::Bus>,
    ram: Ram,
    granted: Granted,
    interrupts: Interrupts,
    doorbells: Arc<dyn pci::Doorbells>,
    /// vCPUs that the VM can have.
    vcpus_max: u16,
    disk: Worker,
    net: Worker,
    plugged: Mutex<Vec<Plugged>>,
    /// vCPUs run, so the guest may have scanned the bus.
    guest_running: AtomicBool,
}

struct Plugged {
    id: String,
    address: pci::Address,
    view: DeviceView,
    removable: bool,
}

/// A network interface to plug.
#[derive(Debug)]
pub struct NetDevice {
    pub id: String,
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub mtu: u16,
}

/// A disk to plug.
#[derive(Debug)]
pub struct Disk {
    pub serial: String,
    pub file: OwnedFd,
    pub read_only: bool,
}

/// A file system to plug.
#[derive(Debug)]
pub struct FsDevice {
    pub id: String,
    pub tag: String,
    /// Connected vhost-user socket of the backend.
    pub backend: OwnedFd,
}

impl Devices {
    /// Starts the workers; `init` runs first on each of their threads. Devices access granted
    /// memory only.
    pub fn new(
        bus: Arc<pci::Bus>,
        (ram, granted): (Ram, Granted),
        interrupts: Interrupts,
        doorbells: machine::interrupts::Doorbells,
        vcpus_max: u8,
        init: impl Fn() + Send + Clone + 'static,
    ) -> Result<Self, Error> {
        let disk = Worker::spawn("disk", init.clone()).map_err(|e| failed(&e))?;
        let net = spawn_net(init).map_err(|e| failed(&e))?;
        Ok(Self {
            bus,
            ram,
            granted,
            interrupts,
            doorbells: Arc::new(glue::Doorbells(doorbells)),
            vcpus_max: vcpus_max.into(),
            disk,
            net,
            plugged: Mutex::default(),
            guest_running: AtomicBool::new(false),
        })
    }

    /// To be called before the first vCPU runs: devices plugged from then on are found by a rescan
    /// only.
    pub fn set_guest_running(&self) {
        self.guest_running.store(true, Ordering::Release);
    }

    /// Plugs a disk (virtio-blk). Fails if the file or the serial is invalid, or the id is in use.
    pub fn add_disk(&self, disk: Disk) -> Result<String, Error> {
        let Disk { serial, file, read_only } = disk;
        let device = Block::new(File::from(file), &serial, read_only).map_err(|e| failed(&e))?;
        self.plug(serial, Box::new(device), true)
    }

    /// Plugs a network interface (virtio-net).
    pub fn add_net(&self, net: NetDevice) -> Result<String, Error> {
        let NetDevice { id, tap, mac, mtu } = net;
        let device = Net::new(File::from(tap), mac, mtu).map_err(|e| failed(&e))?;
        self.plug(id, Box::new(device), true)
    }

    /// Plugs a file system (virtio-fs) that a vhost-user back end serves.
    pub fn add_fs(&self, fs: FsDevice) -> Result<String, Error> {
        let FsDevice { id, tag, backend } = fs;
        let queues = self.vcpus_max.clamp(1, REQUEST_QUEUES_MAX);
        let device = Fs::new(&tag, backend, queues).map_err(|e| failed(&e))?;
        self.plug(id, Box::new(device), true)
    }

    /// Plugs the vsock device; `listener` is the unix socket for host clients.
    pub fn add_vsock(&self, cid: u64, listener: OwnedFd) -> Result<String, Error> {
        let device = Vsock::new(cid, UnixListener::from(listener)).map_err(|e| failed(&e))?;
        self.plug("vsock".to_owned(), Box::new(device), false)
    }

    /// Plugs the entropy device.
    pub fn add_rng(&self) -> Result<String, Error> {
        let device = Rng::new().map_err(|e| failed(&e))?;
        self.plug("rng".to_owned(), Box::new(device), false)
    }

    /// Plugs the console, whose output goes to `console`.
    pub fn add_console(&self, console: Console) -> Result<String, Error> {
        let sink = Box::new(move |bytes: &[u8]| console.write(bytes));
        let device = ConsoleDevice::new(sink).map_err(|e| failed(&e))?;
        self.plug("console".to_owned(), Box::new(device), false)
    }

    /// The memory device for the hotplug region of guest memory.
    pub fn add_mem(&self, region: Range<u64>) -> Result<ResizeHandle, Error> {
        let device = Mem::new(&self.ram, region).map_err(|e| failed(&e))?;
        let resize = device.resize_handle();
        self.plug("mem".to_owned(), Box::new(device), false)?;
        Ok(resize)
    }

    /// The balloon device for free page reporting; `hotplug` is that of [`Self::add_mem`].
    pub fn add_balloon(&self, hotplug: Option<ResizeHandle>) -> Result<String, Error> {
        self.plug("balloon".to_owned(), Box::new(Balloon::new(hotplug)), false)
    }

    /// Plugs a device; returns its PCI address. Only one thread at a time plugs and unplugs. Fails
    /// if the id is in use or the bus is full.
    fn plug(
        &self,
        id: String,
        device: Box<dyn VirtioDevice>,
        removable: bool,
    ) -> Result<String, Error> {
        if self.plugged().iter().any(|p| p.id == id) {
            return Err(Error::Exists { id });
        }
        let worker = self.worker(device.kind());
        let vectors =
            glue::Vectors::new(&self.interrupts, vector_count(&*device)).map_err(|e| failed(&e))?;
        let (vectors, doorbells) = (Arc::new(vectors), self.doorbells.clone());
        let device = VirtioPci::new(device, self.ram.clone(), vectors, doorbells, worker)
            .map_err(|e| failed(&e))?
            .with_granted(self.granted.clone());
        let view = device.view();
        let plug = if self.guest_running.load(Ordering::Acquire) {
            pci::Plug::Hot
        } else {
            pci::Plug::Boot
        };
        let address = self.bus.add(Box::new(device), plug).map_err(|error| match error {
            pci::BusError::Full => Error::BusFull { limit: pci::CAPACITY },
            other => failed(&other),
        })?;
        self.plugged().push(Plugged { id, address, view, removable });
        Ok(address.to_string())
    }

    /// Unplugs a device. Fails if there is none with this id, it is not removable, or the guest's
    /// driver still uses it.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let address = {
            let plugged = self.plugged();
            let Some(found) = plugged.iter().find(|p| p.id == id) else {
                return Err(Error::NoSuchDevice { id: id.to_owned() });
            };
            let refused =
                |why: &str| Error::NotRemovable { id: id.to_owned(), why: why.to_owned() };
            if !found.removable {
                return Err(refused("it is a device that every VM has"));
            }
            if found.view.active() {
                return Err(refused("the guest's driver still uses it"));
            }
            found.address
        };
        self.bus.remove(address).map_err(|e| failed(&e))?;
        self.plugged().retain(|p| p.id != id);
        Ok(())
    }

    /// Status of all devices, in the order in which they were plugged.
    pub fn list(&self) -> Vec<DeviceStatus> {
        let status = |p: &Plugged| DeviceStatus {
            id: p.id.clone(),
            kind: p.view.kind().name().to_owned(),
            pci: p.address.to_string(),
            active: p.view.active(),
        };
        self.plugged().iter().map(status).collect()
    }

    /// Counters by device id.
    pub fn counters(&self) -> BTreeMap<String, vmm_api::DeviceCounters> {
        let counters = |p: &Plugged| {
            let counters = p.view.counters();
            let (operations, bytes) = (counters.operations(), counters.bytes());
            let errors = counters.errors();
            (p.id.clone(), vmm_api::DeviceCounters { operations, bytes, errors })
        };
        self.plugged().iter().map(counters).collect()
    }

    /// Drains and pauses all devices; resumes them again if a worker misses the deadline.
    pub fn pause(&self) -> Result<(), Error> {
        for worker in [&self.disk, &self.net] {
            if let Err(error) = worker.handle().pause(PAUSE_LIMIT) {
                self.resume()?;
                return Err(failed(&error));
            }
        }
        Ok(())
    }

    /// Resumes all devices after [`Self::pause`].
    pub fn resume(&self) -> Result<(), Error> {
        let (disk, net) = (self.disk.handle().resume(), self.net.handle().resume());
        disk.and(net).map_err(|e| failed(&e))
    }

    fn worker(&self, kind: DeviceKind) -> WorkerHandle {
        match kind {
            DeviceKind::Net | DeviceKind::Vsock => self.net.handle(),
            DeviceKind::Block
            | DeviceKind::Console
            | DeviceKind::Rng
            | DeviceKind::Fs
            | DeviceKind::Mem
            | DeviceKind::Balloon => self.disk.handle(),
        }
    }

    fn plugged(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The `net` worker; `init` runs on its thread after the scheduling policy is set.
fn spawn_net(init: impl FnOnce() + Send + 'static) -> Result<Worker, WorkerError> {
    Worker::spawn("net", move || {
        if let Err(error) = schedule_as_batch() {
            tracing::warn!(%error, "cannot set the scheduling policy of the net thread");
        }
        init();
    })
}

/// Gives the calling thread the policy SCHED_BATCH: when it becomes ready, it does not preempt the
/// thread that runs.
///
/// A driver notifies with the lock of its transmit queue held. If the vCPU and this thread share a
/// CPU, this thread would preempt the vCPU there: it would send one packet for each notification,
/// and its interrupt would make another vCPU spin for the lock. It has no effect on an idle CPU.
#[allow(unsafe_code)] // sched_setscheduler
fn schedule_as_batch() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one `sched_param`; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::Failed { message: crate::chain(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(unsafe_code)] // sched_getscheduler
    fn the_thread_of_the_net_worker_has_the_policy_sched_batch() {
        let (send, policy) = std::sync::mpsc::channel();
        let worker = spawn_net(move || {
            // SAFETY: the call only takes a number; 0 is the calling thread.
            send.send(unsafe { libc::sched_getscheduler(0) }).unwrap();
        });
        let policy = policy.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(policy, libc::SCHED_BATCH);
        worker.unwrap().stop(Duration::from_secs(10)).unwrap();
    }
}
