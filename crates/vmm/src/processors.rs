//! vCPU threads: started together, paused together, ended with the process.
//!
//! ```text
//!   running --pause: gate closed, kick--> parked (counted) --resume: gate opened--> running
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machine::vcpu::{Bus, ExitCounts, Kicker, Step, Vcpu};
use vmm_api::ExitReason;

use crate::end::End;

/// Enough for the deepest path (a configuration write that activates a device) with room to spare;
/// only what is used costs memory.
const STACK: usize = 256 << 10;
/// A vCPU leaves the guest within microseconds of a kick.
const PARK_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    #[error("cannot start the thread of vCPU {id}; raise the limit of processes")]
    Spawn { id: usize, source: io::Error },
    #[error("{missing} vCPUs did not stop within {PARK_LIMIT:?}")]
    Stuck { missing: usize },
}

/// All vCPUs of a VM.
#[derive(Debug)]
pub struct Processors {
    gate: Arc<Gate>,
    kickers: Vec<Kicker>,
    exits: Vec<Arc<ExitCounts>>,
}

#[derive(Debug, Default)]
struct Gate {
    /// Looked at after every exit; the truth is in `state`.
    closed: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    parked: usize,
    kickers: Vec<Kicker>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self) -> bool {
        if !self.closed.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        true
    }
}

impl Processors {
    /// Starts a thread for each vCPU; `init` runs on each first. They run once [`Self::resume`] is
    /// called.
    pub fn start<B: Bus + Send + Sync + 'static>(
        vcpus: Vec<Vcpu>,
        bus: &Arc<B>,
        end: &End,
        init: impl Fn() + Send + Clone + 'static,
    ) -> Result<Self, ProcessorError> {
        let gate = Arc::new(Gate::default());
        gate.closed.store(true, Ordering::Release);
        gate.lock().closed = true;
        let count = vcpus.len();
        let exits = vcpus.iter().map(Vcpu::exits).collect();
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let (bus, end, init, gate) = (bus.clone(), end.clone(), init.clone(), gate.clone());
            let body = move || {
                let kicker = vcpu.adopt();
                gate.lock().kickers.push(kicker);
                init();
                run(&mut vcpu, &*bus, &end, &gate);
            };
            let thread = std::thread::Builder::new().name(format!("vcpu {id}")).stack_size(STACK);
            thread.spawn(body).map_err(|source| ProcessorError::Spawn { id, source })?;
        }
        let mut processors = Self { gate, kickers: Vec::new(), exits };
        processors.wait_parked(count)?;
        processors.kickers = std::mem::take(&mut processors.gate.lock().kickers);
        Ok(processors)
    }

    /// Stops all vCPUs outside of the guest.
    pub fn pause(&self) -> Result<(), ProcessorError> {
        self.gate.lock().closed = true;
        self.gate.closed.store(true, Ordering::Release);
        for kicker in &self.kickers {
            kicker.kick();
        }
        let done = self.wait_parked(self.kickers.len());
        if done.is_err() {
            self.resume();
        }
        done
    }

    pub fn resume(&self) {
        self.gate.closed.store(false, Ordering::Release);
        self.gate.lock().closed = false;
        self.gate.changed.notify_all();
    }

    fn wait_parked(&self, count: usize) -> Result<(), ProcessorError> {
        let end = Instant::now() + PARK_LIMIT;
        let mut state = self.gate.lock();
        while state.parked < count {
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(ProcessorError::Stuck { missing: count - state.parked });
            }
            let waited = self.gate.changed.wait_timeout(state, rest);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Exits of all vCPUs together, by reason.
    pub fn exits(&self) -> std::collections::BTreeMap<String, u64> {
        let mut sums = std::collections::BTreeMap::new();
        for (name, count) in self.exits.iter().flat_map(|exits| exits.all()) {
            *sums.entry(name.to_owned()).or_default() += count;
        }
        sums
    }
}

fn run<B: Bus>(vcpu: &mut Vcpu, bus: &B, end: &End, gate: &Gate) {
    loop {
        if gate.pass() {
            vcpu.was_paused();
        }
        match vcpu.step(bus) {
            Ok(Step::Handled | Step::Interrupted) => {}
            Ok(Step::Shutdown) => end.set(ExitReason::TripleFault, "guest triple-faulted"),
            // With an in-kernel APIC the kernel keeps halted processors.
            Ok(Step::Halted) => end.set(ExitReason::Error, "vCPU halted outside of the kernel"),
            Err(error) => end.set(ExitReason::Error, crate::chain(&error)),
        }
        if gate.closed.load(Ordering::Acquire) {
            continue;
        }
        if end.is_set() {
            // Nothing runs in the guest any more; the main thread is about to end the process.
            return;
        }
    }
}
