//! The warnings that this process logs, for tests of what is logged and what is not.

use std::fmt::Write;
use std::sync::{Mutex, Once};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The warnings logged since [`Self::collect`].
pub(super) struct Warnings(());

impl Warnings {
    pub(super) fn collect() -> Self {
        static STARTED: Once = Once::new();
        STARTED.call_once(|| tracing::subscriber::set_global_default(Collector).unwrap());
        Self(())
    }

    /// Those that contain the text. Tests run concurrently: it has to be an id of the test's own.
    #[expect(clippy::unused_self, reason = "only what is collected can be looked up")]
    pub(super) fn with(&self, text: &str) -> Vec<String> {
        LINES.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
    }
}

struct Collector;

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        LINES.lock().unwrap().push(line.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}
