//! The owner task of a pod: requests and changes in, published state out.
//!
//! It never waits for a guest, a boot or the network; its jobs do. So it handles a stop during a
//! start at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::event_tracker::EventTracker;
use super::handle::Handle;
use super::message::{ExitCause, Msg, Reply, Request};
use super::{
    create_container, recover, remove_container, remove_pod, run_pod, start_container, stop_pod,
    update_container, update_pod, watch as watchers,
};
use crate::error::Error;
use crate::host::blocking;
use crate::host::process::Process;
use crate::model::{ContainerId, Event, EventKind, PodId};
use crate::node::Node;
use crate::observe::{DeathCause, Measured, OomVictim, Outcome, PodKind};
use crate::policy::{Change, ContainerPhase, Phase, Pod, TransitionError};

/// Capacity of the request queue; further senders wait.
const QUEUE: usize = 64;
/// Delay before a failed removal is retried.
const REMOVE_RETRY: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// Delay before a panicked search for a pod's VMM is restarted.
const REATTACH_RETRY: Duration = Duration::from_secs(1);
/// Delay before a failed write of the record is retried.
const WRITE_RETRY: Duration = Duration::from_secs(1);

/// First action of an owner task.
pub(crate) enum InitialAction {
    Start {
        reply: Reply<PodId>,
        cancel: CancellationToken,
    },
    /// Recover a pod of the journal.
    Recover,
}

pub(super) enum JobResult {
    Started(Result<Arc<Process>, Error>),
    Reattached(Option<Arc<Process>>),
    Stopped(Result<(), Error>),
    Removed(Result<(), Error>),
    /// A job on this container.
    Container(ContainerId),
    Other,
}

/// The exclusive operation in progress.
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
    event_tracker: EventTracker,
    activity: Activity,
    jobs: JoinSet<JobResult>,
    /// Running jobs per container.
    busy: HashMap<ContainerId, usize>,
    /// Tasks that run as long as the VM.
    watchers: JoinSet<()>,
    process: Option<Arc<Process>>,
    unresponsive: bool,
    start_reply: Option<Reply<PodId>>,
    /// Error of a failed start, until the start is undone.
    start_error: Option<Error>,
    stop_waiters: Vec<Reply<()>>,
    remove_waiters: Vec<Reply<()>>,
    /// The record on disk is outdated.
    dirty: bool,
    retry_removal: bool,
    gone: bool,
}

/// Creates a pod's handle and its owner task.
pub(crate) fn new(
    node: Arc<Node>,
    pod: Pod,
    initial: InitialAction,
) -> (Arc<Handle>, impl Future<Output = ()> + Send) {
    let (requests, incoming) = mpsc::channel(QUEUE);
    let pod = Arc::new(pod);
    let (publish, state) = watch::channel(pod.clone());
    let handle = Arc::new(Handle::new(node.clone(), pod.id.clone(), requests, state));
    let owner = Owner {
        handle: handle.clone(),
        node,
        event_tracker: EventTracker::new(&pod),
        pod,
        publish,
        activity: Activity::Idle,
        jobs: JoinSet::new(),
        busy: HashMap::new(),
        watchers: JoinSet::new(),
        process: None,
        unresponsive: false,
        start_reply: None,
        start_error: None,
        stop_waiters: Vec::new(),
        remove_waiters: Vec::new(),
        dirty: false,
        retry_removal: false,
        gone: false,
    };
    (handle, owner.run(initial, incoming))
}

impl Owner {
    async fn run(mut self, initial: InitialAction, mut incoming: mpsc::Receiver<Msg>) {
        let shutdown = self.node.shutdown.clone();
        self.start_initial(initial);
        let mut retries = interval(REMOVE_RETRY);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.gone {
            let pause = match (self.dirty, self.retry_removal) {
                (true, _) => WRITE_RETRY,
                (false, true) => REMOVE_RETRY,
                (false, false) => Duration::MAX,
            };
            tokio::select! {
                () = shutdown.cancelled() => {
                    // The next daemon continues the logs.
                    self.handle.stop_logs();
                    return;
                }
                Some(end) = self.jobs.join_next() => self.job_ended(end).await,
                Some(msg) = incoming.recv() => self.handle(msg).await,
                _ = retries.tick(), if self.incomplete_containers().next().is_some() => {
                    self.remove_incomplete_containers();
                }
                () = tokio::time::sleep(pause), if pause != Duration::MAX => self.retry().await,
            }
        }
        self.handle.clear_runtime_state();
        self.node.registry.release_pod(&self.handle.id);
        let events = self.event_tracker.removed(&self.pod);
        self.publish_events(events);
        for waiter in self.stop_waiters.drain(..).chain(self.remove_waiters.drain(..)) {
            let _ = waiter.send(Ok(()));
        }
        self.reply_failed_start();
    }

    fn start_initial(&mut self, initial: InitialAction) {
        match initial {
            InitialAction::Start { reply, cancel } => {
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
                    JobResult::Started(result)
                });
            }
            InitialAction::Recover => match self.pod.phase {
                Phase::Starting | Phase::Removing => self.start_removal(),
                Phase::Stopping => self.start_stop(),
                Phase::NotReady => {}
                Phase::Ready => self.start_reattach(Duration::ZERO),
            },
        }
    }

    fn start_reattach(&mut self, pause: Duration) {
        let cancel = CancellationToken::new();
        self.activity = Activity::Reattaching { cancel: cancel.clone() };
        let handle = self.handle.clone();
        self.jobs.spawn(async move {
            let _ = tokio::time::timeout(pause, cancel.cancelled()).await;
            JobResult::Reattached(recover::find_vm(&handle, &cancel).await)
        });
    }

    async fn retry(&mut self) {
        if self.dirty {
            self.dirty = self.write(&self.pod.clone()).await.is_err();
        } else if self.retry_removal && matches!(self.activity, Activity::Idle) {
            self.start_removal();
        }
    }

    async fn handle(&mut self, msg: Msg) {
        match msg {
            Msg::Request(request) => self.request(request),
            Msg::Commit { changes, reply } => {
                let result = self.commit(changes).await;
                let _ = reply.send(result);
            }
            Msg::VmmEnded { cause } => {
                let cause = match self.unresponsive {
                    true => self.unresponsive_cause(),
                    false => cause,
                };
                if self.pod.phase == Phase::Ready {
                    let what = match self.pod.spec.host {
                        None => "VM exited unexpectedly",
                        Some(_) => "agent of a host pod exited unexpectedly",
                    };
                    tracing::error!(pod = self.handle.id, reason = cause.reason, "{what}");
                }
                cause.measure(&self.handle);
                let change = cause.change(std::time::SystemTime::now());
                let _ = self.commit(vec![change]).await;
                // The guest can no longer be called.
                self.watchers = JoinSet::new();
                self.process = None;
                self.handle.clear_runtime_state();
            }
            Msg::GuestUnresponsive => {
                tracing::error!(pod = self.handle.id, "agent does not answer, killing it");
                self.unresponsive = true;
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
                    Activity::Idle => self.start_stop(),
                    Activity::Stopping | Activity::Removing => {}
                }
            }
            Request::Remove(reply) => {
                self.remove_waiters.push(reply);
                match &self.activity {
                    Activity::Starting { cancel } | Activity::Reattaching { cancel } => {
                        cancel.cancel();
                    }
                    Activity::Idle => self.start_removal(),
                    Activity::Stopping | Activity::Removing => {}
                }
            }
            Request::CreateContainer { container, reserved, reply } => {
                let handle = self.handle.clone();
                self.spawn_container_job(Some(container.id.clone()), reply, async move {
                    let cancel = reserved.into_cancel_token();
                    create_container::create_container(&handle, *container, &cancel).await
                });
            }
            Request::StartContainer { id, reply } => {
                let handle = self.handle.clone();
                self.spawn_container_job(None, reply, async move {
                    start_container::start_container(&handle, &id).await
                });
            }
            Request::RemoveContainer { id, reply } => {
                let handle = self.handle.clone();
                self.spawn_container_job(Some(id.clone()), reply, async move {
                    remove_container::remove_container(&handle, &id).await
                });
            }
            Request::UpdatePod { change, reply } => {
                let handle = self.handle.clone();
                self.spawn_container_job(None, reply, async move {
                    update_pod::update_pod(&handle, change).await
                });
            }
            Request::UpdateContainer { id, resources, reply } => {
                let handle = self.handle.clone();
                self.spawn_container_job(None, reply, async move {
                    update_container::update_container(&handle, &id, *resources).await
                });
            }
        }
    }

    /// Spawns a job on a container. It completes even if its caller goes away, and the pod's
    /// removal waits for it. `container`: the container that the job creates or removes, so that it
    /// is not treated as incomplete.
    fn spawn_container_job(
        &mut self,
        container: Option<ContainerId>,
        reply: Reply<()>,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        let jobs_lock = self.handle.jobs_lock.clone();
        if let Some(id) = &container {
            *self.busy.entry(id.clone()).or_default() += 1;
        }
        self.jobs.spawn(async move {
            let lock = jobs_lock.read_owned().await;
            let result = work.await;
            drop(lock);
            let _ = reply.send(result);
            container.map_or(JobResult::Other, JobResult::Container)
        });
    }

    /// Containers with a failed creation or removal and no running job: no listing shows them, so
    /// no caller will remove them.
    fn incomplete_containers(&self) -> impl Iterator<Item = &ContainerId> {
        let ready = matches!((&self.activity, self.pod.phase), (Activity::Idle, Phase::Ready));
        let containers = self.pod.containers.values().filter(move |_| ready);
        containers
            .filter(|c| c.phase != ContainerPhase::Present && !self.busy.contains_key(&c.id))
            .map(|c| &c.id)
    }

    fn remove_incomplete_containers(&mut self) {
        for id in self.incomplete_containers().cloned().collect::<Vec<_>>() {
            let handle = self.handle.clone();
            // No caller waits for the result.
            let (reply, _) = oneshot::channel();
            self.spawn_container_job(Some(id.clone()), reply, async move {
                let removed = remove_container::remove_incomplete(&handle, &id).await;
                if let Err(error) = &removed {
                    tracing::warn!(container = id, %error, "removal failed, will be retried");
                }
                removed
            });
        }
    }

    fn start_stop(&mut self) {
        if matches!(self.pod.phase, Phase::NotReady) && self.pod.to_undo(false).is_empty() {
            for waiter in self.stop_waiters.drain(..) {
                let _ = waiter.send(Ok(()));
            }
            return;
        }
        self.activity = Activity::Stopping;
        let handle = self.handle.clone();
        self.jobs.spawn(async move { JobResult::Stopped(stop_pod::stop_pod(&handle).await) });
    }

    fn start_removal(&mut self) {
        self.retry_removal = false;
        self.activity = Activity::Removing;
        let handle = self.handle.clone();
        self.jobs.spawn(async move { JobResult::Removed(remove_pod::remove_pod(&handle).await) });
    }

    async fn job_ended(&mut self, end: Result<JobResult, tokio::task::JoinError>) {
        let end = end.unwrap_or_else(|error| {
            let error =
                Error::Internal(anyhow::Error::new(error).context("a job of the pod panicked"));
            tracing::error!(pod = self.handle.id, %error, "job failed");
            match self.activity {
                Activity::Idle => JobResult::Other,
                Activity::Starting { .. } => JobResult::Started(Err(error)),
                Activity::Reattaching { .. } => JobResult::Reattached(None),
                Activity::Stopping => JobResult::Stopped(Err(error)),
                Activity::Removing => JobResult::Removed(Err(error)),
            }
        });
        match end {
            JobResult::Started(Ok(process)) => {
                self.activity = Activity::Idle;
                self.watch_vm(process, false);
                if let Some(reply) = self.start_reply.take() {
                    let _ = reply.send(Ok(self.handle.id.clone()));
                }
                self.start_next();
            }
            JobResult::Started(Err(error)) => {
                self.start_error = Some(error);
                self.start_removal();
            }
            JobResult::Reattached(process) => {
                self.activity = Activity::Idle;
                match process {
                    Some(process) => self.watch_vm(process, true),
                    // The search has failed, and no stop or removal is pending.
                    None if self.pod.phase == Phase::Ready && self.has_no_waiters() => {
                        self.start_reattach(REATTACH_RETRY);
                    }
                    None => {}
                }
                self.start_next();
            }
            JobResult::Stopped(result) => {
                self.activity = Activity::Idle;
                if self.pod.phase != Phase::Ready {
                    self.watchers.abort_all();
                    self.handle.clear_runtime_state();
                }
                reply_to_all(&mut self.stop_waiters, result);
                self.start_next();
            }
            JobResult::Removed(result) => {
                let result = match result {
                    Ok(()) => self.remove_record().await,
                    Err(error) => Err(error),
                };
                let Err(error) = result else {
                    self.gone = true;
                    return;
                };
                self.activity = Activity::Idle;
                self.retry_removal = true;
                tracing::error!(pod = self.handle.id, %error, "removal failed, will be retried");
                reply_to_all(&mut self.stop_waiters, Err(copy_error(&error)));
                reply_to_all(&mut self.remove_waiters, Err(error));
                self.reply_failed_start();
            }
            JobResult::Container(id) => {
                if let Some(jobs) = self.busy.get_mut(&id) {
                    *jobs -= 1;
                    if *jobs == 0 {
                        self.busy.remove(&id);
                    }
                }
            }
            JobResult::Other => {}
        }
    }

    /// Starts a pending removal or stop.
    fn start_next(&mut self) {
        if !self.remove_waiters.is_empty() {
            self.start_removal();
        } else if !self.stop_waiters.is_empty() {
            self.start_stop();
        }
    }

    fn has_no_waiters(&self) -> bool {
        self.remove_waiters.is_empty() && self.stop_waiters.is_empty()
    }

    fn unresponsive_cause(&self) -> ExitCause {
        let reason = match self.pod.spec.host {
            None => "the guest stopped answering",
            Some(_) => "the pod's agent on this host stopped answering",
        };
        ExitCause { reason: reason.to_owned(), cause: DeathCause::Unresponsive }
    }

    fn watch_vm(&mut self, process: Arc<Process>, reattach: bool) {
        self.process = Some(process.clone());
        watchers::start(&mut self.watchers, &self.handle, process, reattach);
    }

    fn reply_failed_start(&mut self) {
        if let (Some(reply), Some(error)) = (self.start_reply.take(), self.start_error.take()) {
            let _ = reply.send(Err(error));
        }
    }

    async fn commit(&mut self, changes: Vec<Change>) -> Result<(), Error> {
        let is_observed = changes.iter().all(Change::is_observation);
        // Its containers are shown as killed with it.
        let vmm_killed = changes.iter().any(|c| matches!(c, Change::OutOfMemory { .. }));
        let mut next = (*self.pod).clone();
        for change in changes {
            next.apply(change).map_err(transition_error)?;
        }
        let next = Arc::new(next);
        let written = self.write(&next).await;
        if written.is_err() && !is_observed {
            return written;
        }
        self.dirty = written.is_err();
        let before = std::mem::replace(&mut self.pod, next);
        self.publish.send_replace(self.pod.clone());
        let events = self.event_tracker.changed(&before, &self.pod);
        if !vmm_killed {
            self.measure_oom_kills(&events);
        }
        self.publish_events(events);
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

    fn publish_events(&self, events: Vec<Event>) {
        for event in events {
            // Fails without subscribers.
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

fn transition_error(transition_error: TransitionError) -> Error {
    match transition_error {
        TransitionError::NoContainer { id } => Error::NotFound { what: "container", id },
        other => Error::precondition(other.to_string()),
    }
}

/// Copies an error for a further waiter.
fn copy_error(error: &Error) -> Error {
    Error::Internal(anyhow::anyhow!("{error}"))
}

fn reply_to_all(waiters: &mut Vec<Reply<()>>, result: Result<(), Error>) {
    let mut result = Some(result);
    while let Some(waiter) = waiters.pop() {
        let this = match &result {
            Some(Err(error)) if !waiters.is_empty() => Err(copy_error(error)),
            Some(Ok(())) if !waiters.is_empty() => Ok(()),
            _ => result.take().unwrap_or(Ok(())),
        };
        let _ = waiter.send(this);
    }
}
