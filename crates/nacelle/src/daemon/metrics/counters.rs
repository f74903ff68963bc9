//! What is counted as it happens. Implements the observers of the crates, which know no metrics.

use std::borrow::Cow;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};
use sandbox::observe::{DeathCause, Measured, OomVictim, Outcome, PodKind, StartedFrom};
use tonic::Code;

type Labels = Vec<(&'static str, Cow<'static, str>)>;
type Counts = Family<Labels, Counter>;
type Times = Family<Labels, Histogram, fn() -> Histogram>;

/// Upper bounds of the buckets for work of a pod: a millisecond to two minutes.
const WORK: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];
/// For writes to the disk.
const WRITES: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
/// For pulls.
const PULLS: [f64; 11] = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

fn work() -> Histogram {
    Histogram::new(WORK)
}

fn writes() -> Histogram {
    Histogram::new(WRITES)
}

fn times() -> Times {
    Family::new_with_constructor(work as fn() -> Histogram)
}

#[derive(Debug, Clone)]
pub(crate) struct Counters {
    cri_requests: Counts,
    cri_durations: Times,
    starts: Counts,
    start_durations: Times,
    phase_durations: Times,
    boots: Counts,
    boot_durations: Times,
    template_saves: Counts,
    deaths: Counts,
    oom_kills: Counts,
    guest_calls: Counts,
    guest_durations: Times,
    journal_writes: Counts,
    journal_durations: Histogram,
    journal_syncs: Histogram,
    cni_runs: Counts,
    cni_durations: Times,
    pulls: Counts,
    pull_durations: Histogram,
    fetched: Counter,
}

impl Counters {
    /// Series whose labels are known are there from the start, with 0, so that the first failure is an
    /// increase.
    pub(crate) fn new() -> Self {
        let this = Self {
            cri_requests: Family::default(),
            cri_durations: times(),
            starts: Family::default(),
            start_durations: times(),
            phase_durations: times(),
            boots: Family::default(),
            boot_durations: times(),
            template_saves: Family::default(),
            deaths: Family::default(),
            oom_kills: Family::default(),
            guest_calls: Family::default(),
            guest_durations: times(),
            journal_writes: Family::default(),
            journal_durations: writes(),
            journal_syncs: writes(),
            cni_runs: Family::default(),
            cni_durations: times(),
            pulls: Family::default(),
            pull_durations: Histogram::new(PULLS),
            fetched: Counter::default(),
        };
        for kind in [PodKind::Vm, PodKind::Host].map(pod_kind) {
            let _ = this.start_durations.get_or_create(&labels([("kind", kind)]));
            for result in [Outcome::Ok, Outcome::Failed, Outcome::TimedOut, Outcome::Cancelled] {
                let _ = this
                    .starts
                    .get_or_create(&labels([("kind", kind), ("result", outcome(result))]));
            }
        }
        for from in [StartedFrom::Kernel, StartedFrom::Template].map(started_from) {
            let _ = this.boot_durations.get_or_create(&labels([("from", from)]));
            for result in [Outcome::Ok, Outcome::Failed, Outcome::TimedOut, Outcome::Cancelled] {
                let all = labels([("from", from), ("result", outcome(result))]);
                let _ = this.boots.get_or_create(&all);
            }
        }
        for result in [Outcome::Ok, Outcome::Failed] {
            let _ = this.template_saves.get_or_create(&labels([("result", outcome(result))]));
        }
        for result in [Outcome::Ok, Outcome::Failed] {
            let _ = this.journal_writes.get_or_create(&labels([("result", outcome(result))]));
        }
        for cause in CAUSES {
            let _ = this.deaths.get_or_create(&labels([("cause", death_cause(cause))]));
        }
        for victim in [OomVictim::Container, OomVictim::Vmm] {
            let _ = this.oom_kills.get_or_create(&labels([("victim", oom_victim(victim))]));
        }
        for result in [Outcome::Ok, Outcome::Failed, Outcome::Cancelled] {
            let _ = this.pulls.get_or_create(&labels([("result", outcome(result))]));
        }
        this
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        add(
            registry,
            "nacelle_cri_requests",
            "Calls of the CRI by method and gRPC code",
            &self.cri_requests,
        );
        add(
            registry,
            "nacelle_cri_request_duration_seconds",
            "Time until the reply to a call of the CRI begins",
            &self.cri_durations,
        );
        add(registry, "nacelle_pod_starts", "Starts of pods by result", &self.starts);
        add(
            registry,
            "nacelle_pod_start_duration_seconds",
            "Duration of successful starts of pods",
            &self.start_durations,
        );
        add(
            registry,
            "nacelle_pod_start_phase_duration_seconds",
            "Duration of the phases of starts of pods, some of which overlap",
            &self.phase_durations,
        );
        add(
            registry,
            "nacelle_vm_boots",
            "Starts of VMs by what the guest starts from and result",
            &self.boots,
        );
        add(
            registry,
            "nacelle_vm_boot_duration_seconds",
            "Time from the launch of a VMM until its guest's agent answers",
            &self.boot_durations,
        );
        add(
            registry,
            "nacelle_template_saves",
            "Attempts to save the VM of a starting pod as a template, by result",
            &self.template_saves,
        );
        add(
            registry,
            "nacelle_vmm_deaths",
            "VMMs of ready pods that ended without a request, by cause",
            &self.deaths,
        );
        add(
            registry,
            "nacelle_oom_kills",
            "Containers and VMMs ended by an OOM killer",
            &self.oom_kills,
        );
        add(registry, "nacelle_guest_calls", "Calls to agents by result", &self.guest_calls);
        add(
            registry,
            "nacelle_guest_call_duration_seconds",
            "Duration of calls to agents",
            &self.guest_durations,
        );
        add(
            registry,
            "nacelle_journal_writes",
            "Writes of records of pods by result",
            &self.journal_writes,
        );
        add(
            registry,
            "nacelle_journal_write_duration_seconds",
            "Duration of writes of records of pods, with their fsyncs",
            &self.journal_durations,
        );
        add(
            registry,
            "nacelle_journal_fsync_duration_seconds",
            "Duration of fsyncs of the journal",
            &self.journal_syncs,
        );
        add(
            registry,
            "nacelle_cni_operations",
            "Runs of CNI plugins by operation and result",
            &self.cni_runs,
        );
        add(
            registry,
            "nacelle_cni_operation_duration_seconds",
            "Duration of runs of CNI plugins",
            &self.cni_durations,
        );
        add(registry, "nacelle_image_pulls", "Pulls of images by result", &self.pulls);
        add(
            registry,
            "nacelle_image_pull_duration_seconds",
            "Duration of successful pulls of images",
            &self.pull_durations,
        );
        add(
            registry,
            "nacelle_image_fetched_bytes",
            "Bytes of image layers received from registries",
            &self.fetched,
        );
    }
}

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: &M) {
    registry.register(name, help, metric.clone());
}

fn labels<const N: usize>(pairs: [(&'static str, &'static str); N]) -> Labels {
    pairs.map(|(name, value)| (name, value.into())).into()
}

fn pod_kind(kind: PodKind) -> &'static str {
    match kind {
        PodKind::Vm => "vm",
        PodKind::Host => "host",
    }
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "ok",
        Outcome::Failed => "error",
        Outcome::TimedOut => "timeout",
        Outcome::Cancelled => "cancelled",
    }
}

const CAUSES: [DeathCause; 10] = [
    DeathCause::Shutdown,
    DeathCause::Reset,
    DeathCause::Panic,
    DeathCause::TripleFault,
    DeathCause::Error,
    DeathCause::Terminated,
    DeathCause::Killed,
    DeathCause::OutOfMemory,
    DeathCause::Unresponsive,
    DeathCause::HostAgent,
];

fn death_cause(cause: DeathCause) -> &'static str {
    match cause {
        DeathCause::Shutdown => "shutdown",
        DeathCause::Reset => "reset",
        DeathCause::Panic => "panic",
        DeathCause::TripleFault => "triple_fault",
        DeathCause::Error => "error",
        DeathCause::Terminated => "terminated",
        DeathCause::Killed => "killed",
        DeathCause::OutOfMemory => "out_of_memory",
        DeathCause::Unresponsive => "unresponsive",
        DeathCause::HostAgent => "host_agent",
    }
}

fn started_from(from: StartedFrom) -> &'static str {
    match from {
        StartedFrom::Kernel => "kernel",
        StartedFrom::Template => "template",
    }
}

fn oom_victim(victim: OomVictim) -> &'static str {
    match victim {
        OomVictim::Container => "container",
        OomVictim::Vmm => "vmm",
    }
}

/// The names of codes in gRPC's Go library, which other components' metrics use.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

impl cri::observe::Observer for Counters {
    fn called(&self, method: &'static str, code: Code, took: Duration) {
        let all = labels([("method", method), ("code", code_name(code))]);
        self.cri_requests.get_or_create(&all).inc();
        let method = labels([("method", method)]);
        self.cri_durations.get_or_create(&method).observe(took.as_secs_f64());
    }
}

impl sandbox::observe::Observer for Counters {
    fn measured(&self, measured: Measured<'_>) {
        match measured {
            Measured::StartPhase { phase, took } => {
                let phase: Labels = vec![("phase", phase.to_owned().into())];
                self.phase_durations.get_or_create(&phase).observe(took.as_secs_f64());
            }
            Measured::Start { kind, outcome: result, took } => {
                let kind = ("kind", pod_kind(kind));
                self.starts.get_or_create(&labels([kind, ("result", outcome(result))])).inc();
                if result == Outcome::Ok {
                    self.start_durations.get_or_create(&labels([kind])).observe(took.as_secs_f64());
                }
            }
            Measured::Boot { from, outcome: result, took } => {
                let from = ("from", started_from(from));
                self.boots.get_or_create(&labels([from, ("result", outcome(result))])).inc();
                if result == Outcome::Ok {
                    self.boot_durations.get_or_create(&labels([from])).observe(took.as_secs_f64());
                }
            }
            Measured::TemplateSave { outcome: result, .. } => {
                self.template_saves.get_or_create(&labels([("result", outcome(result))])).inc();
            }
            Measured::VmmDeath { cause } => {
                self.deaths.get_or_create(&labels([("cause", death_cause(cause))])).inc();
            }
            Measured::OomKill { victim } => {
                self.oom_kills.get_or_create(&labels([("victim", oom_victim(victim))])).inc();
            }
            Measured::GuestCall { call, outcome: result, took } => {
                let call: Cow<'static, str> = call.replace(' ', "_").into();
                let all: Labels = vec![("call", call.clone()), ("result", outcome(result).into())];
                self.guest_calls.get_or_create(&all).inc();
                let call: Labels = vec![("call", call)];
                self.guest_durations.get_or_create(&call).observe(took.as_secs_f64());
            }
            Measured::JournalWrite { outcome: result, took } => {
                self.journal_writes.get_or_create(&labels([("result", outcome(result))])).inc();
                self.journal_durations.observe(took.as_secs_f64());
            }
            Measured::JournalSync { took } => self.journal_syncs.observe(took.as_secs_f64()),
        }
    }
}

impl network::observe::Observer for Counters {
    fn plugin_ran(&self, run: network::observe::PluginRun<'_>) {
        use network::observe::Outcome;
        let result = match run.outcome {
            Outcome::Ok => "ok",
            Outcome::Failed => "error",
            Outcome::TimedOut => "timeout",
            Outcome::Cancelled => "cancelled",
        };
        let mut all: Labels =
            vec![("operation", run.verb.as_str().into()), ("plugin", run.plugin.to_owned().into())];
        self.cni_durations.get_or_create(&all).observe(run.took.as_secs_f64());
        all.push(("result", result.into()));
        self.cni_runs.get_or_create(&all).inc();
    }
}

impl image::observe::Observer for Counters {
    fn pulled(&self, result: image::observe::Outcome, took: Duration) {
        use image::observe::Outcome;
        let name = match result {
            Outcome::Ok => "ok",
            Outcome::Failed => "error",
            Outcome::Cancelled => "cancelled",
        };
        self.pulls.get_or_create(&labels([("result", name)])).inc();
        if result == Outcome::Ok {
            self.pull_durations.observe(took.as_secs_f64());
        }
    }

    fn fetched(&self, bytes: u64) {
        self.fetched.inc_by(bytes);
    }
}
