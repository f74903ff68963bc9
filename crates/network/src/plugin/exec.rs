#![allow(unsafe_code)] // pre_exec
//! Runs one plugin: configuration on stdin, result on stdout, with a timeout and an output limit. A
//! failed run leaves no process behind.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Poll interval for the exit of a plugin whose child (a daemon) keeps the pipes open.
const TICK: Duration = Duration::from_millis(20);
/// Time to wait while the binary is being written (ETXTBSY), as during an update of plugins.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);
/// Time to reap a killed plugin before a thread takes over.
const REAP_TIMEOUT: Duration = Duration::from_secs(2);
/// PATH if the daemon has none: plugins run iptables, sysctl and others.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("cannot start {}", .binary.display())]
    Spawn { binary: PathBuf, source: io::Error },
    #[error("cannot communicate with {}", .binary.display())]
    Pipe { binary: PathBuf, source: io::Error },
    #[error(
        "{} did not finish within {} ms and was killed{}", .binary.display(), .after.as_millis(),
        format_output(.stderr)
    )]
    Timeout { binary: PathBuf, after: Duration, stderr: Vec<u8> },
    #[error("{} was killed because an ADD or DEL waited for it", .binary.display())]
    Interrupted { binary: PathBuf },
    #[error("{} printed more than {limit} bytes and was killed", .binary.display())]
    TooMuchOutput { binary: PathBuf, limit: usize },
}

/// Parameters of a run.
pub struct Invocation<'a> {
    pub binary: &'a Path,
    pub env: Vec<(&'static str, OsString)>,
    pub stdin: &'a [u8],
    pub timeout: Duration,
    /// Polled; the plugin is killed when it returns true.
    pub should_stop: Option<&'a dyn Fn() -> bool>,
    /// Maximum bytes on each of stdout and stderr.
    pub output_limit: usize,
}

#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Formats a plugin's stderr for the end of an error message.
pub fn format_output(stderr: &[u8]) -> String {
    /// Maximum bytes of stderr in an error message.
    const SHOWN: usize = 512;
    let text = String::from_utf8_lossy(&stderr[..stderr.len().min(SHOWN)]);
    match text.trim() {
        "" => String::new(),
        text => format!("; output: {}", text.escape_debug()),
    }
}

impl Invocation<'_> {
    pub fn run(&self) -> Result<Output, ExecError> {
        let mut child = KillOnDrop(Some(self.spawn()?));
        match self.communicate(child.get()) {
            Ok(output) => {
                child.0 = None;
                Ok(output)
            }
            Err(error) => Err(error),
        }
    }

    fn spawn(&self) -> Result<Child, ExecError> {
        let mut command = Command::new(self.binary);
        command
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if std::env::var_os("PATH").is_none() {
            command.env("PATH", DEFAULT_PATH);
        }
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl is a plain
        // system call that accesses no memory.
        unsafe {
            command.pre_exec(|| {
                // A plugin that outlives the daemon could race with the next daemon's clean-up.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        let timeout = Instant::now() + BUSY_TIMEOUT;
        loop {
            match command.spawn() {
                Ok(child) => return Ok(child),
                Err(e)
                    if e.kind() == io::ErrorKind::ExecutableFileBusy
                        && Instant::now() < timeout =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(source) => {
                    return Err(ExecError::Spawn { binary: self.binary.to_owned(), source });
                }
            }
        }
    }

    fn communicate(&self, child: &mut Child) -> Result<Output, ExecError> {
        let pipe = |source| ExecError::Pipe { binary: self.binary.to_owned(), source };
        let deadline = Instant::now() + self.timeout;
        let mut stdin = child.stdin.take();
        let mut stdout = child.stdout.take();
        let mut stderr = child.stderr.take();
        let mut input = self.stdin;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        for fd in [
            stdin.as_ref().map(AsFd::as_fd),
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
        ]
        .into_iter()
        .flatten()
        {
            nonblocking(fd).map_err(pipe)?;
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ExecError::Timeout {
                    binary: self.binary.to_owned(),
                    after: self.timeout,
                    stderr: err,
                });
            }
            if self.should_stop.is_some_and(|should_stop| should_stop()) {
                return Err(ExecError::Interrupted { binary: self.binary.to_owned() });
            }
            let closed = stdout.is_none() && stderr.is_none();
            // Before the pipes are read, so that output written before the exit is not lost.
            let ended = child.try_wait().map_err(pipe)?;
            write_some(&mut stdin, &mut input).map_err(pipe)?;
            for (reader, buffer) in [
                (&mut stdout as &mut dyn Drain, &mut out),
                (&mut stderr as &mut dyn Drain, &mut err),
            ] {
                reader.drain(buffer, self.output_limit).map_err(pipe)?;
                if buffer.len() > self.output_limit {
                    return Err(ExecError::TooMuchOutput {
                        binary: self.binary.to_owned(),
                        limit: self.output_limit,
                    });
                }
            }
            if let Some(status) = ended {
                return Ok(Output { status, stdout: out, stderr: err });
            }
            if closed {
                // Both pipes closed: the plugin is about to exit.
                std::thread::sleep(Duration::from_micros(200).min(left));
                continue;
            }
            let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(3);
            fds.extend(stdin.as_ref().map(|f| PollFd::new(f.as_fd(), PollFlags::POLLOUT)));
            fds.extend(stdout.as_ref().map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN)));
            fds.extend(stderr.as_ref().map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN)));
            let tick = PollTimeout::try_from(TICK.min(left)).unwrap_or(PollTimeout::ZERO);
            match poll(&mut fds, tick) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(pipe(e.into())),
            }
        }
    }
}

fn nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Writes what fits; closes the pipe at the end of input or on EPIPE.
fn write_some<W: Write>(pipe: &mut Option<W>, input: &mut &[u8]) -> io::Result<()> {
    while let Some(writer) = pipe {
        if input.is_empty() {
            *pipe = None;
            break;
        }
        match writer.write(input) {
            Ok(n) => *input = &input[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => *pipe = None,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

trait Drain {
    /// Reads what is available, at most a little more than `limit`; drops the pipe at end of file.
    fn drain(&mut self, buffer: &mut Vec<u8>, limit: usize) -> io::Result<()>;
}

impl<R: Read> Drain for Option<R> {
    fn drain(&mut self, buffer: &mut Vec<u8>, limit: usize) -> io::Result<()> {
        let mut chunk = [0; 4096];
        while let Some(reader) = self {
            if buffer.len() > limit {
                break;
            }
            match reader.read(&mut chunk) {
                Ok(0) => *self = None,
                Ok(n) => buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Kills the plugin's process group when dropped, unless the run succeeded.
struct KillOnDrop(Option<Child>);

impl KillOnDrop {
    fn get(&mut self) -> &mut Child {
        self.0.as_mut().expect("only taken after a successful run")
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // The leader is not reaped, so the group id is still valid. Also kills the other members if
        // the leader has exited.
        let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
        let deadline = Instant::now() + REAP_TIMEOUT;
        while let Ok(None) = child.try_wait() {
            if Instant::now() > deadline {
                // Blocked in the kernel; reaped when it exits.
                let _ = std::thread::Builder::new()
                    .name("cni-reaper".into())
                    .spawn(move || child.wait());
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    fn run(text: &str, stdin: &[u8], timeout_ms: u64) -> Result<Output, ExecError> {
        let dir = tempfile::tempdir().unwrap();
        let binary = script(dir.path(), text);
        Invocation {
            binary: &binary,
            env: vec![("CNI_COMMAND", "ADD".into())],
            stdin,
            timeout: Duration::from_millis(timeout_ms),
            should_stop: None,
            output_limit: 100_000,
        }
        .run()
    }

    #[test]
    fn input_environment_output_and_exit_code_are_passed() {
        let big = vec![b'x'; 90_000];
        let output = run("cat; echo $CNI_COMMAND >&2; exit 3", &big, 5000).unwrap();
        assert_eq!(output.stdout, big);
        assert_eq!(output.stderr, b"ADD\n");
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn a_plugin_may_ignore_its_input() {
        let output = run("echo ok", &vec![b'x'; 200_000], 5000).unwrap();
        assert_eq!(output.stdout, b"ok\n");
    }

    #[test]
    fn a_hanging_plugin_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let text = format!("sleep 600 & echo $! > {}; echo stuck >&2; wait", pid_file.display());
        let started = Instant::now();
        let error = run(&text, b"", 500).unwrap_err().to_string();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(error.contains("500 ms") && error.contains("stuck"), "{error}");
        let pid = std::fs::read_to_string(pid_file).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            // An orphan may be a zombie for a while.
            std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "))
        });
        assert!(gone, "the child still runs");
    }

    #[test]
    fn endless_output_is_refused() {
        let error = run("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done", b"", 20_000);
        assert!(matches!(error, Err(ExecError::TooMuchOutput { limit: 100_000, .. })));
    }

    #[test]
    fn a_daemon_that_keeps_the_pipes_open_does_not_block() {
        let started = Instant::now();
        let output = run("sleep 5 & echo done", b"", 4000).unwrap();
        assert_eq!(output.stdout, b"done\n");
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn the_error_for_a_missing_binary_has_its_path() {
        let error = Invocation {
            binary: Path::new("/nonexistent/plugin"),
            env: vec![],
            stdin: b"",
            timeout: Duration::from_secs(1),
            should_stop: None,
            output_limit: 1,
        }
        .run()
        .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/plugin"));
    }
}
