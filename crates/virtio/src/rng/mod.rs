//! Entropy device (virtio 1.2, section 5.4): fills buffers with `getrandom` of the host.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::chain::Chain;
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, Poll, VirtioDevice, take_queues,
};
use crate::features;
use crate::queue::VirtQueue;

/// Most bytes written per chain (section 5.4.6.2 allows fewer bytes than the buffer's length).
/// Attack: buffers of gigabytes, to keep the worker busy.
const MAX_BYTES: usize = 4096;
/// Chains processed per call, so that other devices of the worker are served too.
const BUDGET: usize = 32;

const REQUESTS: u32 = 0;

/// The device; it has no configuration fields.
#[derive(Debug, Default)]
pub struct Rng {
    counters: Arc<DeviceCounters>,
}

impl Rng {
    pub fn new() -> io::Result<Self> {
        Ok(Self::default())
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        features::COMMON
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn check_saveable(&self) -> Result<(), String> {
        Ok(())
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let [queue] = take_queues(activation.queues)?;
        Ok(Box::new(RngEngine { queue, counters: self.counters.clone() }))
    }
}

struct RngEngine {
    queue: VirtQueue,
    counters: Arc<DeviceCounters>,
}

impl Engine for RngEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), REQUESTS, EventSet::IN)?;
        poll.reschedule(REQUESTS);
        Ok(())
    }

    fn handle(&mut self, _token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        self.queue.clear_kick();
        let mem = self.queue.mem().clone();
        let counters = &self.counters;
        let fill = |chain: &Chain| {
            let mut bytes = [0; MAX_BYTES];
            let wanted = chain.writable.len().min(MAX_BYTES);
            let got = random(&mut bytes[..wanted]);
            let written = chain.writable.write(&mem, 0, &bytes[..got]);
            if written == 0 {
                counters.error();
            } else {
                counters.operation(written as u64);
            }
            written as u32
        };
        if self.queue.serve(BUDGET, fill) {
            poll.reschedule(REQUESTS);
        }
    }
}

/// Fills `bytes` without blocking; returns the number of random bytes.
#[allow(unsafe_code)] // getrandom has no safe wrapper among this crate's dependencies
fn random(bytes: &mut [u8]) -> usize {
    // SAFETY: the pointer and the length describe `bytes`, which is exclusively borrowed.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    usize::try_from(got).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::mock::{MockInterrupt, Runner, activation, memory, queues};

    #[test]
    fn buffers_are_filled_up_to_the_limit_with_different_bytes() {
        let mem = memory(1 << 20);
        let mut rng = Rng::new().unwrap();
        let mut queues = queues(&mem, 0x1000, rng.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        let made = activation(&rng, &queues, interrupt.clone(), rng.features());
        let mut runner = Runner::start(rng.activate(made).unwrap()).unwrap();

        queues[0].add(&[], &[(0x10000, 16), (0x20000, 16)]);
        queues[0].add(&[], &[(0x30000, 64 << 10)]);
        queues[0].add(&[(0x40000, 16)], &[]);
        queues[0].kick();
        assert!(runner.settle(10));
        assert_eq!(queues[0].used().unwrap().1, 32);
        assert_eq!(queues[0].used().unwrap().1, MAX_BYTES as u32);
        assert_eq!(queues[0].used().unwrap().1, 0);
        assert!(interrupt.queues.load(Ordering::Relaxed) >= 1);
        assert_eq!((rng.counters().operations(), rng.counters().errors()), (2, 1));
        let read = |at| mem.read_obj::<[u8; 16]>(GuestAddress(at)).unwrap();
        assert_ne!(read(0x10000), [0; 16]);
        assert_ne!(read(0x10000), read(0x20000));
        assert_eq!(read(0x30000 + MAX_BYTES as u64), [0; 16]);
    }

    #[test]
    fn a_buffer_outside_memory_is_returned_with_length_0_and_the_next_one_is_filled() {
        let mem = memory(1 << 20);
        let mut rng = Rng::new().unwrap();
        let mut queues = queues(&mem, 0x1000, rng.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        let made = activation(&rng, &queues, interrupt.clone(), features::VERSION_1);
        let mut runner = Runner::start(rng.activate(made).unwrap()).unwrap();
        queues[0].add(&[], &[(u64::MAX - 4, 16)]);
        queues[0].add(&[], &[((1 << 20) - 8, 16)]);
        queues[0].add(&[], &[(0x10000, 16)]);
        queues[0].kick();
        assert!(runner.settle(10));
        let used: Vec<u32> = std::iter::from_fn(|| queues[0].used()).map(|u| u.1).collect();
        assert_eq!(used, [0, 0, 16]);
        assert!(!interrupt.reset_wanted.load(Ordering::Relaxed));
    }

    #[test]
    fn an_invalid_ring_index_sets_needs_reset() {
        let mem = memory(1 << 20);
        let mut rng = Rng::new().unwrap();
        let mut queues = queues(&mem, 0x1000, rng.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        let made = activation(&rng, &queues, interrupt.clone(), rng.features());
        let mut runner = Runner::start(rng.activate(made).unwrap()).unwrap();
        queues[0].set_avail(500);
        queues[0].kick();
        assert!(runner.settle(10));
        assert!(interrupt.reset_wanted.load(Ordering::Relaxed));
    }
}
