//! The vCPU threads: started, paused and resumed together; they end with the process.
//!
//! ```text
//!   running --pause: gate closed, kick--> parked (counted) --resume: gate opened--> running
//! ```
//! A parked vCPU has completed its last access, so its state is complete; its own thread saves it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machine::vcpu::{Bus, ExitCounts, Kicker, Step, Vcpu, VcpuError, VcpuState};
use vmm_api::ExitReason;

use crate::exit::ExitState;

/// Stack size, bytes: more than the deepest call path needs (a configuration write that activates a
/// device). Only touched pages use memory.
const STACK: usize = 256 << 10;
/// Deadline for all vCPUs to park; a kick takes effect within microseconds.
const PARK_LIMIT: Duration = Duration::from_secs(2);

/// Deadline for all vCPUs to save their state.
const SAVE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum VcpuThreadError {
    #[error("cannot start the thread of vCPU {id}; raise the limit of processes")]
    Spawn { id: usize, source: io::Error },
    #[error("{missing} vCPUs did not stop within {PARK_LIMIT:?}")]
    Stuck { missing: usize },
    #[error("{missing} vCPUs were not saved within {SAVE_LIMIT:?}")]
    Unsaved { missing: usize },
    #[error("cannot save a vCPU")]
    Save(#[from] VcpuError),
}

/// All vCPUs of a VM.
#[derive(Debug)]
pub struct VcpuThreads {
    gate: Arc<Gate>,
    kickers: Vec<Kicker>,
    exits: Vec<Arc<ExitCounts>>,
}

#[derive(Debug, Default)]
struct Gate {
    /// Copy of `state.closed` that vCPU threads read after every exit without taking the lock.
    closed: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    parked: usize,
    kickers: Vec<Kicker>,
    /// Number of requests to save all vCPUs.
    save_requests: u64,
    /// Answers to the last request, with the vCPUs' ids.
    saved: Vec<(usize, Result<VcpuState, VcpuError>)>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Parks the calling thread, that of vCPU `id`, while the gate is closed; it calls `save` for
    /// each request meanwhile.
    fn wait_open(&self, id: usize, save: impl Fn() -> Result<VcpuState, VcpuError>) {
        let mut state = self.lock();
        let mut answered = state.save_requests;
        state.parked += 1;
        self.changed.notify_all();
        while state.closed {
            if state.save_requests != answered {
                answered = state.save_requests;
                drop(state);
                let saved = save();
                state = self.lock();
                if state.save_requests == answered {
                    state.saved.push((id, saved));
                    self.changed.notify_all();
                }
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }
}

impl VcpuThreads {
    /// Starts a thread per vCPU, paused; `init` runs first on each. `msrs` are the registers to save. [`Self::resume`] starts the
    /// guest. Fails if a thread cannot be started or does not park before the deadline.
    pub fn start<B: Bus + Send + Sync + 'static>(
        vcpus: Vec<Vcpu>,
        bus: &Arc<B>,
        exit: &ExitState,
        msrs: Vec<u32>,
        init: impl Fn() + Send + Clone + 'static,
    ) -> Result<Self, VcpuThreadError> {
        let msrs: Arc<[u32]> = msrs.into();
        let gate = Arc::new(Gate::default());
        gate.closed.store(true, Ordering::Release);
        gate.lock().closed = true;
        let count = vcpus.len();
        let exits = vcpus.iter().map(Vcpu::exits).collect();
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let (bus, exit, init, gate) = (bus.clone(), exit.clone(), init.clone(), gate.clone());
            let msrs = msrs.clone();
            let body = move || {
                let kicker = vcpu.bind_to_thread();
                gate.lock().kickers.push(kicker);
                init();
                run((id, &mut vcpu), &*bus, &exit, &gate, &msrs);
            };
            let thread = std::thread::Builder::new().name(format!("vcpu {id}")).stack_size(STACK);
            thread.spawn(body).map_err(|source| VcpuThreadError::Spawn { id, source })?;
        }
        let mut vcpu_threads = Self { gate, kickers: Vec::new(), exits };
        vcpu_threads.wait_parked(count)?;
        vcpu_threads.kickers = std::mem::take(&mut vcpu_threads.gate.lock().kickers);
        Ok(vcpu_threads)
    }

    /// Parks all vCPU threads; resumes them again if one misses the deadline.
    pub fn pause(&self) -> Result<(), VcpuThreadError> {
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

    /// Lets all vCPU threads continue.
    pub fn resume(&self) {
        self.gate.closed.store(false, Ordering::Release);
        self.gate.lock().closed = false;
        self.gate.changed.notify_all();
    }

    fn wait_parked(&self, count: usize) -> Result<(), VcpuThreadError> {
        let end = Instant::now() + PARK_LIMIT;
        let mut state = self.gate.lock();
        while state.parked < count {
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(VcpuThreadError::Stuck { missing: count - state.parked });
            }
            let waited = self.gate.changed.wait_timeout(state, rest);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The state of all vCPUs, which must be paused, in the order of their ids.
    pub fn save(&self) -> Result<Vec<VcpuState>, VcpuThreadError> {
        let count = self.kickers.len();
        let end = Instant::now() + SAVE_LIMIT;
        let mut state = self.gate.lock();
        state.save_requests += 1;
        state.saved.clear();
        self.gate.changed.notify_all();
        while state.saved.len() < count {
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() || !state.closed {
                return Err(VcpuThreadError::Unsaved { missing: count - state.saved.len() });
            }
            let waited = self.gate.changed.wait_timeout(state, rest);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut saved = std::mem::take(&mut state.saved);
        drop(state);
        saved.sort_unstable_by_key(|(id, _)| *id);
        Ok(saved.into_iter().map(|(_, state)| state).collect::<Result<_, _>>()?)
    }

    /// KVM exits to user space of all vCPUs, by reason.
    pub fn exits(&self) -> std::collections::BTreeMap<String, u64> {
        let mut sums = std::collections::BTreeMap::new();
        for (name, count) in self.exits.iter().flat_map(|exits| exits.all()) {
            *sums.entry(name.to_owned()).or_default() += count;
        }
        sums
    }
}

fn run<B: Bus>(
    (id, vcpu): (usize, &mut Vcpu),
    bus: &B,
    exit: &ExitState,
    gate: &Gate,
    msrs: &[u32],
) {
    // The last step has handled an access that KVM completes in its next call.
    let mut incomplete = false;
    loop {
        if gate.is_closed() {
            if std::mem::take(&mut incomplete)
                && let Err(error) = vcpu.complete_access(bus)
            {
                exit.set(ExitReason::Error, crate::chain(&error));
            }
            gate.wait_open(id, || vcpu.save(msrs));
            vcpu.notify_paused();
        }
        let step = vcpu.step(bus);
        incomplete = matches!(step, Ok(Step::Handled));
        match step {
            Ok(Step::Handled | Step::Interrupted) => {}
            Ok(Step::Shutdown) => exit.set(ExitReason::TripleFault, "guest triple-faulted"),
            // With an in-kernel APIC, HLT does not exit to user space.
            Ok(Step::Halted) => exit.set(ExitReason::Error, "unexpected HLT exit"),
            Err(error) => exit.set(ExitReason::Error, crate::chain(&error)),
        }
        if gate.is_closed() {
            continue;
        }
        if exit.is_set() {
            // The VM has ended; the main thread exits the process.
            return;
        }
    }
}
