//! How a VM ends, and how that is told.
//!
//! ```text
//!   running --power off--> Shutdown      --reset--> Reset, or Panic if the guest said so before
//!           --triple fault--> TripleFault, or Panic  --kill, SIGTERM--> Killed
//!           --VMM's own failure--> Error
//!           --panic port--> panicking --reset or PANIC_GRACE--> Panic
//! ```
//! The first ending wins. A guest whose panic was not announced on the panic port is found out by
//! its console.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::{ExitReason, VmExit};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// After announcing its panic a guest prints the rest of its report and resets; one that does not
/// reset is ended then.
const PANIC_GRACE: Duration = Duration::from_secs(2);
/// Console bytes that go into the status file.
const TAIL: usize = 4 << 10;
/// Console bytes in which a panic's first line is looked for: a report with all processors' stacks.
const PANIC_SEARCH: usize = 64 << 10;
const PANIC_TEXT: &str = "Kernel panic - not syncing";
/// A panic's line is cut there; the guest chooses its length.
const PANIC_LINE: usize = 400;

/// Set once; readable by everybody.
#[derive(Debug, Clone)]
pub struct End {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Looked at by every vCPU after every exit; the truth is in `state`.
    ended: AtomicBool,
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    ended: Option<(ExitReason, String)>,
    panicked: Option<Instant>,
}

impl End {
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Shared { ended: AtomicBool::new(false), state: Mutex::default(), event };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Ends the VM, unless it has ended already.
    pub fn set(&self, reason: ExitReason, message: impl Into<String>) {
        let mut state = self.state();
        if state.ended.is_none() {
            state.ended = Some((reason, message.into()));
            self.shared.ended.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// The guest announced a panic.
    pub fn panicked(&self) {
        let mut state = self.state();
        if state.panicked.is_none() {
            state.panicked = Some(Instant::now());
            self.wake();
        }
    }

    pub fn is_set(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Whether the VM has ended by `now`; otherwise when to look again, if not on the event.
    pub fn poll(&self, now: Instant) -> Poll {
        let state = self.state();
        let deadline = state.panicked.map(|at| at + PANIC_GRACE);
        match deadline {
            _ if state.ended.is_some() => Poll::Ended,
            Some(at) if at <= now => Poll::Ended,
            deadline => Poll::Running { look_again: deadline },
        }
    }

    /// Readable when there is something new to [`Self::poll`].
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// What to report, given the console's last bytes.
    pub fn report(&self, console: &[u8]) -> VmExit {
        let state = self.state();
        let (reason, message) = match (&state.ended, state.panicked) {
            (Some((reason, message)), None) => (*reason, message.clone()),
            // Killing a guest that had panicked does not unpanic it.
            (_, Some(_)) => (ExitReason::Panic, "guest kernel panicked".to_owned()),
            (None, None) => (ExitReason::Error, "VMM stopped for no reason".to_owned()),
        };
        let recent = &console[console.len().saturating_sub(PANIC_SEARCH)..];
        let panic = panic_line(&String::from_utf8_lossy(recent));
        let (reason, message) = match (reason, panic) {
            (ExitReason::Reset | ExitReason::TripleFault | ExitReason::Panic, Some(line)) => {
                (ExitReason::Panic, line)
            }
            (ExitReason::Reset | ExitReason::TripleFault, None) if console.is_empty() => {
                (reason, format!("{message} before its console came up"))
            }
            _ => (reason, message),
        };
        let tail = &console[console.len().saturating_sub(TAIL)..];
        VmExit { reason, message, console_tail: String::from_utf8_lossy(tail).into_owned() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter (EAGAIN) has woken the main thread already.
        let _ = self.shared.event.write(1);
    }
}

/// See [`End::poll`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    Running { look_again: Option<Instant> },
    Ended,
}

/// How much of the console [`End::report`] wants to see.
pub const CONSOLE_WANTED: usize = PANIC_SEARCH;

/// The first line of the last panic report, without its timestamp.
fn panic_line(console: &str) -> Option<String> {
    let line = console.lines().find(|line| line.contains(PANIC_TEXT))?;
    let start = line.find(PANIC_TEXT)?;
    Some(line[start..].trim_end().chars().take(PANIC_LINE).collect())
}

/// Replaces the status file's contents, durably.
pub fn write_status(file: &mut File, exit: &VmExit) -> io::Result<()> {
    let json = serde_json::to_vec(exit)?;
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(&json)?;
    file.sync_all()
}

/// The process' exit status. A configuration that is refused gives 2, as clap does.
pub fn exit_code(reason: ExitReason) -> u8 {
    match reason {
        ExitReason::Shutdown => 0,
        ExitReason::Error => 1,
        ExitReason::Reset => 10,
        ExitReason::Panic => 11,
        ExitReason::Killed => 12,
        ExitReason::TripleFault => 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ending_wins() {
        let end = End::new().unwrap();
        assert!(!end.is_set());
        end.set(ExitReason::Shutdown, "powered off");
        end.set(ExitReason::Killed, "late");
        assert_eq!(end.report(b"").reason, ExitReason::Shutdown);
        assert_eq!(end.poll(Instant::now()), Poll::Ended);
    }

    #[test]
    fn a_reset_after_the_panic_port_is_a_panic_with_its_first_line() {
        let end = End::new().unwrap();
        end.panicked();
        assert!(matches!(end.poll(Instant::now()), Poll::Running { look_again: Some(_) }));
        end.set(ExitReason::Reset, "guest reset");
        let console =
            b"[    1.2] Kernel panic - not syncing: Attempted to kill init!\r\n[ 1.3] CPU\n";
        let exit = end.report(console);
        assert_eq!(exit.reason, ExitReason::Panic);
        assert_eq!(exit.message, "Kernel panic - not syncing: Attempted to kill init!");
    }

    #[test]
    fn a_panic_without_the_port_is_found_on_the_console() {
        let end = End::new().unwrap();
        end.set(ExitReason::TripleFault, "triple fault");
        assert_eq!(end.report(b"hello\n").reason, ExitReason::TripleFault);
        assert_eq!(end.report(b"Kernel panic - not syncing: VFS").reason, ExitReason::Panic);
        assert!(end.report(b"").message.ends_with("before its console came up"));
    }

    #[test]
    fn a_guest_that_panics_and_hangs_is_ended_after_a_grace() {
        let end = End::new().unwrap();
        end.panicked();
        assert_eq!(end.poll(Instant::now() + PANIC_GRACE), Poll::Ended);
        assert_eq!(end.report(b"").reason, ExitReason::Panic);
    }

    #[test]
    fn console_text_from_a_power_off_is_no_panic() {
        let end = End::new().unwrap();
        end.set(ExitReason::Shutdown, "guest powered off");
        assert_eq!(end.report(b"Kernel panic - not syncing: quoted").reason, ExitReason::Shutdown);
    }

    #[test]
    fn the_status_file_is_replaced_and_its_tail_is_bounded() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'x'; 10_000]).unwrap();
        let end = End::new().unwrap();
        end.set(ExitReason::Killed, "SIGTERM");
        write_status(&mut file, &end.report(&[b'a'; 9000])).unwrap();
        file.rewind().unwrap();
        let exit: VmExit = serde_json::from_reader(file).unwrap();
        assert_eq!((exit.reason, exit.console_tail.len()), (ExitReason::Killed, TAIL));
    }
}
