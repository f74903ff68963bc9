//! Log lines as JSON objects, one per line, one `write` each.
//!
//! An own subscriber instead of `tracing-subscriber`, which would use a tenth of the process's
//! memory (regexes, thread-local buffers); this one uses a few kilobytes.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line, bytes: guests and clients choose parts of some messages.
const MAX_LINE: usize = 4 << 10;

/// Writes events of level INFO and above to `file`, or to standard error.
pub fn init(name: &str, file: Option<OwnedFd>) {
    let log = Log { name: name.to_owned(), file };
    // A second call (tests in one process) keeps the first subscriber.
    let _ = tracing::subscriber::set_global_default(log);
}

struct Log {
    name: String,
    file: Option<OwnedFd>,
}

#[derive(Default)]
struct Fields {
    map: Map<String, Value>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.map.insert(field.name().to_owned(), text.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.map.insert(field.name().to_owned(), value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.map.insert(field.name().to_owned(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.map.insert(field.name().to_owned(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.map.insert(field.name().to_owned(), value.into());
    }
}

impl Log {
    fn line(&self, event: &Event<'_>) -> Vec<u8> {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut map = Map::new();
        map.insert("ts".to_owned(), format!("{}.{:06}", now.as_secs(), now.subsec_micros()).into());
        map.insert("level".to_owned(), event.metadata().level().as_str().into());
        map.insert("vm".to_owned(), self.name.clone().into());
        map.insert("target".to_owned(), event.metadata().target().into());
        map.append(&mut fields.map);
        let mut line = serde_json::to_vec(&map).unwrap_or_default();
        if line.len() > MAX_LINE {
            map.retain(|key, _| matches!(key.as_str(), "ts" | "level" | "vm" | "target"));
            map.insert("message".to_owned(), "log line was too long".into());
            line = serde_json::to_vec(&map).unwrap_or_default();
        }
        line.push(b'\n');
        line
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::INFO
    }

    fn event(&self, event: &Event<'_>) {
        let line = self.line(event);
        // An error of the log cannot be reported.
        match &self.file {
            Some(file) => drop(unistd::write(file.as_fd(), &line)),
            None => drop(std::io::stderr().write_all(&line)),
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn a_line_is_one_json_object_and_a_long_one_is_replaced() {
        let mut file = tempfile::tempfile().unwrap();
        let log = Log { name: "vm1".to_owned(), file: Some(file.try_clone().unwrap().into()) };
        tracing::subscriber::with_default(log, || {
            tracing::warn!(queue = 3, "bad \"descriptor\"");
            tracing::debug!("not shown");
            tracing::error!("{}", "x".repeat(2 * MAX_LINE));
        });
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["message"], "bad \"descriptor\"");
        assert_eq!((&lines[0]["queue"], &lines[0]["vm"]), (&3.into(), &"vm1".into()));
        assert_eq!(lines[1]["message"], "log line was too long");
    }
}
