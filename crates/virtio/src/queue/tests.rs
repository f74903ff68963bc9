use std::sync::atomic::AtomicU64;

use super::*;
use crate::mock::{MockInterrupt, MockQueue, memory};

const BASE: u64 = 0x1000;

/// A device whose used ring is at `start`, with its driver.
fn queue(
    mem: &Arc<GuestMemoryMmap>,
    size: u16,
    event_idx: bool,
    start: u16,
) -> (MockQueue, VirtQueue, Arc<MockInterrupt>) {
    let driver = MockQueue::new(mem.clone(), BASE, size);
    let interrupt = Arc::new(MockInterrupt::default());
    let kick = driver.kick.try_clone().unwrap();
    let made = driver.queue(event_idx);
    let counters = Arc::new(DeviceCounters::default());
    let mut device = VirtQueue::new(0, made, kick, mem.clone(), interrupt.clone(), counters);
    mem.write_obj(start.to_le(), GuestAddress(driver.device() + RING_IDX)).unwrap();
    device.resume_at_used_index();
    (driver, device, interrupt)
}

fn interrupts(of: &AtomicU64) -> u64 {
    of.swap(0, Ordering::AcqRel)
}

#[test]
fn chains_of_one_call_become_visible_together() {
    let mem = memory(1 << 20);
    let (driver, mut device, _) = queue(&mem, 8, false, 0xfffd);
    device.push_all((0..5).map(|head| {
        assert_eq!(driver.used_index(), 0xfffd, "before chain {head}");
        (head, 100 + u32::from(head))
    }));
    assert_eq!(driver.used_index(), 2);
    for (slot, head) in [5u64, 6, 7, 0, 1].into_iter().zip(0u32..) {
        let at = GuestAddress(driver.device() + RING_HEADER + USED_ELEMENT * slot);
        assert_eq!(mem.read_obj::<[u32; 2]>(at).unwrap(), [head, 100 + head]);
    }
}

/// With EVENT_IDX the driver is interrupted if and only if the chain at index `used_event` was added
/// since the last decision (section 2.7.10), by one call or by several.
#[test]
fn with_event_idx_the_chain_that_the_driver_waits_for_causes_the_interrupt() {
    let mem = memory(1 << 20);
    for start in [0, 7, 0x7ffe, 0xfff0, 0xffff] {
        let (driver, mut device, interrupt) = queue(&mem, 8, true, start);
        for (count, offset) in (1..=8).flat_map(|count| (-10..=10).map(move |at| (count, at))) {
            for one_call in [true, false] {
                let first = driver.used_index();
                let event = first.wrapping_add_signed(offset);
                driver.set_used_event(event);
                if one_call {
                    device.push_all((0..count).map(|head| (head, 1)));
                } else {
                    (0..count).for_each(|head| device.push(head, 1));
                }
                device.signal_used();
                let wanted = (0..count as i16).contains(&offset);
                let case = format!("{count} chains from {first:#x}, used_event {event:#x}");
                assert_eq!(interrupts(&interrupt.queues), u64::from(wanted), "{case}");
                device.signal_used();
                assert_eq!(interrupts(&interrupt.queues), 0, "again without chains: {case}");
            }
        }
    }
}

#[test]
fn used_chains_that_cannot_be_written_are_not_published() {
    // Only the first two of eight elements lie in memory.
    let end = MockQueue::new(memory(1 << 20), BASE, 8).device() + RING_HEADER + 2 * USED_ELEMENT;
    let mem = memory(end as usize);
    let (driver, mut device, interrupt) = queue(&mem, 8, false, 0);
    device.push_all([(0, 1), (1, 1), (2, 1)]);
    assert!(device.is_broken());
    assert!(interrupt.reset_wanted.load(Ordering::Acquire));
    device.push(0, 1);
    device.signal_used();
    assert_eq!((driver.used_index(), interrupts(&interrupt.queues)), (0, 0));
}

#[test]
fn a_head_outside_of_the_descriptor_table_is_not_published() {
    let mem = memory(1 << 20);
    let (driver, mut device, interrupt) = queue(&mem, 8, false, 0);
    device.push_all([(7, 1), (8, 1)]);
    assert!(device.is_broken());
    assert!(interrupt.reset_wanted.load(Ordering::Acquire));
    assert_eq!(driver.used_index(), 0);
}
