//! Panic handling: a panic in any task or thread aborts the agent, which otherwise would go on with
//! a broken task or lock and still answer pings. In a guest the kernel then panics, which the VMM
//! reports.
//!
//! A panic hook instead of `panic = "abort"`, as a Cargo profile applies to every program of the
//! workspace.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// The machine is the pod's VM, so its kernel may be made to panic.
static IN_A_GUEST: AtomicBool = AtomicBool::new(false);

/// Installs a panic hook that prints the message and aborts. Helpers replace it with one that
/// reports to the agent.
#[allow(clippy::disallowed_methods)] // aborts after the message was written
pub fn abort() {
    std::panic::set_hook(Box::new(|info| {
        // Written directly: the log drops lines, may be off, or may be the code that panicked.
        let line = format!("nacelle-agent: panic: {info}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        if IN_A_GUEST.load(Ordering::Relaxed) {
            // The kernel panics over PID 1 only when all its threads have exited, and one of them
            // may be blocked in a file system.
            let _ = std::fs::write("/proc/sysrq-trigger", "c");
        }
        std::process::abort();
    }));
}

/// Called by PID 1 of a guest only.
pub fn set_in_guest() {
    IN_A_GUEST.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const CHILD: &str = "NACELLE_TEST_PANICS";

    /// The test runs its own binary again as the process that panics.
    #[test]
    fn a_panic_in_a_task_or_a_thread_aborts_the_process() {
        match std::env::var(CHILD).as_deref() {
            Ok("task") => {
                super::abort();
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                // Without the hook this returns an error and the process continues.
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
