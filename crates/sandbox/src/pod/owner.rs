//! The task that owns a pod: requests and changes in, published state out.
//!
//! It never waits for a guest, a boot or the network: that is what its jobs do. So a stop that
//! arrives during a start is seen at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::announce::Told;
use super::death::Death;
use super::handle::Handle;
use super::{
    create_container, recover, remove_container, remove_pod, run_pod, start_container, stop_pod,
    update_container, update_pod, watch as watchers,
};
use crate::error::Error;
use crate::host::blocking;
use crate::host::process::Process;
use crate::model::{ContainerId, Event, EventKind, PodId, PodResources};
use crate::node::Node;
use crate::observe::{DeathCause, Measured, OomVictim, Outcome, PodKind};
use crate::policy::{Change, Container, ContainerPhase, Misfit, Phase, Pod};
use crate::registry::Reservation;

/// Requests that wait for the owner; more of them wait at the sender.
const QUEUE: usize = 64;
/// A removal that failed is tried again after this time.
const REMOVE_AGAIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// A search for a pod's VMM that panicked begins again after this time.
const REATTACH_AGAIN: Duration = Duration::from_secs(1);
/// A record that could not be written is tried again after this time.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Request {
    Stop(Reply<()>),
    Remove(Reply<()>),
    CreateContainer { container: Box<Container>, reserved: Reservation, reply: Reply<()> },
    StartContainer { id: ContainerId, reply: Reply<()> },
    RemoveContainer { id: ContainerId, reply: Reply<()> },
    UpdateContainer { id: ContainerId, resources: Box<LinuxResources>, reply: Reply<()> },
    UpdatePod { change: PodResources, reply: Reply<()> },
}

pub(crate) enum Msg {
    Request(Request),
    Commit {
        changes: Vec<Change>,
        reply: Reply<()>,
    },
    /// The VM is gone; output has been read as far as it came.
    VmmEnded {
        death: Death,
    },
    /// The guest has missed its pings.
    GuestSilent,
}

/// What a fresh owner task begins with.
pub(crate) enum Begin {
    Start {
        reply: Reply<PodId>,
        cancel: CancellationToken,
    },
    /// A pod of the journal.
    Recover,
}

pub(super) enum JobEnd {
    Started(Result<Arc<Process>, Error>),
    Reattached(Option<Arc<Process>>),
    Stopped(Result<(), Error>),
    Removed(Result<(), Error>),
    /// Work on this container.
    Container(ContainerId),
    Other,
}

/// The one big thing that a pod does at a time.
enum Activity {
    Idle,
    Starting { cancel: CancellationToken },
    Reattaching { cancel: CancellationToken },
    Stopping,
    Removing,
}

struct Owner {
    handle: Arc<Handle>,
    node: Arc<Node>,
    pod: Arc<Pod>,
    publish: watch::Sender<Arc<Pod>>,
    told: Told,
    activity: Activity,
    jobs: JoinSet<JobEnd>,
    /// How many jobs work on a container now.
    busy: HashMap<ContainerId, usize>,
    /// Tasks that live as long as the VM.
    watchers: JoinSet<()>,
    process: Option<Arc<Process>>,
    silent: bool,
    start_reply: Option<Reply<PodId>>,
    /// Why the start failed, until it is unwound.
    start_error: Option<Error>,
    stop_waiters: Vec<Reply<()>>,
    remove_waiters: Vec<Reply<()>>,
    /// The record on disk is older than what we know.
    dirty: bool,
    remove_again: bool,
    gone: bool,
}

/// Makes a pod's handle and the future that owns it.
pub(crate) fn new(
    node: Arc<Node>,
    pod: Pod,
    begin: Begin,
) -> (Arc<Handle>, impl Future<Output = ()> + Send) {
    let (requests, incoming) = mpsc::channel(QUEUE);
    let pod = Arc::new(pod);
    let (publish, state) = watch::channel(pod.clone());
    let handle = Arc::new(Handle::new(node.clone(), pod.id.clone(), requests, state));
    let owner = Owner {
        handle: handle.clone(),
        node,
        told: Told::of(&pod),
        pod,
        publish,
        activity: Activity::Idle,
        jobs: JoinSet::new(),
        busy: HashMap::new(),
        watchers: JoinSet::new(),
        process: None,
        silent: false,
        start_reply: None,
        start_error: None,
        stop_waiters: Vec::new(),
        remove_waiters: Vec::new(),
        dirty: false,
        remove_again: false,
        gone: false,
    };
    (handle, owner.run(begin, incoming))
}

impl Owner {
    async fn run(mut self, begin: Begin, mut incoming: mpsc::Receiver<Msg>) {
        let shutdown = self.node.shutdown.clone();
        self.begin(begin);
        let mut retries = interval(REMOVE_AGAIN);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.gone {
            let pause = match (self.dirty, self.remove_again) {
                (true, _) => WRITE_AGAIN,
                (false, true) => REMOVE_AGAIN,
                (false, false) => Duration::MAX,
            };
            tokio::select! {
                () = shutdown.cancelled() => {
                    // The next daemon writes them.
                    self.handle.end_logs();
                    return;
                }
                Some(end) = self.jobs.join_next() => self.job_ended(end).await,
                Some(msg) = incoming.recv() => self.handle(msg).await,
                _ = retries.tick(), if self.half_done().next().is_some() => self.finish_half_done(),
                () = tokio::time::sleep(pause), if pause != Duration::MAX => self.again().await,
            }
        }
        self.handle.clear_live();
        self.node.registry.forget_pod(&self.handle.id);
        let events = self.told.gone(&self.pod);
        self.announce(events);
        for waiter in self.stop_waiters.drain(..).chain(self.remove_waiters.drain(..)) {
            let _ = waiter.send(Ok(()));
        }
        self.answer_failed_start();
    }

    fn begin(&mut self, begin: Begin) {
        match begin {
            Begin::Start { reply, cancel } => {
                self.start_reply = Some(reply);
                self.activity = Activity::Starting { cancel: cancel.clone() };
                let handle = self.handle.clone();
                let kind = match self.pod.spec.host {
                    None => PodKind::Vm,
                    Some(_) => PodKind::Host,
                };
                self.jobs.spawn(async move {
                    let began = Instant::now();
                    let result = run_pod::run_pod(&handle, &cancel).await;
                    let (outcome, took) = (Outcome::of(&result), began.elapsed());
                    handle.node.observer.measured(Measured::Start { kind, outcome, took });
                    JobEnd::Started(result)
                });
            }
            Begin::Recover => match self.pod.phase {
                Phase::Starting | Phase::Removing => self.begin_remove(),
                Phase::Stopping => self.begin_stop(),
                Phase::NotReady => {}
                Phase::Ready => self.begin_reattach(Duration::ZERO),
            },
        }
    }

    fn begin_reattach(&mut self, pause: Duration) {
        let cancel = CancellationToken::new();
        self.activity = Activity::Reattaching { cancel: cancel.clone() };
        let handle = self.handle.clone();
        self.jobs.spawn(async move {
            let _ = tokio::time::timeout(pause, cancel.cancelled()).await;
            JobEnd::Reattached(recover::find_vm(&handle, &cancel).await)
        });
    }

    async fn again(&mut self) {
        if self.dirty {
            self.dirty = self.write(&self.pod.clone()).await.is_err();
        } else if self.remove_again && matches!(self.activity, Activity::Idle) {
            self.begin_remove();
        }
    }

    async fn handle(&mut self, msg: Msg) {
        match msg {
            Msg::Request(request) => self.request(request),
            Msg::Commit { changes, reply } => {
                let result = self.commit(changes).await;
                let _ = reply.send(result);
            }
            Msg::VmmEnded { death } => {
                let death = match self.silent {
                    true => self.killed_for_silence(),
                    false => death,
                };
                if self.pod.phase == Phase::Ready {
                    let what = match self.pod.spec.host {
                        None => "VM has died",
                        Some(_) => "agent of a pod on this host has died",
                    };
                    tracing::error!(pod = self.handle.id, reason = death.reason, "{what}");
                }
                death.measure(&self.handle);
                let change = death.change(std::time::SystemTime::now());
                let _ = self.commit(vec![change]).await;
                // Nobody is there to be asked any more.
                self.watchers = JoinSet::new();
                self.process = None;
                self.handle.clear_live();
            }
            Msg::GuestSilent => {
                tracing::error!(pod = self.handle.id, "agent does not answer; it is killed");
                self.silent = true;
                if let Some(process) = &self.process
                    && let Err(error) = process.kill()
                {
                    tracing::error!(pod = self.handle.id, %error, "cannot kill the VMM");
                }
            }
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Stop(reply) => {
                self.stop_waiters.push(reply);
                match &self.activity {
                    Activity::Starting { cancel } | Activity::Reattaching { cancel } => {
                        cancel.cancel();
                    }
                    Activity::Idle => self.begin_stop(),
                    Activity::Stopping | Activity::Removing => {}
                }
            }
            Request::Remove(reply) => {
                self.remove_waiters.push(reply);
                match &self.activity {
                    Activity::Starting { cancel } | Activity::Reattaching { cancel } => {
                        cancel.cancel();
                    }
                    Activity::Idle => self.begin_remove(),
                    Activity::Stopping | Activity::Removing => {}
                }
            }
            Request::CreateContainer { container, reserved, reply } => {
                let handle = self.handle.clone();
                self.container_job(Some(container.id.clone()), reply, async move {
                    let cancel = reserved.arrived();
                    create_container::create_container(&handle, *container, &cancel).await
                });
            }
            Request::StartContainer { id, reply } => {
                let handle = self.handle.clone();
                self.container_job(None, reply, async move {
                    start_container::start_container(&handle, &id).await
                });
            }
            Request::RemoveContainer { id, reply } => {
                let handle = self.handle.clone();
                self.container_job(Some(id.clone()), reply, async move {
                    remove_container::remove_container(&handle, &id).await
                });
            }
            Request::UpdatePod { change, reply } => {
                let handle = self.handle.clone();
                self.container_job(None, reply, async move {
                    update_pod::update_pod(&handle, change).await
                });
            }
            Request::UpdateContainer { id, resources, reply } => {
                let handle = self.handle.clone();
                self.container_job(None, reply, async move {
                    update_container::update_container(&handle, &id, *resources).await
                });
            }
        }
    }

    /// Work on a container goes on when its caller has gone, and gates the removal of the pod. What
    /// makes or removes `container` keeps a half-done one from being taken for left over.
    fn container_job(
        &mut self,
        container: Option<ContainerId>,
        reply: Reply<()>,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        let gate = self.handle.gate.clone();
        if let Some(id) = &container {
            *self.busy.entry(id.clone()).or_default() += 1;
        }
        self.jobs.spawn(async move {
            let held = gate.read_owned().await;
            let result = work.await;
            drop(held);
            let _ = reply.send(result);
            container.map_or(JobEnd::Other, JobEnd::Container)
        });
    }

    /// Containers whose creation or removal has failed half-way, and nobody works on: no listing
    /// shows them, so nobody will ask for their removal again.
    fn half_done(&self) -> impl Iterator<Item = &ContainerId> {
        let ready = matches!((&self.activity, self.pod.phase), (Activity::Idle, Phase::Ready));
        let containers = self.pod.containers.values().filter(move |_| ready);
        containers
            .filter(|c| c.phase != ContainerPhase::Present && !self.busy.contains_key(&c.id))
            .map(|c| &c.id)
    }

    fn finish_half_done(&mut self) {
        for id in self.half_done().cloned().collect::<Vec<_>>() {
            let handle = self.handle.clone();
            // Nobody waits for the answer.
            let (reply, _) = oneshot::channel();
            self.container_job(Some(id.clone()), reply, async move {
                let removed = remove_container::remove_left(&handle, &id).await;
                if let Err(error) = &removed {
                    tracing::warn!(container = id, %error, "removal will be tried again");
                }
                removed
            });
        }
    }

    fn begin_stop(&mut self) {
        if matches!(self.pod.phase, Phase::NotReady) && self.pod.to_undo(false).is_empty() {
            for waiter in self.stop_waiters.drain(..) {
                let _ = waiter.send(Ok(()));
            }
            return;
        }
        self.activity = Activity::Stopping;
        let handle = self.handle.clone();
        self.jobs.spawn(async move { JobEnd::Stopped(stop_pod::stop_pod(&handle).await) });
    }

    fn begin_remove(&mut self) {
        self.remove_again = false;
        self.activity = Activity::Removing;
        let handle = self.handle.clone();
        self.jobs.spawn(async move { JobEnd::Removed(remove_pod::remove_pod(&handle).await) });
    }

    async fn job_ended(&mut self, end: Result<JobEnd, tokio::task::JoinError>) {
        let end = end.unwrap_or_else(|error| {
            let error = Error::Internal(anyhow::Error::new(error).context("a pod's job panicked"));
            tracing::error!(pod = self.handle.id, %error, "job failed");
            match self.activity {
                Activity::Idle => JobEnd::Other,
                Activity::Starting { .. } => JobEnd::Started(Err(error)),
                Activity::Reattaching { .. } => JobEnd::Reattached(None),
                Activity::Stopping => JobEnd::Stopped(Err(error)),
                Activity::Removing => JobEnd::Removed(Err(error)),
            }
        });
        match end {
            JobEnd::Started(Ok(process)) => {
                self.activity = Activity::Idle;
                self.watch_vm(process, false);
                if let Some(reply) = self.start_reply.take() {
                    let _ = reply.send(Ok(self.handle.id.clone()));
                }
                self.next();
            }
            JobEnd::Started(Err(error)) => {
                self.start_error = Some(error);
                self.begin_remove();
            }
            JobEnd::Reattached(process) => {
                self.activity = Activity::Idle;
                match process {
                    Some(process) => self.watch_vm(process, true),
                    // The search has failed, and nobody has asked for the pod's end.
                    None if self.pod.phase == Phase::Ready && self.nobody_waits() => {
                        self.begin_reattach(REATTACH_AGAIN);
                    }
                    None => {}
                }
                self.next();
            }
            JobEnd::Stopped(result) => {
                self.activity = Activity::Idle;
                if self.pod.phase != Phase::Ready {
                    self.watchers.abort_all();
                    self.handle.clear_live();
                }
                answer(&mut self.stop_waiters, result);
                self.next();
            }
            JobEnd::Removed(result) => {
                let result = match result {
                    Ok(()) => self.remove_record().await,
                    Err(error) => Err(error),
                };
                let Err(error) = result else {
                    self.gone = true;
                    return;
                };
                self.activity = Activity::Idle;
                self.remove_again = true;
                tracing::error!(pod = self.handle.id, %error, "removal failed, will be tried again");
                answer(&mut self.stop_waiters, Err(again(&error)));
                answer(&mut self.remove_waiters, Err(error));
                self.answer_failed_start();
            }
            JobEnd::Container(id) => {
                if let Some(jobs) = self.busy.get_mut(&id) {
                    *jobs -= 1;
                    if *jobs == 0 {
                        self.busy.remove(&id);
                    }
                }
            }
            JobEnd::Other => {}
        }
    }

    /// What was asked for while something else went on.
    fn next(&mut self) {
        if !self.remove_waiters.is_empty() {
            self.begin_remove();
        } else if !self.stop_waiters.is_empty() {
            self.begin_stop();
        }
    }

    fn nobody_waits(&self) -> bool {
        self.remove_waiters.is_empty() && self.stop_waiters.is_empty()
    }

    fn killed_for_silence(&self) -> Death {
        let reason = match self.pod.spec.host {
            None => "the guest stopped answering",
            Some(_) => "the pod's agent on this host stopped answering",
        };
        Death { reason: reason.to_owned(), cause: DeathCause::Silent }
    }

    fn watch_vm(&mut self, process: Arc<Process>, reattach: bool) {
        self.process = Some(process.clone());
        watchers::start(&mut self.watchers, &self.handle, process, reattach);
    }

    fn answer_failed_start(&mut self) {
        if let (Some(reply), Some(error)) = (self.start_reply.take(), self.start_error.take()) {
            let _ = reply.send(Err(error));
        }
    }

    async fn commit(&mut self, changes: Vec<Change>) -> Result<(), Error> {
        let observed = changes.iter().all(Change::is_observation);
        // Its containers are shown as killed with it.
        let vmm_killed = changes.iter().any(|c| matches!(c, Change::OutOfMemory { .. }));
        let mut next = (*self.pod).clone();
        for change in changes {
            next.apply(change).map_err(misfit)?;
        }
        let next = Arc::new(next);
        let written = self.write(&next).await;
        if written.is_err() && !observed {
            return written;
        }
        self.dirty = written.is_err();
        let before = std::mem::replace(&mut self.pod, next);
        self.publish.send_replace(self.pod.clone());
        let events = self.told.changed(&before, &self.pod);
        if !vmm_killed {
            self.measure_oom_kills(&events);
        }
        self.announce(events);
        written
    }

    fn measure_oom_kills(&self, events: &[Event]) {
        let stopped = events.iter().filter(|event| event.kind == EventKind::Stopped);
        for id in stopped.filter_map(|event| event.container.as_ref()) {
            let exit = self.pod.containers.get(id).and_then(|c| c.exit.as_ref());
            if exit.is_some_and(|exit| exit.oom_killed) {
                self.node.observer.measured(Measured::OomKill { victim: OomVictim::Container });
            }
        }
    }

    fn announce(&self, events: Vec<Event>) {
        for event in events {
            // Nobody may follow.
            let _ = self.node.events.send(event);
        }
    }

    async fn remove_record(&self) -> Result<(), Error> {
        let (journal, id) = (self.node.journal.clone(), self.handle.id.clone());
        blocking(move || journal.remove(&id))
            .await
            .map_err(|e| Error::io(format!("remove the record of pod {}", self.handle.id), e))
    }

    async fn write(&self, pod: &Arc<Pod>) -> Result<(), Error> {
        let (node, pod) = (self.node.clone(), pod.clone());
        blocking(move || node.journal.write(&pod, &node.boot_id))
            .await
            .map_err(|e| Error::io(format!("journal pod {}", self.handle.id), e))
    }
}

fn misfit(misfit: Misfit) -> Error {
    match misfit {
        Misfit::NoContainer { id } => Error::NotFound { what: "container", id },
        other => Error::precondition(other.to_string()),
    }
}

/// The same failure for a further waiter.
fn again(error: &Error) -> Error {
    Error::Internal(anyhow::anyhow!("{error}"))
}

fn answer(waiters: &mut Vec<Reply<()>>, result: Result<(), Error>) {
    let mut result = Some(result);
    while let Some(waiter) = waiters.pop() {
        let this = match &result {
            Some(Err(error)) if !waiters.is_empty() => Err(again(error)),
            Some(Ok(())) if !waiters.is_empty() => Ok(()),
            _ => result.take().unwrap_or(Ok(())),
        };
        let _ = waiter.send(this);
    }
}
