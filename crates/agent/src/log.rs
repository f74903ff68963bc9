//! The agent's own log: one line an event, on the console (`hvc0` in a guest).
//!
//! A subscriber of our own because the usual one brings regular expressions, colours and time
//! formatting into every guest. Quiet unless `nacelle.log=` on the kernel's command line says
//! otherwise. Containers can provoke lines, so there are at most [`BURST`] in a second.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Lines a second. A console line costs the host a dozen VM exits; a container that provokes
/// errors in a loop must not be able to make a storm of it.
const BURST: u32 = 50;

struct Console {
    level: LevelFilter,
    window: Mutex<(Instant, u32)>,
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.0, " {value:?}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}

impl Subscriber for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("agent");
        // Libraries are heard only when everything is asked for.
        *metadata.level() <= self.level && (ours || self.level >= LevelFilter::TRACE)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        {
            let mut window = self.window.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if window.0.elapsed() > Duration::from_secs(1) {
                *window = (Instant::now(), 0);
            }
            window.1 += 1;
            if window.1 > BURST {
                return;
            }
        }
        let mut line = Line(format!("nacelle-agent: {}", event.metadata().level()));
        event.record(&mut line);
        line.0.push('\n');
        let _ = std::io::stderr().write_all(line.0.as_bytes());
    }
}

/// Installs the log; `level` as in `nacelle.log=debug`.
pub fn install(level: Option<&str>) {
    let level = level.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::ERROR);
    let console = Console { level, window: Mutex::new((Instant::now(), 0)) };
    // A second installation (in tests) keeps the first.
    let _ = tracing::subscriber::set_global_default(console);
}
