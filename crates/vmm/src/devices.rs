//! The devices of a VM: made from descriptors, plugged, pulled, listed. The only file here that
//! knows virtio.
//!
//! Two workers share the devices: `disk` (block, rng, console, fs, mem, balloon) and `net` (net, vsock), so that a
//! burst of packets does not delay the disk. Plugging and pulling may wait for a worker; listing
//! never does: it reads atomics under a lock that is held for moments only.

use std::collections::BTreeMap;
use std::fs::File;
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
use virtio::mem::{Mem, Resize};
use virtio::net::Net;
use virtio::pci::{DeviceView, VirtioPci, vector_count};
use virtio::rng::Rng;
use virtio::vsock::Vsock;
use virtio::{DeviceKind, Granted, VirtioDevice, Worker, WorkerHandle};
use vmm_api::shares::REQUEST_QUEUES_MAX;
use vmm_api::{DeviceStatus, Error};

use crate::console::Console;
use crate::glue;

/// A worker must have finished what is in flight by then, or the pause is refused.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// Everything a device needs from the VM.
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
    /// The guest may have scanned the bus.
    guest_runs: AtomicBool,
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
    /// Connected to the process that serves it.
    pub backend: OwnedFd,
}

impl Devices {
    /// Starts the workers; devices touch no memory but what is granted. `init` runs on each of their threads first.
    pub fn new(
        bus: Arc<pci::Bus>,
        (ram, granted): (Ram, Granted),
        interrupts: Interrupts,
        doorbells: machine::interrupts::Doorbells,
        vcpus_max: u8,
        init: impl Fn() + Send + Clone + 'static,
    ) -> Result<Self, Error> {
        let worker = |name: &str| Worker::spawn(name, init.clone()).map_err(|e| failed(&e));
        Ok(Self {
            bus,
            ram,
            granted,
            interrupts,
            doorbells: Arc::new(glue::Doorbells(doorbells)),
            vcpus_max: vcpus_max.into(),
            disk: worker("disk")?,
            net: worker("net")?,
            plugged: Mutex::default(),
            guest_runs: AtomicBool::new(false),
        })
    }

    /// To be called before the first vCPU runs: what is plugged from now on has to be found by a
    /// rescan.
    pub fn guest_starts(&self) {
        self.guest_runs.store(true, Ordering::Release);
    }

    pub fn add_disk(&self, disk: Disk) -> Result<String, Error> {
        let Disk { serial, file, read_only } = disk;
        let device = Block::new(File::from(file), &serial, read_only).map_err(|e| failed(&e))?;
        self.plug(serial, Box::new(device), true)
    }

    pub fn add_net(&self, net: NetDevice) -> Result<String, Error> {
        let NetDevice { id, tap, mac, mtu } = net;
        let device = Net::new(File::from(tap), mac, mtu).map_err(|e| failed(&e))?;
        self.plug(id, Box::new(device), true)
    }

    pub fn add_fs(&self, fs: FsDevice) -> Result<String, Error> {
        let FsDevice { id, tag, backend } = fs;
        let queues = self.vcpus_max.clamp(1, REQUEST_QUEUES_MAX);
        let device = Fs::new(&tag, backend, queues).map_err(|e| failed(&e))?;
        self.plug(id, Box::new(device), true)
    }

    pub fn add_vsock(&self, cid: u64, listener: OwnedFd) -> Result<String, Error> {
        let device = Vsock::new(cid, UnixListener::from(listener)).map_err(|e| failed(&e))?;
        self.plug("vsock".to_owned(), Box::new(device), false)
    }

    pub fn add_rng(&self) -> Result<String, Error> {
        let device = Rng::new().map_err(|e| failed(&e))?;
        self.plug("rng".to_owned(), Box::new(device), false)
    }

    pub fn add_console(&self, console: Console) -> Result<String, Error> {
        let sink = Box::new(move |bytes: &[u8]| console.write(bytes));
        let device = ConsoleDevice::new(sink).map_err(|e| failed(&e))?;
        self.plug("console".to_owned(), Box::new(device), false)
    }

    /// A device for memory that is plugged in later, which lies in the VM's as a region of its own.
    pub fn add_mem(&self, room: Range<u64>) -> Result<Resize, Error> {
        let device = Mem::new(&self.ram, room).map_err(|e| failed(&e))?;
        let resize = device.resize();
        self.plug("mem".to_owned(), Box::new(device), false)?;
        Ok(resize)
    }

    /// A device by which the guest gives free pages back, in a VM that grows through `room`.
    pub fn add_balloon(&self, room: Option<Resize>) -> Result<String, Error> {
        self.plug("balloon".to_owned(), Box::new(Balloon::new(room)), false)
    }

    /// Plugs a device; returns its PCI address. Only one thread plugs and pulls at a time.
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
            .within(self.granted.clone());
        let view = device.view();
        let plug =
            if self.guest_runs.load(Ordering::Acquire) { pci::Plug::Hot } else { pci::Plug::Boot };
        let address = self.bus.add(Box::new(device), plug).map_err(|error| match error {
            pci::BusError::Full => Error::BusFull { limit: pci::CAPACITY },
            other => failed(&other),
        })?;
        self.plugged().push(Plugged { id, address, view, removable });
        Ok(address.to_string())
    }

    /// Pulls a device by id.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let address = {
            let plugged = self.plugged();
            let Some(found) = plugged.iter().find(|p| p.id == id) else {
                return Err(Error::NoSuchDevice { id: id.to_owned() });
            };
            let refused =
                |why: &str| Error::NotRemovable { id: id.to_owned(), why: why.to_owned() };
            if !found.removable {
                return Err(refused("the VM cannot live without it"));
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

    pub fn list(&self) -> Vec<DeviceStatus> {
        let status = |p: &Plugged| DeviceStatus {
            id: p.id.clone(),
            kind: p.view.kind().name().to_owned(),
            pci: p.address.to_string(),
            active: p.view.active(),
        };
        self.plugged().iter().map(status).collect()
    }

    pub fn counters(&self) -> BTreeMap<String, vmm_api::DeviceCounters> {
        let counters = |p: &Plugged| {
            let counters = p.view.counters();
            let (operations, bytes) = (counters.operations(), counters.bytes());
            let errors = counters.errors();
            (p.id.clone(), vmm_api::DeviceCounters { operations, bytes, errors })
        };
        self.plugged().iter().map(counters).collect()
    }

    /// Finishes what is in flight and stands still.
    pub fn pause(&self) -> Result<(), Error> {
        for worker in [&self.disk, &self.net] {
            if let Err(error) = worker.handle().pause(PAUSE_LIMIT) {
                self.resume()?;
                return Err(failed(&error));
            }
        }
        Ok(())
    }

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

fn failed(error: &dyn std::error::Error) -> Error {
    Error::Failed { message: crate::chain(error) }
}
