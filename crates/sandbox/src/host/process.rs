//! Processes by pid and start time, held by pidfd: a reused pid is never taken for the recorded
//! process.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Clock ticks after boot at which a process started (proc(5), /proc/pid/stat field 22).
pub(crate) fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/pid/stat"))
}

/// The name (field 2) may contain blanks and parentheses: fields are counted from the last `)`.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Boot id of the host: pids and start times of another boot are invalid.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A process held by its pidfd.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Must be called in a tokio runtime.
    pub(crate) fn new(pid: u32, pidfd: OwnedFd) -> io::Result<Self> {
        Ok(Self { pid, pidfd: watch(pidfd)? })
    }

    /// The process with this pid, if it has this start time.
    pub(crate) fn find(pid: u32, started: u64) -> io::Result<Option<Self>> {
        let pidfd = match pidfd_open(pid) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        // Read after the pidfd was opened: a match now means that the pidfd refers to that process.
        if !is_from(start_time(pid), started)? {
            return Ok(None);
        }
        let process = Self::new(pid, pidfd)?;
        Ok((!process.has_ended()).then_some(process))
    }

    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_kill(self.pidfd.get_ref().as_fd()) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        let mut poll =
            [nix::poll::PollFd::new(self.pidfd.get_ref().as_fd(), nix::poll::PollFlags::POLLIN)];
        matches!(nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO), Ok(n) if n > 0)
    }

    /// Resolves when the process has exited.
    pub(crate) async fn ended(&self) {
        while !self.has_ended() {
            match self.pidfd.readable().await {
                Ok(mut guard) => guard.clear_ready(),
                // The reactor shuts down, and this task with it.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Kills the process and waits for its exit.
    pub(crate) async fn kill_and_wait(&self, limit: Duration) -> io::Result<()> {
        self.kill()?;
        tokio::time::timeout(limit, self.ended())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "process survives SIGKILL"))
    }
}

/// Whether a start time matches. A process that is gone does not match; a failure to read it (no
/// free descriptor) is an error.
fn is_from(time: io::Result<u64>, started: u64) -> io::Result<bool> {
    match time {
        Ok(time) => Ok(time == started),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Sets oom_score_adj of the process with this pid, if it has this start time; one that has exited
/// is no error. Blocks.
pub(crate) fn set_oom_score(pid: u32, started: u64, score: i32) -> io::Result<()> {
    let has_exited = |e: &io::Error| {
        e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
    };
    // The open file refers to one process, even if the pid is reused.
    let opened = fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/oom_score_adj"));
    let mut file = match opened {
        Ok(file) => file,
        Err(e) if has_exited(&e) => return Ok(()),
        Err(e) => return Err(e),
    };
    if !is_from(start_time(pid), started)? {
        return Ok(());
    }
    match file.write_all(score.to_string().as_bytes()) {
        Err(e) if has_exited(&e) => Ok(()),
        other => other,
    }
}

#[allow(unsafe_code)] // nix has no pidfd calls, tokio no safe way to watch a descriptor
mod pidfd {
    use super::*;

    pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, nothing else owns its number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    pub(super) fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, and the
        // AsyncFd owns it from here on.
        unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(io::Error::from)
    }

    pub(super) fn pidfd_kill(fd: BorrowedFd<'_>) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo asks the kernel to fill in its own; no memory of ours is touched,
        // and `fd` stays open during the call because it is borrowed.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), libc::SIGKILL, none, 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
pub(crate) use pidfd::pidfd_open;
use pidfd::{pidfd_kill, watch};

/// Kills the process of a pidfd; one that has exited is no error.
pub(crate) fn kill(pidfd: OwnedFd) -> io::Result<()> {
    match pidfd_kill(pidfd.as_fd()) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(parse_start_time(stat), Some(98765));
        assert_eq!(parse_start_time("42 (short) S 1"), None);
    }

    #[test]
    fn a_process_that_cannot_be_read_is_not_taken_for_exited() {
        let error = |code| Err::<u64, _>(io::Error::from_raw_os_error(code));
        assert!(is_from(Ok(5), 5).unwrap() && !is_from(Ok(6), 5).unwrap());
        for code in [libc::ENOENT, libc::ESRCH] {
            assert!(!is_from(error(code), 5).unwrap());
        }
        for other in [libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
            assert_eq!(is_from(error(other), 5).unwrap_err().raw_os_error(), Some(other));
        }
    }

    #[test]
    fn an_oom_score_is_set_only_for_the_process_with_the_start_time() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (pid, started) = (child.id(), start_time(child.id()).unwrap());
        let score = || fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        set_oom_score(pid, started, 700).unwrap();
        assert_eq!(score().trim(), "700");
        set_oom_score(pid, started + 1, 800).unwrap();
        assert_eq!(score().trim(), "700");
        child.kill().unwrap();
        child.wait().unwrap();
        set_oom_score(pid, started, 800).unwrap();
    }

    #[tokio::test]
    async fn a_pid_of_another_start_time_is_not_found() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let started = start_time(pid).unwrap();
        assert!(Process::find(pid, started + 1).unwrap().is_none());
        let process = Process::find(pid, started).unwrap().unwrap();
        assert!(!process.has_ended());
        process.kill_and_wait(Duration::from_secs(10)).await.unwrap();
        assert!(Process::find(pid, started).unwrap().is_none());
        child.wait().unwrap();
        process.kill().unwrap();
    }
}
