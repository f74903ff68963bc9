//! Drives the transport as a driver does: by register accesses through the bus.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use pci::{Address, Bus, MsixMessage, Plug};
use vm_memory::{Bytes, GuestAddress};

use super::spec::{NO_VECTOR, common};
use super::*;
use crate::mock::{MockQueue, memory};
use crate::rng::Rng;
use crate::worker::Worker;

const WINDOW: u64 = 0x40_0000_0000;

#[derive(Default)]
struct Host {
    programmed: Mutex<Vec<(u16, MsixMessage)>>,
    triggered: AtomicUsize,
    doorbells: Mutex<Vec<u64>>,
}

impl Vectors for Host {
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()> {
        self.programmed.lock().unwrap().push((vector, message));
        Ok(())
    }

    fn trigger(&self, _vector: u16) -> io::Result<()> {
        self.triggered.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

impl Doorbells for Host {
    fn bind(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }

    fn unbind(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let at = doorbells.iter().position(|b| *b == address).expect("bound before");
        doorbells.remove(at);
        Ok(())
    }
}

struct Rig {
    mem: Arc<GuestMemoryMmap>,
    bus: Bus,
    host: Arc<Host>,
    view: DeviceView,
    queue: MockQueue,
    worker: Worker,
}

fn rig() -> Rig {
    rig_over(memory(1 << 20), Granted::all())
}

fn rig_over(mem: Arc<GuestMemoryMmap>, granted: Granted) -> Rig {
    let host = Arc::new(Host::default());
    let worker = Worker::spawn("test", || {}).unwrap();
    let device = VirtioPci::new(
        Box::new(Rng::new().unwrap()),
        (*mem).clone(),
        host.clone(),
        host.clone(),
        worker.handle(),
    )
    .unwrap()
    .with_granted(granted);
    let view = device.view();
    let bus = Bus::new(WINDOW..WINDOW + (1 << 20));
    assert_eq!(bus.add(Box::new(device), Plug::Boot).unwrap(), Address::new(1, 0));
    let rig = Rig { queue: MockQueue::new(mem.clone(), 0x1000, 64), mem, bus, host, view, worker };
    rig.bus.ecam_write(1 << 15 | 4, &[6, 0]);
    rig
}

impl Rig {
    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        for (n, part) in data.chunks_mut(4).enumerate() {
            self.bus.ecam_read(1 << 15 | (offset + 4 * n as u64), part);
        }
        data
    }

    fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; N];
        assert!(self.bus.mmio_read(WINDOW + offset, &mut data));
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&data);
        u64::from_le_bytes(wide)
    }

    fn write<const N: usize>(&self, offset: u64, value: u64) {
        let data: [u8; N] = value.to_le_bytes()[..N].try_into().unwrap();
        assert!(self.bus.mmio_write(WINDOW + offset, &data));
    }

    fn status(&self) -> u8 {
        self.read::<1>(common::DEVICE_STATUS) as u8
    }

    fn set_status(&self, bits: u8) {
        self.write::<1>(common::DEVICE_STATUS, u64::from(bits));
    }

    fn accept(&self, features: u64) {
        self.write::<4>(common::DRIVER_FEATURE_SELECT, 0);
        self.write::<4>(common::DRIVER_FEATURE, features & 0xffff_ffff);
        self.write::<4>(common::DRIVER_FEATURE_SELECT, 1);
        self.write::<4>(common::DRIVER_FEATURE, features >> 32);
    }

    fn set_queue(&self, desc: u64, driver: u64, device: u64) {
        self.write::<2>(common::QUEUE_SELECT, 0);
        self.write::<2>(common::QUEUE_SIZE, 64);
        for (at, value) in [
            (common::QUEUE_DESC, desc),
            (common::QUEUE_DRIVER, driver),
            (common::QUEUE_DEVICE, device),
        ] {
            self.write::<4>(at, value & 0xffff_ffff);
            self.write::<4>(at + 4, value >> 32);
        }
        self.write::<2>(common::QUEUE_ENABLE, 1);
    }

    fn enable_msix(&self) {
        let at = u64::from(self.config::<4>(0x34)[0]);
        assert_eq!(self.config::<4>(at)[0], CAP_MSIX);
        let control = self.config::<4>(at)[3] | 0x80;
        self.bus.ecam_write(1 << 15 | (at + 2), &[self.config::<4>(at)[2], control]);
        for vector in 0..2u64 {
            let entry = layout::MSIX_TABLE + 16 * vector;
            self.write::<4>(entry, 0xfee0_0000);
            self.write::<4>(entry + 8, 0x40 + vector);
            self.write::<4>(entry + 12, 0);
        }
        self.write::<2>(common::CONFIG_VECTOR, 0);
        self.write::<2>(common::QUEUE_SELECT, 0);
        self.write::<2>(common::QUEUE_VECTOR, 1);
        assert_eq!(self.read::<2>(common::QUEUE_VECTOR), 1);
    }

    fn bring_up(&self) {
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.accept(features::COMMON);
        let bits = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(bits);
        assert_eq!(self.status(), bits);
        self.enable_msix();
        self.set_queue(self.queue.desc(), self.queue.driver(), self.queue.device());
        assert_eq!(self.read::<2>(common::QUEUE_ENABLE), 1);
        self.set_status(bits | status::DRIVER_OK);
        assert!(self.view.active());
    }

    fn reset(&self) {
        self.set_status(0);
        eventually("reset", || self.status() == 0);
    }

    /// One request for 16 random bytes, notified through the BAR.
    fn request(&mut self) {
        self.queue.add(&[], &[(0x10000, 16)]);
        self.write::<2>(layout::NOTIFY, 0);
        let queue = &mut self.queue;
        let mut used = None;
        eventually("answer", || {
            used = queue.used();
            used.is_some()
        });
        assert_eq!(used.unwrap().1, 16);
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn capabilities_describe_every_structure() {
    let rig = rig();
    assert_eq!(u32::from_le_bytes(rig.config(0)), 0x1044_1af4);
    let mut at = u64::from(rig.config::<4>(0x34)[0]);
    let mut found = Vec::new();
    while at != 0 {
        let cap: [u8; 20] = rig.config(at);
        if cap[0] == CAP_VENDOR {
            let word = |n: usize| u32::from_le_bytes(cap[n..n + 4].try_into().unwrap());
            found.push((cap[3], word(8), word(12)));
            assert_eq!(u64::from(cap[2]), if matches!(cap[3], 2 | 5) { 20 } else { 16 });
        }
        at = u64::from(cap[1]);
    }
    assert_eq!(
        found,
        [(1, 0, 0x3c), (3, 0x1000, 1), (4, 0x2000, 0x1000), (2, 0x3000, 0x1000), (5, 0, 0)]
    );
}

#[test]
fn an_initialized_device_answers_a_request_with_an_interrupt() {
    let mut rig = rig();
    assert!(!rig.view.active());
    rig.bring_up();
    assert_eq!(*rig.host.doorbells.lock().unwrap(), [WINDOW + layout::NOTIFY]);
    assert_eq!(rig.host.programmed.lock().unwrap().len(), 2);
    rig.request();
    eventually("interrupt", || rig.host.triggered.load(Ordering::Acquire) >= 1);
    assert_eq!(rig.view.counters().operations(), 1);
    assert_ne!(rig.mem.read_obj::<[u8; 16]>(GuestAddress(0x10000)).unwrap(), [0; 16]);
}

#[test]
fn a_reset_clears_all_registers_and_the_device_can_be_initialized_again() {
    let mut rig = rig();
    for _ in 0..5 {
        rig.bring_up();
        rig.request();
        rig.reset();
        assert!(!rig.view.active());
        assert!(rig.host.doorbells.lock().unwrap().is_empty());
        assert_eq!(rig.read::<2>(common::QUEUE_ENABLE), 0);
        assert_eq!(rig.read::<2>(common::QUEUE_VECTOR), u64::from(NO_VECTOR));
        assert_eq!(rig.read::<4>(common::QUEUE_DESC), 0);
        rig.mem.write_slice(&[0; 0x4000], GuestAddress(0x1000)).unwrap();
        rig.queue = MockQueue::new(rig.mem.clone(), 0x1000, 64);
    }
    // A kick without an engine.
    rig.write::<2>(layout::NOTIFY, 0);
    assert_eq!(rig.view.counters().operations(), 5);
}

#[test]
fn features_are_refused_without_version_1_or_when_never_offered() {
    let rig = rig();
    let asked = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    for (features, accepted) in [
        (0, false),
        (features::RING_EVENT_IDX, false),
        (features::VERSION_1 | 1 << 5, false),
        (features::VERSION_1 | 1 << 63, false),
        (features::VERSION_1, true),
    ] {
        rig.accept(features);
        rig.set_status(asked);
        assert_eq!(rig.status() & status::FEATURES_OK != 0, accepted, "{features:#x}");
    }
    // Features are fixed after FEATURES_OK.
    rig.accept(features::COMMON);
    rig.write::<4>(common::DRIVER_FEATURE_SELECT, 0);
    assert_eq!(rig.read::<4>(common::DRIVER_FEATURE), 0);
}

#[test]
fn driver_ok_is_refused_without_features_ok_or_after_an_invalid_queue() {
    let rig = rig();
    rig.set_status(0x0f & !status::FEATURES_OK);
    assert_eq!(rig.status() & status::DRIVER_OK, 0);
    rig.reset();
    rig.accept(features::COMMON);
    rig.set_status(0x0b);
    for (desc, driver, device) in [
        (0, 0x2000, 0x3000),
        (0x1001, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (0x1000, 0x2000, (1 << 20) - 8),
        (u64::MAX - 15, 0x2000, 0x3000),
    ] {
        rig.set_queue(desc, driver, device);
        assert_eq!(rig.read::<2>(common::QUEUE_ENABLE), 0, "{desc:#x} {driver:#x} {device:#x}");
    }
    assert_ne!(rig.status() & status::NEEDS_RESET, 0);
    rig.set_status(0x0f);
    assert_eq!(rig.status() & status::DRIVER_OK, 0);
    rig.reset();
    rig.bring_up();
}

#[test]
fn an_invalid_ring_sets_needs_reset_and_a_reset_clears_it() {
    let mut rig = rig();
    rig.bring_up();
    rig.queue.set_avail(999);
    rig.write::<2>(layout::NOTIFY, 0);
    eventually("DEVICE_NEEDS_RESET", || rig.status() & status::NEEDS_RESET != 0);
    assert!(!rig.view.active());
    assert!(rig.host.triggered.load(Ordering::Acquire) >= 1);
    rig.reset();
    rig.mem.write_slice(&[0; 0x4000], GuestAddress(0x1000)).unwrap();
    rig.queue = MockQueue::new(rig.mem.clone(), 0x1000, 64);
    rig.bring_up();
    rig.request();
}

#[test]
fn doorbells_follow_the_address_of_the_bar() {
    let rig = rig();
    rig.bring_up();
    let moved = WINDOW + 0x4_0000;
    rig.bus.ecam_write(1 << 15 | 0x10, &(moved as u32).to_le_bytes());
    assert_eq!(*rig.host.doorbells.lock().unwrap(), [moved + layout::NOTIFY]);
    rig.bus.ecam_write(1 << 15 | 4, &[0, 0]);
    assert!(rig.host.doorbells.lock().unwrap().is_empty());
    rig.bus.ecam_write(1 << 15 | 4, &[6, 0]);
    assert_eq!(*rig.host.doorbells.lock().unwrap(), [moved + layout::NOTIFY]);
}

#[test]
fn the_pci_configuration_access_capability_reaches_the_registers() {
    let rig = rig();
    let mut at = u64::from(rig.config::<4>(0x34)[0]);
    while rig.config::<4>(at)[3] != spec::CFG_PCI || rig.config::<4>(at)[0] != CAP_VENDOR {
        at = u64::from(rig.config::<4>(at)[1]);
    }
    let place = |offset: u64, len: u32| {
        rig.bus.ecam_write(1 << 15 | (at + 8), &(offset as u32).to_le_bytes());
        rig.bus.ecam_write(1 << 15 | (at + 12), &len.to_le_bytes());
    };
    place(common::DEVICE_STATUS, 1);
    rig.bus.ecam_write(1 << 15 | (at + 16), &[1]);
    assert_eq!(rig.status(), 1);
    place(common::NUM_QUEUES, 2);
    assert_eq!(rig.config::<4>(at + 16)[..2], [1, 0]);
    // Outside the BAR or of an invalid width: ignored.
    for (offset, len) in [(layout::SIZE, 4), (layout::SIZE - 2, 4), (0, 3), (0, 0), (u64::MAX, 4)] {
        place(offset, len);
        rig.bus.ecam_write(1 << 15 | (at + 16), &[0xff; 4]);
        rig.config::<4>(at + 16);
    }
    assert_eq!(rig.status(), 1);
}

#[test]
fn an_unplugged_device_unbinds_its_doorbells_and_drops_its_engine() {
    let rig = rig();
    rig.bring_up();
    rig.bus.remove(Address::new(1, 0)).unwrap();
    assert!(rig.host.doorbells.lock().unwrap().is_empty());
    let Rig { host, worker, view, .. } = rig;
    drop(view);
    // The engine holds the last references to the vectors.
    eventually("engine dropped", || Arc::strong_count(&host) == 1);
    worker.stop(Duration::from_secs(5)).unwrap();
}

#[test]
fn a_paused_worker_answers_only_after_resume() {
    let mut rig = rig();
    rig.bring_up();
    rig.worker.handle().pause(Duration::from_secs(5)).unwrap();
    rig.queue.add(&[], &[(0x10000, 16)]);
    rig.write::<2>(layout::NOTIFY, 0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(rig.queue.used().is_none());
    rig.worker.handle().resume().unwrap();
    let queue = &mut rig.queue;
    eventually("answer", || queue.used().is_some());
    // A reset completes during a pause.
    rig.worker.handle().pause(Duration::from_secs(5)).unwrap();
    rig.reset();
}

#[test]
fn a_device_can_be_reset_after_its_worker_has_stopped() {
    let rig = rig();
    rig.bring_up();
    let handle = rig.worker.handle();
    handle.stop();
    let Rig { bus, worker, .. } = rig;
    worker.stop(Duration::from_secs(5)).unwrap();
    assert!(handle.pause(Duration::from_millis(100)).is_err());
    let read_status = || {
        let mut data = [0];
        bus.mmio_read(WINDOW + common::DEVICE_STATUS, &mut data);
        data[0]
    };
    assert!(bus.mmio_write(WINDOW + common::DEVICE_STATUS, &[0]));
    eventually("reset", || read_status() == 0);
}

const HOTPLUG: std::ops::Range<u64> = (2 << 20)..(3 << 20);

/// Memory with a hotplug region that is mapped PROT_NONE: an access ends the process.
fn memory_with_protected_hotplug_region() -> Arc<GuestMemoryMmap> {
    use vm_memory::mmap::MmapRegionBuilder;
    let region = MmapRegionBuilder::new((HOTPLUG.end - HOTPLUG.start) as usize)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(HOTPLUG.start)).unwrap();
    let mem = memory(1 << 20);
    Arc::new(mem.insert_region(Arc::new(region)).unwrap())
}

#[test]
fn a_ring_in_memory_that_is_not_granted_sets_needs_reset() {
    let (inside, end) = (HOTPLUG.start, HOTPLUG.end);
    let good = MockQueue::new(memory(1 << 20), 0x1000, 64);
    let (desc, driver, device) = (good.desc(), good.driver(), good.device());
    for (desc, driver, device) in [
        (inside, driver, device),
        (desc, inside, device),
        (desc, driver, inside),
        (desc, driver, end - 0x1000),
    ] {
        let rig = rig_over(memory_with_protected_hotplug_region(), Granted::with_hotplug(HOTPLUG));
        rig.set_status(status::ACKNOWLEDGE | status::DRIVER);
        rig.accept(features::COMMON);
        rig.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        rig.set_queue(desc, driver, device);
        assert_eq!(rig.read::<2>(common::QUEUE_ENABLE), 0);
        assert_ne!(rig.status() & status::NEEDS_RESET, 0);
        rig.set_status(0xf);
        assert!(!rig.view.active());
    }
}

#[test]
fn a_chain_in_memory_that_is_not_granted_is_returned_with_length_0() {
    let mut rig = rig_over(memory_with_protected_hotplug_region(), Granted::with_hotplug(HOTPLUG));
    rig.bring_up();
    // An indirect table, and buffers at both ends of the region.
    rig.queue.write_desc(63, HOTPLUG.start, 32, 4, 0);
    rig.queue.publish(63);
    rig.queue.add(&[], &[(HOTPLUG.start, 16)]);
    rig.queue.add(&[], &[(HOTPLUG.end - 16, 16)]);
    rig.write::<2>(layout::NOTIFY, 0);
    let mut used = Vec::new();
    eventually("buffers back", || {
        used.extend(rig.queue.used().map(|(_, written)| written));
        used.len() == 3
    });
    assert_eq!(used, [0, 0, 0]);
    rig.request();
}

#[test]
fn memory_granted_while_the_device_runs_can_be_used() {
    let all = [(GuestAddress(0), 1 << 20), (GuestAddress(HOTPLUG.start), 1 << 20)];
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&all).unwrap());
    let granted = Granted::with_hotplug(HOTPLUG);
    let mut rig = rig_over(mem, granted.clone());
    rig.bring_up();
    for (bytes, wanted) in [(0, 0), (0x1000, 16)] {
        granted.grant(bytes);
        rig.queue.add(&[], &[(HOTPLUG.start + 0xff0, 16)]);
        rig.write::<2>(layout::NOTIFY, 0);
        let mut used = None;
        eventually("answer", || {
            used = rig.queue.used();
            used.is_some()
        });
        assert_eq!(used.unwrap().1, wanted);
    }
}

/// A rig over the same memory, with the queue of `former`.
fn continued(former: Rig) -> Rig {
    let Rig { mem, queue, .. } = former;
    let rig = rig_over(mem, Granted::all());
    // The state that the rig has written belongs to a driver that has scanned the bus.
    rig.bus.ecam_write(1 << 15 | 4, &[0, 0]);
    Rig { queue, ..rig }
}

fn saved(rig: &Rig) -> String {
    rig.worker.handle().pause(Duration::from_secs(10)).unwrap();
    serde_json::to_string(&rig.bus.save().unwrap()).unwrap()
}

#[test]
fn a_loaded_device_continues_with_the_queues_of_the_saved_one() {
    let mut rig = rig();
    rig.bring_up();
    for _ in 0..100 {
        rig.request();
    }
    let state = saved(&rig);
    // Made available after the device was paused, without a notification that reaches the new one.
    rig.queue.add(&[], &[(0x20000, 16)]);
    let mut rig = continued(rig);
    rig.bus.load(serde_json::from_str(&state).unwrap()).unwrap();
    assert!(rig.view.active());
    assert_eq!(*rig.host.doorbells.lock().unwrap(), [WINDOW + layout::NOTIFY]);
    assert_eq!(rig.host.programmed.lock().unwrap().len(), 2);
    assert!(rig.host.triggered.load(Ordering::Acquire) >= 1, "no interrupt after the load");
    let queue = &mut rig.queue;
    eventually("the request of before", || queue.used().is_some());
    rig.request();
    assert_eq!(rig.view.counters().operations(), 2);
    rig.reset();
    assert_eq!(rig.read::<2>(common::QUEUE_ENABLE), 0);
}

#[test]
fn a_device_that_no_driver_uses_is_loaded_without_an_engine() {
    let rig = rig();
    rig.set_status(status::ACKNOWLEDGE | status::DRIVER);
    rig.write::<4>(common::DRIVER_FEATURE_SELECT, 1);
    let state = saved(&rig);
    let rig = continued(rig);
    rig.bus.load(serde_json::from_str(&state).unwrap()).unwrap();
    assert_eq!(rig.status(), status::ACKNOWLEDGE | status::DRIVER);
    assert_eq!(rig.read::<4>(common::DRIVER_FEATURE_SELECT), 1);
    assert!(!rig.view.active());
}

#[test]
fn a_state_that_does_not_fit_the_device_is_refused() {
    type Edit = fn(&mut serde_json::Value);
    let edits: [(&str, Edit); 9] = [
        ("size", |s| s["queues"][0]["size"] = 3.into()),
        ("descriptor table", |s| s["queues"][0]["desc"] = (1u64 << 40).into()),
        ("device ring", |s| s["queues"][0]["device"] = u64::MAX.into()),
        ("number of queues", |s| s["queue_vectors"] = serde_json::json!([])),
        ("device status", |s| s["status"] = 0x2f.into()),
        ("features", |s| s["driver_features"] = u64::MAX.into()),
        ("MSI-X vectors", |s| s["msix"]["entries"] = serde_json::json!([])),
        ("configuration space", |s| s["config"][0] = 0.into()),
        ("device configuration", |s| s["device_config"][0] = 1.into()),
    ];
    let former = rig();
    former.bring_up();
    let state = saved(&former);
    let mut rig = continued(former);
    for (what, edit) in edits {
        let mut state: serde_json::Value = serde_json::from_str(&state).unwrap();
        // Function 0 is the host bridge.
        edit(&mut state["functions"][1]["state"]);
        rig = continued(rig);
        let refused = rig.bus.load(serde_json::from_value(state).unwrap()).unwrap_err();
        let source = std::error::Error::source(&refused).unwrap().to_string();
        assert!(source.contains(what), "{what}: {source}");
        assert!(!rig.view.active(), "{what}");
    }
}
