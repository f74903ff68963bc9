//! A panic anywhere ends the agent: with a task or a lock broken it would go on half alive, answering
//! pings and nothing else. In a guest the kernel panics then, which the VMM reports.
//!
//! Not by the profile's `panic = "abort"`, which holds for every program of the workspace.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// The machine is a guest, whose kernel may be made to panic.
static IN_A_GUEST: AtomicBool = AtomicBool::new(false);

/// Logs and aborts on every panic from now on. Helpers replace this: they report to the agent.
#[allow(clippy::disallowed_methods)] // the message has been written
pub fn abort() {
    std::panic::set_hook(Box::new(|info| {
        // Not through the log, which drops lines, may be off, or may be what has panicked.
        let line = format!("nacelle-agent: panic: {info}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        if IN_A_GUEST.load(Ordering::Relaxed) {
            // The kernel notices the end of PID 1 only when its last thread has ended, and one may
            // wait for a file system for ever.
            let _ = std::fs::write("/proc/sysrq-trigger", "c");
        }
        std::process::abort();
    }));
}

/// Called by PID 1 of a guest, and by nobody on a machine that is not the agent's own.
pub fn this_is_a_guest() {
    IN_A_GUEST.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const CHILD: &str = "NACELLE_TEST_PANICS";

    /// Runs itself a second time, as the process that panics.
    #[test]
    fn a_panic_in_a_task_or_a_thread_aborts_the_process() {
        match std::env::var(CHILD).as_deref() {
            Ok("task") => {
                super::abort();
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                // Without the hook it would be an error value here, and nothing else.
                let _ = runtime.block_on(async { tokio::spawn(async { panic!("broken") }).await });
                std::process::exit(0);
            }
            Ok("thread") => {
                super::abort();
                let _ = std::thread::spawn(|| panic!("broken")).join();
                std::process::exit(0);
            }
            _ => {}
        }
        for kind in ["task", "thread"] {
            let name = "panics::tests::a_panic_in_a_task_or_a_thread_aborts_the_process";
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env(CHILD, kind)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&child.stderr);
            assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{kind}: {text}");
            assert!(text.contains("nacelle-agent: panic:") && text.contains("broken"), "{text}");
        }
    }
}
