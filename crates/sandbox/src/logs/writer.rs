//! The log file and its sidecar, which makes logging exactly-once across a crash of the daemon.
//!
//! After each write to the log the sidecar records the file (inode), its length, and the offset of
//! each stream that it holds. A daemon that crashed between the two leaves a log longer than
//! recorded; the next one truncates it and reads the streams again from the recorded offsets. The
//! guest still has those bytes, because they are acknowledged after the sidecar is written.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the sidecar: magic and version, inode, length, two offsets, flags, checksum.
const SIDECAR: usize = 8 + 8 + 8 + 8 + 8 + 8 + 8;
const MAGIC: [u8; 8] = *b"NCLOG\0\0\x01";
/// As in containerd: readable for the group of log collectors.
const LOG_MODE: u32 = 0o640;

/// Bytes of each stream in the log since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
    /// Streams that were read to EOF (bit 0 stdout, bit 1 stderr).
    pub(crate) ended: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct State {
    inode: u64,
    length: u64,
    progress: Progress,
}

impl State {
    fn encode(&self) -> [u8; SIDECAR] {
        let Self { inode, length, progress: Progress { stdout, stderr, ended } } = *self;
        let words = [inode, length, stdout, stderr, ended];
        let mut out = [0; SIDECAR];
        out[..8].copy_from_slice(&MAGIC);
        for (word, place) in words.iter().zip(out[8..].chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        out[SIDECAR - 8..].copy_from_slice(&checksum(&words).to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; SIDECAR]) -> Option<Self> {
        let mut words = [0; 6];
        for (word, place) in words.iter_mut().zip(bytes[8..].chunks_exact(8)) {
            *word = u64::from_le_bytes(place.try_into().ok()?);
        }
        let [inode, length, stdout, stderr, ended, sum] = words;
        (bytes[..8] == MAGIC && sum == checksum(&words[..5])).then_some(Self {
            inode,
            length,
            progress: Progress { stdout, stderr, ended },
        })
    }
}

/// Detects a damaged sidecar; not a security measure.
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0x006e_6163_656c_6c65, |sum, w| (sum ^ w).wrapping_mul(0x0100_0000_01b3))
}

/// Entries to be written, and the progress after them.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    written: usize,
    pub(crate) after: Progress,
}

impl Batch {
    pub(crate) fn new(bytes: Vec<u8>, after: Progress) -> Self {
        Self { bytes, written: 0, after }
    }
}

/// One container's log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    /// None: no log, only progress is recorded.
    path: Option<PathBuf>,
    file: Option<File>,
    sidecar: File,
    state: State,
}

impl LogWriter {
    /// Continues the log where the sidecar says it ends, or creates it.
    pub(crate) fn open(path: Option<PathBuf>, sidecar: &Path) -> io::Result<Self> {
        let (sidecar, known) = open_sidecar(sidecar)?;
        let mut writer = Self { path, file: None, sidecar, state: known.unwrap_or_default() };
        if known.is_some() {
            writer.truncate_unrecorded()?;
        }
        writer.reopen()?;
        Ok(writer)
    }

    pub(crate) fn progress(&self) -> Progress {
        self.state.progress
    }

    /// Truncates a write that was not recorded. The file may have been rotated since, so it is
    /// searched by inode in its directory.
    fn truncate_unrecorded(&self) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let is_recorded = |p: &Path| fs::metadata(p).is_ok_and(|m| m.ino() == self.state.inode);
        let found = if is_recorded(path) {
            Some(path.clone())
        } else {
            let directory = path.parent().unwrap_or(Path::new("/"));
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries.map(|e| e.path()).find(|p| is_recorded(p))
        };
        let Some(found) = found else { return Ok(()) };
        let file = OpenOptions::new().write(true).open(found)?;
        if file.metadata()?.len() > self.state.length {
            file.set_len(self.state.length)?;
        }
        Ok(())
    }

    /// Reopens the path: the same file if it still exists, otherwise a new one. After an error it
    /// continues with the old file: the rotating caller then renames it back.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else { return self.record() };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(LOG_MODE).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "log path is not a regular file",
            ));
        }
        let state = State { inode: meta.ino(), length: meta.len(), ..self.state };
        let former = std::mem::replace(&mut self.state, state);
        if let Err(error) = self.record() {
            self.state = former;
            return Err(error);
        }
        self.file = Some(file);
        Ok(())
    }

    /// Writes the rest of the batch. May be called again after an error: nothing is written twice,
    /// and only a complete batch is recorded.
    pub(crate) fn write(&mut self, batch: &mut Batch) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            while batch.written < batch.bytes.len() {
                match io::Write::write(file, &batch.bytes[batch.written..]) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => batch.written += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            // From the file, not counted: the log may have been truncated (copytruncate).
            self.state.length = file.metadata()?.len();
        }
        self.state.progress = batch.after;
        self.record()
    }

    fn record(&self) -> io::Result<()> {
        self.sidecar.write_all_at(&self.state.encode(), 0)
    }
}

/// Opens the sidecar. A damaged one, or one of another version, is logged and rewritten; one that
/// cannot be opened is renamed.
fn open_sidecar(path: &Path) -> io::Result<(File, Option<State>)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    let is_fresh = fs::symlink_metadata(path).is_err();
    let opened = options.open(path).and_then(|file| {
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut bytes = [0; SIDECAR];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok((file, State::decode(&bytes))),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok((file, None)),
            Err(e) => Err(e),
        }
    });
    let is_transient = |e: &io::Error| {
        matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC))
    };
    match opened {
        Ok((file, known)) => {
            if known.is_none() && !is_fresh {
                tracing::error!(path = %path.display(), "damaged log sidecar, rewritten");
            }
            Ok((file, known))
        }
        Err(e) if is_fresh || is_transient(&e) => Err(e),
        Err(error) => {
            let renamed = path.with_extension("damaged");
            let _ = fs::remove_dir_all(&renamed);
            fs::rename(path, &renamed)?;
            tracing::error!(path = %path.display(), %error, "damaged log sidecar, renamed");
            Ok((options.create_new(true).open(path)?, None))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The current format; a change needs another magic.
    const V1: &[u8; SIDECAR] = include_bytes!("fixtures/sidecar-v1.bin");

    #[test]
    fn the_sidecar_matches_the_fixture() {
        let progress = Progress { stdout: 200, stderr: 100, ended: 1 };
        let state = State { inode: 0x1122_3344_5566_7788, length: 300, progress };
        assert_eq!(state.encode(), *V1);
        assert_eq!(State::decode(V1), Some(state));
    }

    struct TestLog {
        dir: tempfile::TempDir,
    }

    impl TestLog {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap() }
        }

        fn log(&self) -> PathBuf {
            self.dir.path().join("0.log")
        }

        fn open(&self) -> LogWriter {
            LogWriter::open(Some(self.log()), &self.dir.path().join("sidecar")).unwrap()
        }

        fn text(&self) -> String {
            fs::read_to_string(self.log()).unwrap()
        }
    }

    fn batch(text: &str, stdout: u64) -> Batch {
        Batch::new(text.into(), Progress { stdout, ..Progress::default() })
    }

    /// State after a crash between the write to the log and the one to the sidecar.
    fn write_without_sidecar(log: &TestLog, text: &str) {
        let mut file = OpenOptions::new().append(true).open(log.log()).unwrap();
        io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    #[test]
    fn an_unrecorded_write_is_truncated_and_repeated() {
        let log = TestLog::new();
        log.open().write(&mut batch("one\n", 4)).unwrap();
        write_without_sidecar(&log, "two\nthr");
        let mut writer = log.open();
        assert_eq!(writer.progress().stdout, 4);
        writer.write(&mut batch("two\n", 8)).unwrap();
        assert_eq!(log.text(), "one\ntwo\n");
    }

    #[test]
    fn a_rotated_log_is_truncated_and_the_new_one_starts_empty() {
        let log = TestLog::new();
        log.open().write(&mut batch("one\n", 4)).unwrap();
        write_without_sidecar(&log, "two\n");
        let old = log.dir.path().join("0.log.20260101");
        fs::rename(log.log(), &old).unwrap();
        let mut writer = log.open();
        writer.write(&mut batch("two\n", 8)).unwrap();
        assert_eq!(fs::read_to_string(old).unwrap(), "one\n");
        assert_eq!(log.text(), "two\n");
    }

    #[test]
    fn rotation_neither_loses_nor_repeats_output() {
        let log = TestLog::new();
        let mut writer = log.open();
        writer.write(&mut batch("one\n", 4)).unwrap();
        let old = log.dir.path().join("0.log.1");
        fs::rename(log.log(), &old).unwrap();
        writer.write(&mut batch("two\n", 8)).unwrap();
        writer.reopen().unwrap();
        writer.write(&mut batch("three\n", 14)).unwrap();
        assert_eq!(fs::read_to_string(old).unwrap(), "one\ntwo\n");
        assert_eq!(log.text(), "three\n");
    }

    #[test]
    fn a_failed_rotation_keeps_the_log() {
        let log = TestLog::new();
        let mut writer = log.open();
        writer.write(&mut batch("one\n", 4)).unwrap();
        let old = log.dir.path().join("0.log.1");
        fs::rename(log.log(), &old).unwrap();
        fs::create_dir(log.log()).unwrap();
        writer.reopen().unwrap_err();
        fs::remove_dir(log.log()).unwrap();
        // The new log can be opened but not recorded.
        let sidecar = log.dir.path().join("sidecar");
        let recorded = std::mem::replace(&mut writer.sidecar, File::open(&sidecar).unwrap());
        writer.reopen().unwrap_err();
        writer.sidecar = recorded;
        fs::rename(&old, log.log()).unwrap();
        writer.write(&mut batch("two\n", 8)).unwrap();
        assert_eq!(log.text(), "one\ntwo\n");
        drop(writer);
        assert_eq!(log.open().progress().stdout, 8);
        assert_eq!(log.text(), "one\ntwo\n");
    }

    #[test]
    fn a_log_truncated_by_others_is_not_extended() {
        let log = TestLog::new();
        log.open().write(&mut batch("one\n", 4)).unwrap();
        fs::write(log.log(), "").unwrap();
        log.open().write(&mut batch("two\n", 8)).unwrap();
        assert_eq!(log.text(), "two\n");
    }

    #[test]
    fn an_invalid_sidecar_is_ignored() {
        let log = TestLog::new();
        fs::write(log.dir.path().join("sidecar"), vec![0xa5; 200]).unwrap();
        fs::write(log.log(), "kept\n").unwrap();
        assert_eq!(log.open().progress(), Progress::default());
        assert_eq!(log.text(), "kept\n");
    }

    #[test]
    fn a_log_is_written_despite_any_damage_of_the_sidecar() {
        let damages: [fn(&Path); 4] = [
            |path| fs::write(path, "").unwrap(),
            |path| fs::create_dir_all(path.join("deep")).unwrap(),
            |path| std::os::unix::fs::symlink("/nowhere/at/all", path).unwrap(),
            |path| {
                let mut bytes = State::default().encode();
                bytes[7] = 9; // version
                fs::write(path, bytes).unwrap();
            },
        ];
        for (n, damage) in damages.into_iter().enumerate() {
            let log = TestLog::new();
            let path = log.dir.path().join("sidecar");
            log.open().write(&mut batch("one\n", 4)).unwrap();
            fs::remove_file(&path).unwrap();
            damage(&path);
            let mut writer = log.open();
            assert_eq!(writer.progress(), Progress::default(), "{n}");
            writer.write(&mut batch("two\n", 8)).unwrap();
            assert_eq!(log.text(), "one\ntwo\n", "{n}");
            drop(writer);
            assert_eq!(log.open().progress().stdout, 8, "{n}");
        }
    }

    #[test]
    fn a_write_that_failed_on_a_full_disk_is_completed_by_a_retry() {
        let log = TestLog::new();
        let mut writer = log.open();
        let mut batch = batch("one\n", 4);
        writer.file = Some(OpenOptions::new().write(true).open("/dev/full").unwrap());
        assert_eq!(writer.write(&mut batch).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(writer.progress().stdout, 0);
        writer.reopen().unwrap();
        writer.write(&mut batch).unwrap();
        assert_eq!((log.text().as_str(), writer.progress().stdout), ("one\n", 4));
    }
}
