//! Between the FIFOs of a request and the streams of the guest. Nothing is lost and nothing is kept
//! here: who does not read holds the process back. The shim has both ends of each FIFO open, so that a
//! reader may go and another one come (containerd is restarted).

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sandbox::session::{ByteReader, ByteWriter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

/// Piece of a stream, bytes.
const PIECE: usize = 32 << 10;
/// Between two looks whether a reader has taken the last output.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// As a request names them; empty: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// What the streams of a process wait for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    /// The process is started. Standard input is not read before: what fits into the FIFO waits there,
    /// as with runc. `ctr run` sends CloseIO only for an end of file that it reads after Create.
    pub(crate) started: CancellationToken,
    /// CloseIO: standard input ends when all that was written before is read.
    pub(crate) closed: CancellationToken,
    /// Nobody reads the output any more.
    pub(crate) abandoned: CancellationToken,
}

pub(crate) struct Stdio {
    stdin: Option<pipe::Receiver>,
    stdout: Sink,
    stderr: Sink,
}

enum Sink {
    Null,
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    Null,
    Fifo(&'a str),
    File(&'a str),
}

fn target(name: &str) -> Result<Target<'_>> {
    match name.split_once("://") {
        _ if name.is_empty() => Ok(Target::Null),
        None | Some(("fifo", _)) => Ok(Target::Fifo(name.strip_prefix("fifo://").unwrap_or(name))),
        Some(("file", path)) if path.starts_with('/') => Ok(Target::File(path)),
        Some(_) => bail!("{name}: only FIFOs and files can be standard streams"),
    }
}

impl Stdio {
    /// Opens what the request names.
    pub(crate) async fn open(names: &Names) -> Result<Self> {
        let stdin = match target(&names.stdin)? {
            Target::Null => None,
            Target::Fifo(path) => {
                let opened = pipe::OpenOptions::new().read_write(true).open_receiver(path);
                Some(opened.with_context(|| format!("opening standard input {path}"))?)
            }
            Target::File(path) => bail!("{path}: standard input has to be a FIFO"),
        };
        let stdout = Sink::open(&names.stdout).await?;
        // A terminal has one stream.
        let stderr = if names.terminal { Sink::Null } else { Sink::open(&names.stderr).await? };
        Ok(Self { stdin, stdout, stderr })
    }

    /// Copies bytes until the process' streams have ended, or nobody reads them any more.
    pub(crate) async fn carry(
        self,
        streams: (Option<ByteWriter>, Option<ByteReader>, Option<ByteReader>),
        signals: Signals,
    ) {
        let Signals { started, closed, abandoned } = signals;
        let Self { stdin, stdout, stderr } = self;
        let (to_stdin, from_stdout, from_stderr) = streams;
        let ended = CancellationToken::new();
        let input = async {
            if let (Some(fifo), Some(process)) = (stdin, to_stdin) {
                let copied = async {
                    started.cancelled().await;
                    give(fifo, process, closed).await;
                };
                tokio::select! {
                    () = copied => {}
                    () = ended.cancelled() => {}
                }
            }
        };
        let output = async {
            tokio::join!(stdout.take(from_stdout), stderr.take(from_stderr));
            ended.cancel();
        };
        tokio::select! {
            _ = async { tokio::join!(input, output) } => {}
            () = abandoned.cancelled() => {}
        }
    }
}

impl Sink {
    async fn open(name: &str) -> Result<Self> {
        Ok(match target(name)? {
            Target::Null => Self::Null,
            Target::Fifo(path) => {
                let opened = pipe::OpenOptions::new().read_write(true).open_sender(path);
                Self::Fifo(opened.with_context(|| format!("opening {path}"))?)
            }
            Target::File(path) => {
                let mut options = tokio::fs::OpenOptions::new();
                let opened = options.append(true).create(true).open(path).await;
                Self::File(opened.with_context(|| format!("opening {path}"))?)
            }
        })
    }

    /// Writes a stream to its end.
    async fn take(mut self, stream: Option<ByteReader>) {
        let Some(mut stream) = stream else { return };
        let mut buffer = vec![0; PIECE];
        loop {
            let n = match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) => {
                    tracing::warn!(%error, "output of a process breaks off");
                    break;
                }
            };
            let written = match &mut self {
                Self::Null => Ok(()),
                Self::Fifo(fifo) => fifo.write_all(&buffer[..n]).await,
                Self::File(file) => file.write_all(&buffer[..n]).await,
            };
            if let Err(error) = written {
                // The process goes on; its output has no place any more.
                tracing::warn!(%error, "output of a process cannot be written");
                self = Self::Null;
            }
        }
        match self {
            Self::Null => {}
            Self::File(mut file) => drop(file.flush().await),
            // What nobody has read goes with the last one who has the FIFO open.
            Self::Fifo(fifo) => {
                while holds_data(&fifo) {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }
}

/// Whether something waits in the FIFO, which is open for reading too.
fn holds_data(fifo: &pipe::Sender) -> bool {
    let mut set = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut set, PollTimeout::ZERO);
    ready.is_ok_and(|n| n > 0)
        && set[0].revents().is_some_and(|found| found.contains(PollFlags::POLLIN))
}

/// Feeds standard input.
async fn give(mut fifo: pipe::Receiver, mut process: ByteWriter, closed: CancellationToken) {
    let mut buffer = vec![0; PIECE];
    loop {
        let n = tokio::select! {
            biased;
            read = fifo.read(&mut buffer) => read,
            () = closed.cancelled() => match fifo.try_read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
                read => read,
            },
        };
        match n {
            Ok(0) => break,
            // A process that does not read any more is no fault.
            Ok(n) => {
                if process.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "standard input cannot be read");
                break;
            }
        }
    }
    let _ = process.shutdown().await;
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{Read, Write};
    use std::path::Path;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    fn reader(text: Vec<u8>) -> ByteReader {
        Box::pin(std::io::Cursor::new(text))
    }

    #[tokio::test]
    async fn a_reader_that_comes_late_gets_all_and_then_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let stdout = fifo(dir.path(), "out");
        let names = Names { stdout: stdout.clone(), ..Names::default() };
        let stdio = Stdio::open(&names).await.unwrap();
        // More than a FIFO holds (pipe(7): 64 KiB).
        let text: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        let streams = (None, Some(reader(text.clone())), None);
        let carried = tokio::spawn(stdio.carry(streams, Signals::default()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!carried.is_finished());
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            std::fs::File::open(stdout).unwrap().read_to_end(&mut all).unwrap();
            all
        });
        assert_eq!(read.await.unwrap(), text);
        carried.await.unwrap();
    }

    #[tokio::test]
    async fn output_that_nobody_reads_ends_when_it_is_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names { stdout: fifo(dir.path(), "out"), ..Names::default() };
        let stdio = Stdio::open(&names).await.unwrap();
        let signals = Signals::default();
        let streams = (None, Some(reader(b"left".to_vec())), None);
        let carried = tokio::spawn(stdio.carry(streams, signals.clone()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!carried.is_finished());
        signals.abandoned.cancel();
        tokio::time::timeout(Duration::from_secs(5), carried).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn standard_input_stays_open_without_a_writer_and_closes_after_its_last_byte() {
        let dir = tempfile::tempdir().unwrap();
        let stdin = fifo(dir.path(), "in");
        let names = Names { stdin: stdin.clone(), ..Names::default() };
        let stdio = Stdio::open(&names).await.unwrap();
        let (process, mut inside) = tokio::io::duplex(16);
        // A process that prints when its input has ended.
        let (out, output) = tokio::io::duplex(16);
        let signals = Signals::default();
        signals.started.cancel();
        let streams =
            (Some(Box::pin(process) as ByteWriter), Some(Box::pin(output) as ByteReader), None);
        let carried = tokio::spawn(stdio.carry(streams, signals.clone()));
        let mut read = tokio::spawn(async move {
            let mut all = Vec::new();
            inside.read_to_end(&mut all).await.unwrap();
            drop(out);
            all
        });
        for text in ["one", "two"] {
            // Each writer goes away again.
            let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        let early = tokio::time::timeout(Duration::from_millis(100), &mut read).await;
        assert!(early.is_err(), "input ended by itself");
        signals.closed.cancel();
        let all = tokio::time::timeout(Duration::from_secs(5), read).await.unwrap().unwrap();
        assert_eq!(all, b"onetwo");
        tokio::time::timeout(Duration::from_secs(5), carried).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn standard_input_is_not_read_before_the_process_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let stdin = fifo(dir.path(), "in");
        let names = Names { stdin: stdin.clone(), ..Names::default() };
        let stdio = Stdio::open(&names).await.unwrap();
        let (process, mut inside) = tokio::io::duplex(1 << 20);
        // Its output does not end before its input.
        let (out, output) = tokio::io::duplex(16);
        let signals = Signals::default();
        let streams =
            (Some(Box::pin(process) as ByteWriter), Some(Box::pin(output) as ByteReader), None);
        let carried = tokio::spawn(stdio.carry(streams, signals.clone()));
        // More than a FIFO holds.
        let writer = tokio::task::spawn_blocking(move || {
            let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
            writer.write_all(&[b'x'; 100_000]).unwrap();
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!writer.is_finished(), "input was taken before the start");
        signals.started.cancel();
        writer.await.unwrap();
        signals.closed.cancel();
        let mut all = Vec::new();
        inside.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 100_000);
        drop(out);
        carried.await.unwrap();
    }

    #[test]
    fn names_of_streams_are_told_apart() {
        assert_eq!(target("").unwrap(), Target::Null);
        assert_eq!(target("/f").unwrap(), Target::Fifo("/f"));
        assert_eq!(target("fifo:///f").unwrap(), Target::Fifo("/f"));
        assert_eq!(target("file:///log").unwrap(), Target::File("/log"));
        assert!(target("binary:///usr/bin/logger").is_err());
        assert!(target("file://log").is_err());
    }
}
