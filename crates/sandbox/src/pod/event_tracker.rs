//! Derives lifecycle events ([`Event`]) from changes of a pod, by comparing its state before and
//! after, so that each event is sent once.

use std::time::SystemTime;

use crate::model::{ContainerState, Event, EventKind, PodId};
use crate::policy::{Container, ContainerPhase, Phase, Pod};

/// Events sent so far for one pod.
#[derive(Debug)]
pub(super) struct EventTracker {
    created: bool,
    stopped: bool,
}

impl EventTracker {
    /// For a pod of the journal, or one that is about to start.
    pub(super) fn new(pod: &Pod) -> Self {
        Self { created: pod.phase != Phase::Starting, stopped: pod.phase == Phase::NotReady }
    }

    /// Events of a change, in order.
    pub(super) fn changed(&mut self, before: &Pod, after: &Pod) -> Vec<Event> {
        let mut events = EventList::new(&after.id);
        if after.phase == Phase::Ready && !self.created {
            self.created = true;
            events.pod(EventKind::Created);
            events.pod(EventKind::Started);
        }
        for container in after.containers.values().filter(|c| is_visible(c)) {
            let old = before.containers.get(&container.id);
            if !old.is_some_and(is_visible) {
                events.container(EventKind::Created, container);
            }
            if container.started_at.is_some() && old.is_none_or(|c| c.started_at.is_none()) {
                events.container(EventKind::Started, container);
            }
            if has_exited(container) && !old.is_some_and(has_exited) {
                events.container(EventKind::Stopped, container);
            }
        }
        for gone in before.containers.values().filter(|c| is_visible(c)) {
            if !after.containers.contains_key(&gone.id) {
                events.container(EventKind::Deleted, gone);
            }
        }
        if after.phase == Phase::NotReady && !self.stopped {
            self.stopped = true;
            events.pod(EventKind::Stopped);
        }
        events.list
    }

    /// Events of the pod's removal, with those of its remaining containers.
    pub(super) fn removed(&mut self, last: &Pod) -> Vec<Event> {
        let mut events = EventList::new(&last.id);
        if !self.created {
            return events.list;
        }
        for container in last.containers.values().filter(|c| is_visible(c)) {
            if !has_exited(container) {
                events.container(EventKind::Stopped, container);
            }
            events.container(EventKind::Deleted, container);
        }
        if !self.stopped {
            events.pod(EventKind::Stopped);
        }
        events.pod(EventKind::Deleted);
        events.list
    }
}

/// No event was sent for a container that is being created.
fn is_visible(container: &Container) -> bool {
    container.phase != ContainerPhase::Creating
}

fn has_exited(container: &Container) -> bool {
    container.state() == ContainerState::Exited
}

struct EventList {
    pod: PodId,
    at: SystemTime,
    list: Vec<Event>,
}

impl EventList {
    fn new(pod: &PodId) -> Self {
        Self { pod: pod.clone(), at: SystemTime::now(), list: Vec::new() }
    }

    fn pod(&mut self, kind: EventKind) {
        let (at, pod) = (self.at, self.pod.clone());
        self.list.push(Event { kind, at, pod, container: None });
    }

    fn container(&mut self, kind: EventKind, container: &Container) {
        let (at, pod) = (self.at, self.pod.clone());
        self.list.push(Event { kind, at, pod, container: Some(container.id.clone()) });
    }
}
