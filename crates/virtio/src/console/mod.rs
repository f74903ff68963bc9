//! Console device with one port (virtio 1.2, section 5.3): guest output goes to a [`Sink`]; there
//! is no input, so receive buffers are never used.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;

use crate::chain::Chain;
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, Poll, VirtioDevice, take_queues,
};
use crate::features;
use crate::queue::VirtQueue;

/// Most bytes taken from one chain; the rest is dropped. Linux sends at most a page.
/// Attack: a chain of gigabytes over the same page, to keep the worker busy.
const MAX_BYTES: usize = 64 << 10;
/// Bytes per call of the sink.
const PIECE: usize = 4 << 10;
/// Chains processed per call, so that other devices of the worker are served too.
const BUDGET: usize = 16;

/// receiveq and transmitq of port 0. Linux fills the first with pages that are never used here; of
/// the second it uses one entry at a time.
const QUEUE_SIZES: [u16; 2] = [4, 16];

const INPUT: u32 = 0;
const OUTPUT: u32 = 1;

/// Takes guest output; called on the worker's thread.
pub type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// The device. Without F_SIZE and F_MULTIPORT it has no configuration fields.
pub struct Console {
    sink: Arc<Mutex<Sink>>,
    counters: Arc<DeviceCounters>,
}

impl Console {
    pub fn new(sink: Sink) -> io::Result<Self> {
        Ok(Self { sink: Arc::new(Mutex::new(sink)), counters: Arc::default() })
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
        let [input, output] = take_queues(activation.queues)?;
        let (sink, counters) = (self.sink.clone(), self.counters.clone());
        Ok(Box::new(ConsoleEngine { input, output, sink, counters }))
    }
}

struct ConsoleEngine {
    input: VirtQueue,
    output: VirtQueue,
    sink: Arc<Mutex<Sink>>,
    counters: Arc<DeviceCounters>,
}

impl Engine for ConsoleEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.input.kick_fd(), INPUT, EventSet::IN)?;
        poll.add(self.output.kick_fd(), OUTPUT, EventSet::IN)?;
        self.input.disable_kicks();
        poll.reschedule(OUTPUT);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token != OUTPUT {
            self.input.clear_kick();
            return;
        }
        self.output.clear_kick();
        let mem = self.output.mem().clone();
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let counters = &self.counters;
        let print = |chain: &Chain| {
            let len = chain.readable.len().min(MAX_BYTES);
            let mut piece = [0; PIECE];
            let mut done = 0;
            while done < len {
                let take = (len - done).min(PIECE);
                let got = chain.readable.read(&mem, done, &mut piece[..take]);
                if got == 0 {
                    break;
                }
                sink(&piece[..got]);
                done += got;
            }
            if done < chain.readable.len() {
                counters.error();
            }
            counters.operation(done as u64);
            0
        };
        if self.output.serve(BUDGET, print) {
            poll.reschedule(OUTPUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::mock::{MockInterrupt, Runner, activation, memory, queues};

    #[test]
    fn output_reaches_the_sink_in_order_and_input_buffers_are_not_used() {
        let mem = memory(1 << 20);
        let printed = Arc::new(Mutex::new(Vec::new()));
        let copy = printed.clone();
        let sink = move |bytes: &[u8]| copy.lock().unwrap().extend_from_slice(bytes);
        let mut console = Console::new(Box::new(sink)).unwrap();
        let mut queues = queues(&mem, 0x1000, console.queue_sizes());
        let made =
            activation(&console, &queues, Arc::new(MockInterrupt::default()), features::COMMON);
        let mut runner = Runner::start(console.activate(made).unwrap()).unwrap();

        mem.write_slice(b"hello, world\n", GuestAddress(0x10000)).unwrap();
        queues[0].add(&[], &[(0x20000, 64)]);
        queues[0].kick();
        queues[1].add(&[(0x10000, 7), (0x10007, 3)], &[]);
        queues[1].add(&[(0x1000a, 3)], &[]);
        queues[1].kick();
        assert!(runner.settle(10));
        assert_eq!(*printed.lock().unwrap(), b"hello, world\n");
        assert_eq!(queues[1].used().unwrap().1, 0);
        assert!(queues[1].used().is_some());
        assert!(queues[0].used().is_none());
    }

    #[test]
    fn output_over_the_limit_of_a_chain_is_dropped() {
        let mem = memory(1 << 20);
        let printed = Arc::new(Mutex::new(0));
        let copy = printed.clone();
        let sink = move |bytes: &[u8]| *copy.lock().unwrap() += bytes.len();
        let mut console = Console::new(Box::new(sink)).unwrap();
        let mut queues = queues(&mem, 0x1000, console.queue_sizes());
        let made =
            activation(&console, &queues, Arc::new(MockInterrupt::default()), features::COMMON);
        let mut runner = Runner::start(console.activate(made).unwrap()).unwrap();
        queues[1].add(&[(0x10000, 80 << 10)], &[]);
        queues[1].kick();
        assert!(runner.settle(10));
        assert_eq!(*printed.lock().unwrap(), MAX_BYTES);
        assert_eq!(console.counters().errors(), 1);
    }
}
