//! Why a VM ends, and the exit report in the status file.
//!
//! ```text
//!   running --power off--> Shutdown          --reset--> Reset, or Panic
//!           --triple fault--> TripleFault, or Panic   --Kill, SIGTERM--> Killed
//!           --failure of the VMM--> Error
//!           --pvpanic port--> panicked --reset or PANIC_GRACE--> Panic
//! ```
//! The first reason is kept. A panic that was not reported through the pvpanic port is recognized
//! in the console output.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::{ExitReason, VmExit};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// After a write to the pvpanic port the guest prints the rest of its report and resets; a guest
/// that does not is ended after this time.
const PANIC_GRACE: Duration = Duration::from_secs(2);
/// Console bytes in the status file.
const TAIL: usize = 4 << 10;
/// Console bytes that are searched for a panic's first line: enough for the stacks of all CPUs.
const PANIC_SEARCH: usize = 64 << 10;
const PANIC_TEXT: &str = "Kernel panic - not syncing";
/// A panic line is truncated to this many characters: the guest chooses its length.
const PANIC_LINE: usize = 400;

/// The exit reason, set once; shared by all threads.
#[derive(Debug, Clone)]
pub struct ExitState {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Copy of `state.ended` that vCPU threads read after every KVM exit without taking the lock.
    ended: AtomicBool,
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    ended: Option<(ExitReason, String)>,
    panicked: Option<Instant>,
}

impl ExitState {
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Shared { ended: AtomicBool::new(false), state: Mutex::default(), event };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Ends the VM with this reason, unless it has ended already.
    pub fn set(&self, reason: ExitReason, message: impl Into<String>) {
        let mut state = self.state();
        if state.ended.is_none() {
            state.ended = Some((reason, message.into()));
            self.shared.ended.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// The guest has reported a panic through the pvpanic port.
    pub fn panicked(&self) {
        let mut state = self.state();
        if state.panicked.is_none() {
            state.panicked = Some(Instant::now());
            self.wake();
        }
    }

    /// Whether the VM has ended; takes no lock.
    pub fn is_set(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Whether the VM has ended at `now`; otherwise the time to call again, besides the event.
    pub fn poll(&self, now: Instant) -> ExitPoll {
        let state = self.state();
        let deadline = state.panicked.map(|at| at + PANIC_GRACE);
        match deadline {
            _ if state.ended.is_some() => ExitPoll::Ended,
            Some(at) if at <= now => ExitPoll::Ended,
            deadline => ExitPoll::Running { poll_at: deadline },
        }
    }

    /// Readable when [`Self::poll`] has to be called.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// The exit report, given the last [`CONSOLE_TAIL`] console bytes.
    pub fn report(&self, console: &[u8]) -> VmExit {
        let state = self.state();
        let (reason, message) = match (&state.ended, state.panicked) {
            (Some((reason, message)), None) => (*reason, message.clone()),
            // A guest that has panicked and is killed afterwards is reported as panicked.
            (_, Some(_)) => (ExitReason::Panic, "guest kernel panicked".to_owned()),
            (None, None) => (ExitReason::Error, "VMM stopped without a reason".to_owned()),
        };
        let recent = &console[console.len().saturating_sub(PANIC_SEARCH)..];
        let panic = panic_line(&String::from_utf8_lossy(recent));
        let (reason, message) = match (reason, panic) {
            (ExitReason::Reset | ExitReason::TripleFault | ExitReason::Panic, Some(line)) => {
                (ExitReason::Panic, line)
            }
            (ExitReason::Reset | ExitReason::TripleFault, None) if console.is_empty() => {
                (reason, format!("{message} before any console output"))
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
        // EAGAIN: the counter is full, so the main thread is woken anyway.
        let _ = self.shared.event.write(1);
    }
}

/// See [`ExitState::poll`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitPoll {
    Running { poll_at: Option<Instant> },
    Ended,
}

/// Console bytes that [`ExitState::report`] needs.
pub const CONSOLE_TAIL: usize = PANIC_SEARCH;

/// The first line of a panic report, without its timestamp.
fn panic_line(console: &str) -> Option<String> {
    let line = console.lines().find(|line| line.contains(PANIC_TEXT))?;
    let start = line.find(PANIC_TEXT)?;
    Some(line[start..].trim_end().chars().take(PANIC_LINE).collect())
}

/// Replaces the contents of the status file, with fsync.
pub fn write_status(file: &mut File, exit: &VmExit) -> io::Result<()> {
    let json = serde_json::to_vec(exit)?;
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(&json)?;
    file.sync_all()
}

/// The exit code of the process. A refused configuration has 2, as clap's errors.
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
    fn the_first_exit_reason_is_kept() {
        let state = ExitState::new().unwrap();
        assert!(!state.is_set());
        state.set(ExitReason::Shutdown, "powered off");
        state.set(ExitReason::Killed, "late");
        assert_eq!(state.report(b"").reason, ExitReason::Shutdown);
        assert_eq!(state.poll(Instant::now()), ExitPoll::Ended);
    }

    #[test]
    fn a_reset_after_a_pvpanic_write_is_a_panic_with_its_first_line() {
        let state = ExitState::new().unwrap();
        state.panicked();
        assert!(matches!(state.poll(Instant::now()), ExitPoll::Running { poll_at: Some(_) }));
        state.set(ExitReason::Reset, "guest reset");
        let console =
            b"[    1.2] Kernel panic - not syncing: Attempted to kill init!\r\n[ 1.3] CPU\n";
        let exit = state.report(console);
        assert_eq!(exit.reason, ExitReason::Panic);
        assert_eq!(exit.message, "Kernel panic - not syncing: Attempted to kill init!");
    }

    #[test]
    fn a_panic_without_a_pvpanic_write_is_found_in_the_console_output() {
        let state = ExitState::new().unwrap();
        state.set(ExitReason::TripleFault, "triple fault");
        assert_eq!(state.report(b"hello\n").reason, ExitReason::TripleFault);
        assert_eq!(state.report(b"Kernel panic - not syncing: VFS").reason, ExitReason::Panic);
        assert!(state.report(b"").message.ends_with("before any console output"));
    }

    #[test]
    fn a_guest_that_panics_and_hangs_is_ended_after_the_grace_period() {
        let state = ExitState::new().unwrap();
        state.panicked();
        assert_eq!(state.poll(Instant::now() + PANIC_GRACE), ExitPoll::Ended);
        assert_eq!(state.report(b"").reason, ExitReason::Panic);
    }

    #[test]
    fn panic_text_on_the_console_does_not_change_a_shutdown() {
        let state = ExitState::new().unwrap();
        state.set(ExitReason::Shutdown, "guest powered off");
        assert_eq!(
            state.report(b"Kernel panic - not syncing: quoted").reason,
            ExitReason::Shutdown
        );
    }

    #[test]
    fn the_status_file_is_replaced_and_its_console_tail_is_limited() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'x'; 10_000]).unwrap();
        let state = ExitState::new().unwrap();
        state.set(ExitReason::Killed, "SIGTERM");
        write_status(&mut file, &state.report(&[b'a'; 9000])).unwrap();
        file.rewind().unwrap();
        let exit: VmExit = serde_json::from_reader(file).unwrap();
        assert_eq!((exit.reason, exit.console_tail.len()), (ExitReason::Killed, TAIL));
    }
}
