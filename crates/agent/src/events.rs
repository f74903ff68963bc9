//! Events of the pod (exits, OOM kills): numbered and kept until the host acknowledges them.

use std::collections::VecDeque;

use agent_api::v1;

/// Maximum kept events. At this number new processes are refused ([`EventLog::is_full`]), which
/// bounds the memory used for a host that never acknowledges.
const MAX_KEPT: usize = 8192;

#[derive(Debug, Default)]
pub struct EventLog {
    kept: VecDeque<v1::Event>,
    /// Sequence number of the newest event; the first is 1.
    newest: u64,
    /// Number of the current event stream; a newer stream ends it.
    pub(crate) stream: u64,
}

impl EventLog {
    /// Appends an event. An OOM event is dropped while an earlier one of the container is kept, as
    /// a container can cause any number of them.
    pub fn push(&mut self, event: v1::event::Event) {
        if let v1::event::Event::Oom(oom) = &event
            && self.has_oom_event(&oom.container_id)
        {
            return;
        }
        self.newest += 1;
        self.kept.push_back(v1::Event { sequence: self.newest, event: Some(event) });
    }

    /// Whether the newest kept event of the container's init is an OOM event.
    fn has_oom_event(&self, id: &str) -> bool {
        let newest = self.kept.iter().rev().find_map(|event| match event.event.as_ref()? {
            v1::event::Event::Oom(oom) if oom.container_id == id => Some(true),
            v1::event::Event::Exit(exit) if exit.container_id == id && exit.exec_id.is_empty() => {
                Some(false)
            }
            _ => None,
        });
        newest.unwrap_or(false)
    }

    pub fn is_full(&self) -> bool {
        self.kept.len() >= MAX_KEPT
    }

    /// Drops all events up to and including `sequence`.
    pub fn acknowledge(&mut self, sequence: u64) {
        while self.kept.front().is_some_and(|event| event.sequence <= sequence) {
            self.kept.pop_front();
        }
    }

    /// The first kept event after `sequence`.
    pub fn after(&self, sequence: u64) -> Option<v1::Event> {
        let index = self.kept.partition_point(|event| event.sequence <= sequence);
        self.kept.get(index).cloned()
    }

    /// Whether the exit event of this process is still kept.
    pub fn has_exit(&self, container_id: &str, exec_id: &str) -> bool {
        self.kept.iter().any(|event| match &event.event {
            Some(v1::event::Event::Exit(exit)) => {
                exit.container_id == container_id && exit.exec_id == exec_id
            }
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oom(id: &str) -> v1::event::Event {
        v1::event::Event::Oom(v1::Oom { container_id: id.to_owned() })
    }

    #[test]
    fn one_oom_event_is_kept_until_it_is_acknowledged_or_the_container_exits() {
        let mut log = EventLog::default();
        let exit = |exec: &str| {
            v1::event::Event::Exit(v1::Exit {
                container_id: "a".to_owned(),
                exec_id: exec.to_owned(),
                ..Default::default()
            })
        };
        for event in [oom("a"), oom("a"), exit("exec"), oom("a"), oom("b"), oom("a")] {
            log.push(event);
        }
        assert_eq!(log.kept.len(), 3);
        log.acknowledge(1);
        log.push(oom("a"));
        assert_eq!(log.after(3).unwrap().event, Some(oom("a")));
        // A new container with the same id.
        log.push(exit(""));
        log.push(oom("a"));
        log.push(oom("a"));
        assert_eq!((log.newest, log.kept.len()), (6, 5));
    }

    #[test]
    fn events_are_numbered_without_gaps_and_dropped_once_acknowledged() {
        let mut log = EventLog::default();
        for id in ["a", "b", "c"] {
            log.push(oom(id));
        }
        assert_eq!(log.after(0).unwrap().sequence, 1);
        assert_eq!(log.after(2).unwrap().sequence, 3);
        log.acknowledge(2);
        assert_eq!(log.after(0).unwrap().sequence, 3);
        log.acknowledge(u64::MAX);
        assert_eq!(log.after(0), None);
        log.push(oom("d"));
        assert_eq!(log.after(0).unwrap().sequence, 4);
    }
}
