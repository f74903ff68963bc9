//! SIGINT, SIGTERM and SIGHUP.

use anyhow::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From its creation on, these signals do not end the process, not even after it is dropped: pods
/// that were started have to be stopped first.
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    /// None under nohup(1).
    hangup: Option<Signal>,
}

impl Interrupts {
    pub(super) fn new() -> Result<Self> {
        let hangup = SignalKind::hangup();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = ignores(&status, hangup.as_raw_value());
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: if ignored { None } else { Some(signal(hangup)?) },
        })
    }

    pub(super) async fn next(&mut self) {
        let Self { interrupt, terminate, hangup } = self;
        let hung_up = async {
            match hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hung_up => {}
        }
    }
}

/// Whether a process with this `/proc/<pid>/status` ignores a signal.
fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    (mask >> (signal - 1)) & 1 == 1
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;

    #[tokio::test]
    async fn a_signal_is_received_and_does_not_end_the_process() {
        let mut interrupts = Interrupts::new().unwrap();
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            raise(signal).unwrap();
            interrupts.next().await;
        }
    }

    #[test]
    fn signals_that_nohup_ignores_are_recognized() {
        let status = "Name:\tnacelle\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(ignores(status, 1));
        assert!(ignores(status, 13));
        assert!(!ignores(status, 2));
        assert!(!ignores("", 1));
    }
}
