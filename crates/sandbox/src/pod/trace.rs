//! The phases of a pod's start, which may overlap.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::model::TracePhase;
use crate::observe::{Measured, Observer};

/// Measures the phases of a start, which may overlap.
pub(super) struct Trace {
    pub(super) began: Instant,
    observer: Arc<dyn Observer>,
    phases: Mutex<Vec<TracePhase>>,
}

impl Trace {
    pub(super) fn begin(observer: Arc<dyn Observer>) -> Self {
        Self { began: Instant::now(), observer, phases: Mutex::default() }
    }

    pub(super) async fn phase<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let start = self.began.elapsed();
        let value = work.await;
        let duration = self.began.elapsed() - start;
        self.observer.measured(Measured::StartPhase { phase: name, took: duration });
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push(TracePhase {
            name: name.to_owned(),
            start_us: start.as_micros() as u64,
            duration_us: duration.as_micros() as u64,
        });
        tracing::debug!(phase = name, ?duration, "start phase");
        value
    }

    /// Ordered by start time.
    pub(super) fn into_phases(self) -> Vec<TracePhase> {
        let mut phases = self.phases.into_inner().unwrap_or_else(PoisonError::into_inner);
        phases.sort_by_key(|phase| phase.start_us);
        phases
    }
}
