//! Reads host files and directories for a copy into the guest.
//!
//! Reads in chunks that are passed on at once: a volume is never in memory as a whole. Symlinks are
//! copied as symlinks, so nothing outside the given directory is read.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use agent_api::v1::VolumeFile;

use super::pool::BlockingPool;
use crate::error::Error;

/// Content per message, bytes: well below [`agent_api::MAX_MESSAGE`], with room for names.
const CHUNK: usize = 1 << 20;
/// Files per message.
const FILES_PER_MESSAGE: usize = 512;
/// Deepest directory nesting.
const MAX_DEPTH: usize = 32;

/// Limits of a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) bytes: u64,
    pub(crate) files: usize,
}

/// Whether the source is a file (mounted by its name in the volume) or a directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SourceKind {
    File { name: String },
    Directory,
}

impl SourceKind {
    /// Name of a copied file in its volume.
    pub(crate) const FILE: &'static str = "file";
}

/// Kind of `path`, with symlinks followed: a mount's source is the target.
pub(crate) fn source_kind(path: &Path) -> Result<SourceKind, Error> {
    let meta = fs::metadata(path)
        .map_err(|e| Error::invalid(format!("volume source {}: {e}", path.display())))?;
    if meta.is_dir() {
        Ok(SourceKind::Directory)
    } else if meta.is_file() {
        Ok(SourceKind::File { name: SourceKind::FILE.into() })
    } else {
        Err(unsupported_type(path, meta.file_type()))
    }
}

fn unsupported_type(path: &Path, kind: fs::FileType) -> Error {
    let kind = match kind {
        k if k.is_socket() => "a socket",
        k if k.is_fifo() => "a pipe",
        k if k.is_block_device() || k.is_char_device() => "a device",
        _ => "neither file nor directory",
    };
    Error::Unsupported {
        message: format!(
            "volume source {} is {kind}, which cannot be copied into the pod",
            path.display()
        ),
    }
}

/// Reads the volume and passes batches of files to `sink`. Blocks.
pub(crate) fn read(
    path: &Path,
    limits: Limits,
    sink: &mut dyn FnMut(Vec<VolumeFile>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut reader =
        VolumeReader { root: path, limits, bytes: 0, files: 0, batch: Batch::default(), sink };
    match source_kind(path)? {
        SourceKind::File { name } => reader.file(path, &name)?,
        SourceKind::Directory => reader.directory(path, &PathBuf::new(), 0)?,
    }
    reader.flush()
}

/// A volume that is read concurrently with the use of its batches.
pub(crate) struct Copy {
    pool: BlockingPool,
    what: String,
    batches: tokio::sync::mpsc::Receiver<Vec<VolumeFile>>,
    reader: Option<tokio::task::JoinHandle<Result<(), Error>>>,
}

impl Copy {
    pub(crate) fn of(pool: &BlockingPool, source: PathBuf, limits: Limits) -> Self {
        let (sender, batches) = tokio::sync::mpsc::channel(1);
        let (reading, pool) = (pool.clone(), pool.clone());
        let what = format!("read {}", source.display());
        let reader = tokio::spawn(async move {
            let read = reading.run(move || {
                read(&source, limits, &mut |files| {
                    let cancelled = |_| Error::Cancelled { what: "copy of a volume" };
                    sender.blocking_send(files).map_err(cancelled)
                })
            });
            read.await
        });
        Self { pool, what, batches, reader: Some(reader) }
    }

    /// None after the last batch. Fails if the next batch does not arrive within the pool's limit.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<VolumeFile>>, Error> {
        let batch = tokio::time::timeout(self.pool.limit(), self.batches.recv()).await;
        if let Some(files) = batch.map_err(|_| self.pool.timeout_error(&*self.what))? {
            return Ok(Some(files));
        }
        match self.reader.take() {
            Some(reader) => reader.await.map_err(|e| Error::Internal(e.into()))?.map(|()| None),
            None => Ok(None),
        }
    }
}

/// Symlink of a kubelet's atomic writer to the current directory beside it.
const DATA: &str = "..data";
/// Attempts to read a directory that is replaced meanwhile.
const TRIES: usize = 5;

/// Content of such a directory at one moment.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Generation {
    /// Target of `..data`; empty: nothing was written yet.
    pub(crate) name: OsString,
    /// Each fits into a message.
    pub(crate) batches: Vec<Vec<VolumeFile>>,
}

/// Name of the current generation. Blocks.
pub(crate) fn current(directory: &Path) -> io::Result<OsString> {
    match fs::read_link(directory.join(DATA)) {
        Ok(target) => {
            let mut parts = target.components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(name)), None) => Ok(name.to_owned()),
                // It must not lead out of the directory.
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "..data points elsewhere")),
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && directory.is_dir() => Ok(OsString::new()),
        Err(e) => Err(e),
    }
}

/// Reads the current generation consistently. Such volumes are small, so it is held in memory.
/// Blocks.
pub(crate) fn generation(directory: &Path, limits: Limits) -> Result<Generation, Error> {
    let failed = |e| Error::io(format!("read volume source {}", directory.display()), e);
    let mut last = None;
    for _ in 0..TRIES {
        let name = current(directory).map_err(failed)?;
        if name.is_empty() {
            return Ok(Generation::default());
        }
        let path = directory.join(&name);
        if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_dir()) {
            return Err(Error::invalid(format!("{} is not a directory", path.display())));
        }
        let mut batches = Vec::new();
        let done = read(&path, limits, &mut |files| {
            batches.push(files);
            Ok(())
        });
        match done {
            Ok(()) if current(directory).map_err(failed)? == name => {
                return Ok(Generation { name, batches });
            }
            // It was replaced meanwhile.
            Ok(()) => {}
            Err(e @ (Error::Unsupported { .. } | Error::ResourceExhausted { .. })) => {
                return Err(e);
            }
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::unavailable(format!(
            "volume source {} was replaced during every attempt to read it",
            directory.display()
        ))
    }))
}

/// Opens a file for a later write, without following a symlink.
pub(crate) fn open_for_writing(path: &Path) -> Result<File, Error> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = File::options().write(true).custom_flags(flags).open(path);
    let file = opened.map_err(|e| Error::invalid(format!("{}: {e}", path.display())))?;
    let meta = file.metadata().map_err(|e| Error::io(format!("stat {}", path.display()), e))?;
    if !meta.is_file() {
        return Err(Error::invalid(format!("{} is not a regular file", path.display())));
    }
    Ok(file)
}

/// Replaces the content of a file. Blocks.
pub(crate) fn overwrite(file: &File, content: &[u8]) -> io::Result<()> {
    file.write_all_at(content, 0)?;
    file.set_len(content.len() as u64)
}

#[derive(Default)]
struct Batch {
    files: Vec<VolumeFile>,
    bytes: usize,
}

struct VolumeReader<'a> {
    root: &'a Path,
    limits: Limits,
    bytes: u64,
    files: usize,
    batch: Batch,
    sink: &'a mut dyn FnMut(Vec<VolumeFile>) -> Result<(), Error>,
}

impl VolumeReader<'_> {
    fn failed(&self, path: &Path, error: io::Error) -> Error {
        Error::io(format!("read volume source {}", path.display()), error)
    }

    fn count(&mut self) -> Result<(), Error> {
        self.files += 1;
        if self.files > self.limits.files {
            return Err(self.too_large(format!("more than {} files", self.limits.files)));
        }
        Ok(())
    }

    fn too_large(&self, what: String) -> Error {
        Error::Unsupported {
            message: format!(
                "volume source {} has {what}: volumes are copied into the pod, larger ones \
                 are not supported",
                self.root.display()
            ),
        }
    }

    fn directory(&mut self, path: &Path, name: &Path, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(self.too_large(format!("more than {MAX_DEPTH} levels of directories")));
        }
        let mut entries = Vec::new();
        for entry in fs::read_dir(path).map_err(|e| self.failed(path, e))? {
            entries.push(entry.map_err(|e| self.failed(path, e))?.file_name());
            if entries.len() > self.limits.files {
                return Err(self.too_large(format!("more than {} files", self.limits.files)));
            }
        }
        entries.sort();
        for entry in entries {
            let (path, name) = (path.join(&entry), name.join(&entry));
            let meta = fs::symlink_metadata(&path).map_err(|e| self.failed(&path, e))?;
            let text = self.name(&name)?;
            if meta.is_dir() {
                self.count()?;
                self.push(volume_file(text, &meta, Vec::new(), false))?;
                self.directory(&path, &name, depth + 1)?;
            } else if meta.is_symlink() {
                self.count()?;
                let target = fs::read_link(&path).map_err(|e| self.failed(&path, e))?;
                let target = target.into_os_string().into_encoded_bytes();
                self.push(volume_file(text, &meta, target, false))?;
            } else if meta.is_file() {
                self.file(&path, &text)?;
            } else {
                return Err(unsupported_type(&path, meta.file_type()));
            }
        }
        Ok(())
    }

    fn name(&self, name: &Path) -> Result<String, Error> {
        name.to_str().map(str::to_owned).ok_or_else(|| {
            Error::invalid(format!("name {name:?} in volume source {:?} is not UTF-8", self.root))
        })
    }

    fn file(&mut self, path: &Path, name: &str) -> Result<(), Error> {
        self.count()?;
        // O_NONBLOCK: the file may have been replaced by a FIFO.
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let mut file = file.map_err(|e| self.failed(path, e))?;
        let meta = file.metadata().map_err(|e| self.failed(path, e))?;
        if !meta.is_file() {
            return Err(unsupported_type(path, meta.file_type()));
        }
        let mut append = false;
        loop {
            let mut chunk = Vec::new();
            let got = (&mut file).take(CHUNK as u64).read_to_end(&mut chunk);
            let got = got.map_err(|e| self.failed(path, e))?;
            if append && got == 0 {
                return Ok(());
            }
            self.bytes += got as u64;
            if self.bytes > self.limits.bytes {
                return Err(self.too_large(format!("more than {} bytes", self.limits.bytes)));
            }
            self.push(volume_file(name.to_owned(), &meta, chunk, append))?;
            if got < CHUNK {
                return Ok(());
            }
            append = true;
        }
    }

    fn push(&mut self, file: VolumeFile) -> Result<(), Error> {
        let size = file.content.len() + file.path.len();
        if self.batch.bytes + size > 2 * CHUNK || self.batch.files.len() == FILES_PER_MESSAGE {
            self.flush()?;
        }
        self.batch.bytes += size;
        self.batch.files.push(file);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let batch = std::mem::take(&mut self.batch);
        if batch.files.is_empty() { Ok(()) } else { (self.sink)(batch.files) }
    }
}

fn volume_file(path: String, meta: &fs::Metadata, content: Vec<u8>, append: bool) -> VolumeFile {
    VolumeFile { path, mode: meta.mode(), uid: meta.uid(), gid: meta.gid(), content, append }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { bytes: 8 << 20, files: 10 };

    fn collect(path: &Path) -> Result<Vec<VolumeFile>, Error> {
        let mut all = Vec::new();
        read(path, LIMITS, &mut |files| {
            all.extend(files);
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn symlinks_and_large_files_of_a_directory_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..2024")).unwrap();
        fs::write(dir.path().join("..2024/key"), vec![7; (2 << 20) + 5]).unwrap();
        std::os::unix::fs::symlink("..2024", dir.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/key", dir.path().join("key")).unwrap();
        let files = collect(dir.path()).unwrap();
        let link = files.iter().find(|f| f.path == "key").unwrap();
        assert_eq!(link.content, b"..data/key");
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        let chunks: Vec<_> = files.iter().filter(|f| f.path == "..2024/key").collect();
        assert_eq!(chunks.iter().map(|f| f.content.len()).sum::<usize>(), (2 << 20) + 5);
        assert_eq!(chunks.iter().map(|f| f.append).collect::<Vec<_>>(), [false, true, true]);
    }

    #[test]
    fn too_many_files_or_bytes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("big"), vec![0; 9 << 20]).unwrap();
        let error = collect(dir.path()).unwrap_err().to_string();
        assert!(error.contains("more than 8388608 bytes"), "{error}");
        fs::remove_file(dir.path().join("big")).unwrap();
        for n in 0..11 {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        let error = collect(dir.path()).unwrap_err().to_string();
        assert!(error.contains("more than 10 files"), "{error}");
    }

    #[test]
    fn a_fifo_is_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(collect(dir.path()), Err(Error::Unsupported { .. })));
        assert!(matches!(collect(&dir.path().join("p")), Err(Error::Unsupported { .. })));
    }

    /// As a kubelet's atomic writer does it.
    fn publish(directory: &Path, name: &str, files: &[(&str, &str)]) {
        fs::create_dir(directory.join(name)).unwrap();
        for (file, text) in files {
            fs::write(directory.join(name).join(file), text).unwrap();
        }
        std::os::unix::fs::symlink(name, directory.join("..data_tmp")).unwrap();
        let old = fs::read_link(directory.join(DATA));
        fs::rename(directory.join("..data_tmp"), directory.join(DATA)).unwrap();
        if let Ok(old) = old {
            fs::remove_dir_all(directory.join(old)).unwrap();
        }
    }

    #[test]
    fn a_generation_is_read_consistently() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(generation(dir.path(), LIMITS).unwrap(), Generation::default());
        publish(dir.path(), "..0", &[("a", "0"), ("b", "0")]);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for n in 1..200 {
                    let text = n.to_string();
                    publish(dir.path(), &format!("..{n}"), &[("a", &text), ("b", &text)]);
                }
            });
            while !writer.is_finished() {
                // The writer may be faster.
                let Ok(read) = generation(dir.path(), LIMITS) else { continue };
                let contents: Vec<_> =
                    read.batches.iter().flatten().map(|f| f.content.clone()).collect();
                assert_eq!(contents.len(), 2);
                assert_eq!(contents[0], contents[1]);
                assert_eq!(read.name.to_str().unwrap().as_bytes()[2..], contents[0]);
            }
        });
        assert_eq!(generation(dir.path(), LIMITS).unwrap().name, "..199");
    }

    #[test]
    fn a_data_link_out_of_the_directory_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        for target in ["/etc", "../x", "a/b"] {
            let _ = fs::remove_file(dir.path().join(DATA));
            std::os::unix::fs::symlink(target, dir.path().join(DATA)).unwrap();
            assert!(generation(dir.path(), LIMITS).is_err(), "{target}");
        }
    }

    #[test]
    fn a_file_is_overwritten_and_a_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "a long former text").unwrap();
        let file = open_for_writing(&path).unwrap();
        overwrite(&file, b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(open_for_writing(&link).is_err());
        assert!(open_for_writing(dir.path()).is_err());
    }

    #[test]
    fn an_empty_file_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("empty"), "").unwrap();
        let files = collect(&dir.path().join("empty")).unwrap();
        assert_eq!((files.len(), files[0].path.as_str()), (1, "file"));
    }
}
