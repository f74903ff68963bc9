//! `nacelle logs`: reads a container's log file on this node (CRI log format:
//! `<time> <stdout|stderr> <P|F> <text>`) and prints what the container wrote.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cri::v1;

use super::arguments::Logs;
use super::connect::{Client, call_error};
use super::find;

/// Between two reads of a log that is followed.
const INTERVAL: Duration = Duration::from_millis(50);
/// Reads without new data, after the container has ended, until its log counts as complete.
const QUIET_READS: u32 = 3;

pub(super) async fn logs(client: &mut Client, options: Logs) -> Result<()> {
    let container = find::container(client, &options.container).await?;
    let status = status(client, &container.id).await?;
    if status.log_path.is_empty() {
        bail!("the container has no log file: it was created without log_path");
    }
    let mut reader = Reader::new(PathBuf::from(&status.log_path), options.timestamps);
    if let Some(lines) = options.tail {
        reader.skip_to_last(lines)?;
    }
    if options.follow {
        reader.follow(client, &container.id).await.map(drop)
    } else {
        reader.print().map(drop)
    }
}

pub(super) async fn status(client: &mut Client, id: &str) -> Result<v1::ContainerStatus> {
    let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
    let reply = client.runtime.container_status(request).await.map_err(call_error)?;
    reply.into_inner().status.context("nacelled returned no status")
}

/// Reads a log from its last position, across rotations.
pub(super) struct Reader {
    path: PathBuf,
    file: Option<std::fs::File>,
    /// The beginning of an incomplete line.
    rest: Vec<u8>,
    timestamps: bool,
}

impl Reader {
    pub(super) fn new(path: PathBuf, timestamps: bool) -> Self {
        Self { path, file: None, rest: Vec::new(), timestamps }
    }

    /// Prints new lines; returns the number of bytes read.
    fn print(&mut self) -> Result<usize> {
        let mut seen = self.read()?;
        // A rotated log is read to its end before the new one.
        if self.rotated() {
            self.file = None;
            seen += self.read()?;
        }
        Ok(seen)
    }

    fn read(&mut self) -> Result<usize> {
        let shown = |path: &Path| path.display().to_string();
        if self.file.is_none() {
            match std::fs::File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
                Err(error) => return Err(error).with_context(|| shown(&self.path)),
            }
        }
        let Some(file) = &mut self.file else { return Ok(0) };
        let mut buffer = vec![0; 64 << 10];
        let mut seen = 0;
        loop {
            let length = file.read(&mut buffer).with_context(|| shown(&self.path))?;
            if length == 0 {
                return Ok(seen);
            }
            seen += length;
            self.rest.extend_from_slice(&buffer[..length]);
            let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { continue };
            let lines: Vec<u8> = self.rest.drain(..=end).collect();
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                show(&line[..line.len() - 1], self.timestamps)?;
            }
            std::io::stdout().flush()?;
        }
    }

    fn rotated(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.file.as_ref().and_then(|file| file.metadata().ok()).map(identity);
        let there = std::fs::metadata(&self.path).ok().map(identity);
        ours.is_some() && there.is_some() && ours != there
    }

    fn skip_to_last(&mut self, lines: usize) -> Result<()> {
        let Ok(text) = std::fs::read(&self.path) else { return Ok(()) };
        let mut ends = text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1);
        let count = text.iter().filter(|b| **b == b'\n').count();
        let from = match count.checked_sub(lines) {
            None | Some(0) => 0,
            Some(skipped) => ends.nth(skipped - 1).unwrap_or(0),
        };
        let mut file = std::fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(from as u64))?;
        self.file = Some(file);
        Ok(())
    }

    /// Prints until the container has ended and its log is complete; returns the last status.
    pub(super) async fn follow(
        &mut self,
        client: &mut Client,
        id: &str,
    ) -> Result<v1::ContainerStatus> {
        let mut quiet = 0;
        let mut ended: Option<v1::ContainerStatus> = None;
        loop {
            let seen = self.print()?;
            match &ended {
                Some(status) => {
                    quiet = if seen == 0 { quiet + 1 } else { 0 };
                    if quiet >= QUIET_READS {
                        return Ok(status.clone());
                    }
                }
                None => {
                    let status = status(client, id).await?;
                    if status.state == v1::ContainerState::ContainerExited as i32 {
                        ended = Some(status);
                    }
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

fn show(line: &[u8], timestamps: bool) -> std::io::Result<()> {
    let Some(parsed) = parse(line) else { return Ok(()) };
    let mut bytes = Vec::with_capacity(parsed.text.len() + 1);
    if timestamps {
        bytes.extend_from_slice(parsed.time);
        bytes.push(b' ');
    }
    bytes.extend_from_slice(parsed.text);
    if parsed.full || timestamps {
        bytes.push(b'\n');
    }
    if parsed.stderr {
        std::io::stderr().write_all(&bytes)
    } else {
        std::io::stdout().write_all(&bytes)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    time: &'a [u8],
    stderr: bool,
    /// The line ends here; otherwise it was split for its length.
    full: bool,
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    // Further tags may follow, separated by colons.
    let full = tag.split(|byte| *byte == b':').next() == Some(b"F");
    Some(Line { time, stderr: stream == b"stderr", full, text: parts.next().unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_parsed_and_its_text_is_unchanged() {
        let line = parse(b"2024-01-01T00:00:00.1Z stderr P a b \xff").unwrap();
        assert_eq!(
            line,
            Line { time: b"2024-01-01T00:00:00.1Z", stderr: true, full: false, text: b"a b \xff" }
        );
        assert!(parse(b"t stdout F ").unwrap().full);
        assert!(parse(b"t stdout F:x text").unwrap().full);
        assert_eq!(parse(b"rubbish"), None);
    }

    #[test]
    fn only_the_last_lines_are_shown_and_a_rotated_log_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "t stdout F a\nt stdout F b\nt stdout F c\n").unwrap();
        let mut reader = Reader::new(path.clone(), false);
        reader.skip_to_last(2).unwrap();
        assert_eq!(reader.print().unwrap(), 26);
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        std::fs::write(&path, "t stdout F d\n").unwrap();
        assert_eq!(reader.print().unwrap(), 13);
        assert_eq!(reader.print().unwrap(), 0);
    }
}
