//! What a change of a pod means to those who follow it ([`Event`]): found by comparing the pod
//! before and after, so that each turn is told once, by whatever way it came.

use std::time::SystemTime;

use crate::model::{ContainerState, Event, EventKind, PodId};
use crate::policy::{Container, ContainerPhase, Phase, Pod};

/// What has been told of one pod.
#[derive(Debug)]
pub(super) struct Told {
    created: bool,
    stopped: bool,
}

impl Told {
    /// Of a pod as it was found in the journal, or is about to start.
    pub(super) fn of(pod: &Pod) -> Self {
        Self { created: pod.phase != Phase::Starting, stopped: pod.phase == Phase::NotReady }
    }

    /// Events of the step from one state to the next, in the order in which they are to be told.
    pub(super) fn changed(&mut self, before: &Pod, after: &Pod) -> Vec<Event> {
        let mut told = Events::new(&after.id);
        if after.phase == Phase::Ready && !self.created {
            self.created = true;
            told.pod(EventKind::Created);
            told.pod(EventKind::Started);
        }
        for container in after.containers.values().filter(|c| is_shown(c)) {
            let old = before.containers.get(&container.id);
            if !old.is_some_and(is_shown) {
                told.container(EventKind::Created, container);
            }
            if container.started_at.is_some() && old.is_none_or(|c| c.started_at.is_none()) {
                told.container(EventKind::Started, container);
            }
            if has_exited(container) && !old.is_some_and(has_exited) {
                told.container(EventKind::Stopped, container);
            }
        }
        for gone in before.containers.values().filter(|c| is_shown(c)) {
            if !after.containers.contains_key(&gone.id) {
                told.container(EventKind::Deleted, gone);
            }
        }
        if after.phase == Phase::NotReady && !self.stopped {
            self.stopped = true;
            told.pod(EventKind::Stopped);
        }
        told.events
    }

    /// The pod and what it still held are gone.
    pub(super) fn gone(&mut self, last: &Pod) -> Vec<Event> {
        let mut told = Events::new(&last.id);
        if !self.created {
            return told.events;
        }
        for container in last.containers.values().filter(|c| is_shown(c)) {
            if !has_exited(container) {
                told.container(EventKind::Stopped, container);
            }
            told.container(EventKind::Deleted, container);
        }
        if !self.stopped {
            told.pod(EventKind::Stopped);
        }
        told.pod(EventKind::Deleted);
        told.events
    }
}

/// A container that is being created was never heard of.
fn is_shown(container: &Container) -> bool {
    container.phase != ContainerPhase::Creating
}

fn has_exited(container: &Container) -> bool {
    container.state() == ContainerState::Exited
}

struct Events {
    pod: PodId,
    at: SystemTime,
    events: Vec<Event>,
}

impl Events {
    fn new(pod: &PodId) -> Self {
        Self { pod: pod.clone(), at: SystemTime::now(), events: Vec::new() }
    }

    fn pod(&mut self, kind: EventKind) {
        let (at, pod) = (self.at, self.pod.clone());
        self.events.push(Event { kind, at, pod, container: None });
    }

    fn container(&mut self, kind: EventKind, container: &Container) {
        let (at, pod) = (self.at, self.pod.clone());
        self.events.push(Event { kind, at, pod, container: Some(container.id.clone()) });
    }
}
