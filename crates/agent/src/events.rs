//! What the host must not miss: exits and OOM verdicts, numbered, kept until acknowledged.

use std::collections::VecDeque;

use agent_api::v1;

/// Events kept. They come one or two a process; a host that starts processes and never collects
/// their exits is refused further ones (see [`EventLog::is_full`]) before memory becomes a problem.
const MAX_KEPT: usize = 8192;

#[derive(Debug, Default)]
pub struct EventLog {
    kept: VecDeque<v1::Event>,
    /// Sequence of the newest event ever; the first one is 1.
    newest: u64,
    /// The current stream of events; a newer one ends the former.
    pub(crate) stream: u64,
}

impl EventLog {
    pub fn push(&mut self, event: v1::event::Event) {
        self.newest += 1;
        self.kept.push_back(v1::Event { sequence: self.newest, event: Some(event) });
    }

    pub fn is_full(&self) -> bool {
        self.kept.len() >= MAX_KEPT
    }

    /// Forgets all up to and including `sequence`.
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

    /// Whether the exit of this process is still kept.
    pub fn holds_exit(&self, container_id: &str, exec_id: &str) -> bool {
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
    fn events_are_numbered_without_gaps_and_forgotten_once_acknowledged() {
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
