//! What is kept and printed of an outer machine that failed.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::qemu::monitor;
use crate::paths;

/// How long an outer machine that fell silent gets to write down what it was doing.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Sends an NMI to an outer machine without output, so that its kernel prints its state.
pub(super) fn last_words(scratch: &Path) {
    let sent = UnixStream::connect(monitor(scratch)).and_then(|mut monitor| {
        monitor.set_read_timeout(Some(LAST_WORDS))?;
        monitor.write_all(b"info registers\ninfo status\nnmi\n")?;
        let mut reply = Vec::new();
        // The panic ends QEMU, and with it this connection; else the timeout does.
        let _ = monitor.read_to_end(&mut reply);
        let mut console = OpenOptions::new().append(true).open(scratch.join("console"))?;
        console.write_all(&reply)
    });
    if let Err(error) = sent {
        eprintln!("lab: asking QEMU for the machine's state: {error}");
    }
}

/// Keeps the outer kernel's console for whoever wants to know why it died.
pub(super) fn keep_console(scratch: &Path) {
    let Ok(cache) = paths::cache() else { return };
    let kept = cache.join("lab-console.log");
    if fs::copy(scratch.join("console"), &kept).is_ok() {
        eprintln!("lab: the outer machine's console is kept in {}", kept.display());
    }
}

pub(super) fn log_of(scratch: &Path) -> String {
    let read = |name: &str| fs::read(scratch.join(name)).unwrap_or_default();
    let console = String::from_utf8_lossy(&read("console")).into_owned();
    let lines: Vec<_> = console.lines().collect();
    let mut text = String::new();
    for line in String::from_utf8_lossy(&read("qemu.log")).lines() {
        if !line.contains("TCG doesn't support") {
            text.push_str(&format!("\n  qemu: {line}"));
        }
    }
    for line in &lines[lines.len().saturating_sub(40)..] {
        text.push_str(&format!("\n  console: {line}"));
    }
    text
}
