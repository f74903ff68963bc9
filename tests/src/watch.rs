//! Time limit of a story: after it, the program exits and prints the state of the host's processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Several times what the longest story takes on a busy machine, and more than three deadlines of a
/// call, so that a story with an unanswered call fails before.
const LIMIT: Duration = Duration::from_secs(480);

/// Exit status after a timeout, as of timeout(1).
const STATUS_TIMEOUT: i32 = 124;

/// Runs `story`.
pub fn run(name: &str, story: fn() -> Result<()>) -> Result<()> {
    let (done, ending): (Sender<()>, _) = channel();
    let watched = name.to_owned();
    let watch = thread::spawn(move || {
        if ending.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("HUNG {watched}: not finished after {LIMIT:?}");
            eprintln!("{}", processes());
            std::process::exit(STATUS_TIMEOUT);
        }
    });
    let begin = Instant::now();
    let outcome = story();
    eprintln!("--- {name}: {} s", begin.elapsed().as_secs());
    drop(done);
    let _ = watch.join();
    outcome
}

/// Every process and thread with its kernel stack, and the end of the kernel log.
fn processes() -> String {
    let mut text = String::new();
    for folder in numbered(Path::new("/proc")) {
        let command = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        if command.is_empty() {
            // A kernel thread.
            continue;
        }
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        text.push_str(&format!("{} {command}\n", folder.display()));
        for task in numbered(&folder.join("task")) {
            let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            // `pid (comm) state ...`, proc(5).
            let stat = read("stat");
            let state =
                stat.rsplit_once(") ").map_or("?", |(_, rest)| rest.get(..1).unwrap_or("?"));
            let calls: Vec<_> = read("stack").lines().map(|l| l.trim().to_owned()).collect();
            text.push_str(&format!("  {} {state} {}\n", read("comm").trim(), calls.join(" < ")));
        }
    }
    let kernel = Command::new("dmesg").output().map(|output| output.stdout).unwrap_or_default();
    let kernel = String::from_utf8_lossy(&kernel).into_owned();
    let lines: Vec<_> = kernel.lines().collect();
    text.push_str(&lines[lines.len().saturating_sub(30)..].join("\n"));
    text
}

fn numbered(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|n| n.parse::<u32>().is_ok()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_this_program_and_its_threads() {
        let text = processes();
        let own = format!("/proc/{} ", std::process::id());
        assert!(text.lines().any(|line| line.starts_with(&own)), "{text}");
        assert!(text.lines().any(|line| line.starts_with("  ")), "{text}");
    }
}
