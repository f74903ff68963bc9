//! Copies between the FIFOs of a request and the streams of the guest, without loss and without
//! buffering: a reader that does not read blocks the process. The shim has both ends of each FIFO open,
//! so that containerd can close and reopen it (restart).

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sandbox::session::{ByteReader, ByteWriter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

/// Copy buffer, bytes.
const BUFFER_SIZE: usize = 32 << 10;
/// Interval at which a FIFO is checked for unread output.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Paths or URIs of a request; empty: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StdioPaths {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// State changes that the streams of a process wait for.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamControl {
    /// The process is started. Standard input is not read before, as with runc: data stays in the FIFO.
    /// `ctr run` sends CloseIO only for an end of file that it reads after Create.
    pub(crate) started: CancellationToken,
    /// CloseIO: standard input is closed when all data written before is read.
    pub(crate) stdin_closed: CancellationToken,
    /// Remaining output is discarded.
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
enum StreamUri<'a> {
    Null,
    Fifo(&'a str),
    File(&'a str),
}

fn parse_uri(name: &str) -> Result<StreamUri<'_>> {
    match name.split_once("://") {
        _ if name.is_empty() => Ok(StreamUri::Null),
        None | Some(("fifo", _)) => {
            Ok(StreamUri::Fifo(name.strip_prefix("fifo://").unwrap_or(name)))
        }
        Some(("file", path)) if path.starts_with('/') => Ok(StreamUri::File(path)),
        Some(_) => bail!("{name}: unsupported stdio URI: only FIFOs and file:// are supported"),
    }
}

impl Stdio {
    /// Opens the FIFOs and files of a request.
    pub(crate) async fn open(paths: &StdioPaths) -> Result<Self> {
        let stdin = match parse_uri(&paths.stdin)? {
            StreamUri::Null => None,
            StreamUri::Fifo(path) => {
                let opened = pipe::OpenOptions::new().read_write(true).open_receiver(path);
                Some(opened.with_context(|| format!("opening standard input {path}"))?)
            }
            StreamUri::File(path) => bail!("{path}: standard input must be a FIFO"),
        };
        let stdout = Sink::open(&paths.stdout).await?;
        // A terminal has one stream.
        let stderr = if paths.terminal { Sink::Null } else { Sink::open(&paths.stderr).await? };
        Ok(Self { stdin, stdout, stderr })
    }

    /// Copies until the process' streams have ended, or are abandoned.
    pub(crate) async fn copy_streams(
        self,
        streams: (Option<ByteWriter>, Option<ByteReader>, Option<ByteReader>),
        control: StreamControl,
    ) {
        let StreamControl { started, stdin_closed, abandoned } = control;
        let Self { stdin, stdout, stderr } = self;
        let (to_stdin, from_stdout, from_stderr) = streams;
        let ended = CancellationToken::new();
        let input = async {
            if let (Some(fifo), Some(process)) = (stdin, to_stdin) {
                let copied = async {
                    started.cancelled().await;
                    copy_stdin(fifo, process, stdin_closed).await;
                };
                tokio::select! {
                    () = copied => {}
                    () = ended.cancelled() => {}
                }
            }
        };
        let output = async {
            tokio::join!(stdout.copy_from(from_stdout), stderr.copy_from(from_stderr));
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
        Ok(match parse_uri(name)? {
            StreamUri::Null => Self::Null,
            StreamUri::Fifo(path) => {
                let opened = pipe::OpenOptions::new().read_write(true).open_sender(path);
                Self::Fifo(opened.with_context(|| format!("opening {path}"))?)
            }
            StreamUri::File(path) => {
                let mut options = tokio::fs::OpenOptions::new();
                let opened = options.append(true).create(true).open(path).await;
                Self::File(opened.with_context(|| format!("opening {path}"))?)
            }
        })
    }

    /// Copies a stream to its end.
    async fn copy_from(mut self, stream: Option<ByteReader>) {
        let Some(mut stream) = stream else { return };
        let mut buffer = vec![0; BUFFER_SIZE];
        loop {
            let n = match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) => {
                    tracing::warn!(%error, "reading a process' output failed");
                    break;
                }
            };
            let written = match &mut self {
                Self::Null => Ok(()),
                Self::Fifo(fifo) => fifo.write_all(&buffer[..n]).await,
                Self::File(file) => file.write_all(&buffer[..n]).await,
            };
            if let Err(error) = written {
                // The process continues; its output is discarded.
                tracing::warn!(%error, "writing a process' output failed");
                self = Self::Null;
            }
        }
        match self {
            Self::Null => {}
            Self::File(mut file) => drop(file.flush().await),
            // Unread data is lost when the last descriptor of the FIFO is closed.
            Self::Fifo(fifo) => {
                while has_unread_data(&fifo) {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }
}

/// Whether the FIFO, which is open for reading too, has unread data.
fn has_unread_data(fifo: &pipe::Sender) -> bool {
    let mut set = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut set, PollTimeout::ZERO);
    ready.is_ok_and(|n| n > 0)
        && set[0].revents().is_some_and(|found| found.contains(PollFlags::POLLIN))
}

/// Copies standard input to the process.
async fn copy_stdin(mut fifo: pipe::Receiver, mut process: ByteWriter, closed: CancellationToken) {
    let mut buffer = vec![0; BUFFER_SIZE];
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
            // A process may stop reading.
            Ok(n) => {
                if process.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "reading standard input failed");
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
    async fn a_late_reader_gets_all_output_and_end_of_file() {
        let dir = tempfile::tempdir().unwrap();
        let stdout = fifo(dir.path(), "out");
        let paths = StdioPaths { stdout: stdout.clone(), ..StdioPaths::default() };
        let stdio = Stdio::open(&paths).await.unwrap();
        // More than a FIFO holds (pipe(7): 64 KiB).
        let text: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        let streams = (None, Some(reader(text.clone())), None);
        let copied = tokio::spawn(stdio.copy_streams(streams, StreamControl::default()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!copied.is_finished());
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            std::fs::File::open(stdout).unwrap().read_to_end(&mut all).unwrap();
            all
        });
        assert_eq!(read.await.unwrap(), text);
        copied.await.unwrap();
    }

    #[tokio::test]
    async fn unread_output_is_discarded_when_the_streams_are_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths { stdout: fifo(dir.path(), "out"), ..StdioPaths::default() };
        let stdio = Stdio::open(&paths).await.unwrap();
        let control = StreamControl::default();
        let streams = (None, Some(reader(b"left".to_vec())), None);
        let copied = tokio::spawn(stdio.copy_streams(streams, control.clone()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!copied.is_finished());
        control.abandoned.cancel();
        tokio::time::timeout(Duration::from_secs(5), copied).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn standard_input_stays_open_without_a_writer_and_closes_after_its_last_byte() {
        let dir = tempfile::tempdir().unwrap();
        let stdin = fifo(dir.path(), "in");
        let paths = StdioPaths { stdin: stdin.clone(), ..StdioPaths::default() };
        let stdio = Stdio::open(&paths).await.unwrap();
        let (process, mut inside) = tokio::io::duplex(16);
        // A process that prints when its input has ended.
        let (out, output) = tokio::io::duplex(16);
        let control = StreamControl::default();
        control.started.cancel();
        let streams =
            (Some(Box::pin(process) as ByteWriter), Some(Box::pin(output) as ByteReader), None);
        let copied = tokio::spawn(stdio.copy_streams(streams, control.clone()));
        let mut read = tokio::spawn(async move {
            let mut all = Vec::new();
            inside.read_to_end(&mut all).await.unwrap();
            drop(out);
            all
        });
        for text in ["one", "two"] {
            // Each writer closes the FIFO again.
            let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        let early = tokio::time::timeout(Duration::from_millis(100), &mut read).await;
        assert!(early.is_err(), "input ended before CloseIO");
        control.stdin_closed.cancel();
        let all = tokio::time::timeout(Duration::from_secs(5), read).await.unwrap().unwrap();
        assert_eq!(all, b"onetwo");
        tokio::time::timeout(Duration::from_secs(5), copied).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn standard_input_is_not_read_before_the_process_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let stdin = fifo(dir.path(), "in");
        let paths = StdioPaths { stdin: stdin.clone(), ..StdioPaths::default() };
        let stdio = Stdio::open(&paths).await.unwrap();
        let (process, mut inside) = tokio::io::duplex(1 << 20);
        // Its output does not end before its input.
        let (out, output) = tokio::io::duplex(16);
        let control = StreamControl::default();
        let streams =
            (Some(Box::pin(process) as ByteWriter), Some(Box::pin(output) as ByteReader), None);
        let copied = tokio::spawn(stdio.copy_streams(streams, control.clone()));
        // More than a FIFO holds.
        let writer = tokio::task::spawn_blocking(move || {
            let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
            writer.write_all(&vec![b'x'; 100_000]).unwrap();
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!writer.is_finished(), "input was read before Start");
        control.started.cancel();
        writer.await.unwrap();
        control.stdin_closed.cancel();
        let mut all = Vec::new();
        inside.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 100_000);
        drop(out);
        copied.await.unwrap();
    }

    #[test]
    fn stdio_uris_are_parsed() {
        assert_eq!(parse_uri("").unwrap(), StreamUri::Null);
        assert_eq!(parse_uri("/f").unwrap(), StreamUri::Fifo("/f"));
        assert_eq!(parse_uri("fifo:///f").unwrap(), StreamUri::Fifo("/f"));
        assert_eq!(parse_uri("file:///log").unwrap(), StreamUri::File("/log"));
        assert!(parse_uri("binary:///usr/bin/logger").is_err());
        assert!(parse_uri("file://log").is_err());
    }
}
