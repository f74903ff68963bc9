//! Log of the agent: one line per event on stderr (the console `hvc0` in a guest).
//!
//! A small subscriber instead of tracing-subscriber, which would add regular expressions, colours
//! and time formatting to the initramfs. Level ERROR unless `nacelle.log=` on the kernel command
//! line sets another. Containers can cause log lines, so there are at most [`BURST`] in a second.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Maximum lines in a second. A console line costs the host a dozen VM exits; a container could
/// cause errors in a loop.
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
        // Other crates log only at level TRACE.
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

/// Installs the subscriber; `level` as in `nacelle.log=debug`.
pub fn install(level: Option<&str>) {
    let level = level.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::ERROR);
    let console = Console { level, window: Mutex::new((Instant::now(), 0)) };
    // A second call (in tests) keeps the first subscriber.
    let _ = tracing::subscriber::set_global_default(console);
}
