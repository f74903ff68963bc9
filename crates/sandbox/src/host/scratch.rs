//! Writable layers: sparse copies of an ext4 file system that is formatted once.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use nix::unistd::{Whence, lseek64};

use super::{absent_is_fine, sync_dir};
use crate::error::Error;

/// Changes with the options below, so that an original of an older release is not used.
const FORMAT: u32 = 1;
/// Piece of a sparse copy, bytes.
const PIECE: usize = 1 << 20;

/// The formatted original.
#[derive(Debug)]
pub(crate) struct Scratch {
    folder: PathBuf,
    size: u64,
    made: Mutex<bool>,
}

impl Scratch {
    pub(crate) fn new(folder: PathBuf, size: u64) -> Self {
        Self { folder, size, made: Mutex::new(false) }
    }

    fn original(&self) -> PathBuf {
        self.folder.join(format!("scratch-v{FORMAT}-{}.ext4", self.size))
    }

    /// Makes the original if it is not there. Blocks.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let original = self.original();
        if *made || original.exists() {
            *made = true;
            return Ok(());
        }
        let failed = |what: &str, e| Error::io(format!("{what} {}", original.display()), e);
        let new = original.with_extension("new");
        absent_is_fine(fs::remove_file(&new)).map_err(|e| failed("clear", e))?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(|e| failed("create", e))?;
        file.set_len(self.size).map_err(|e| failed("size", e))?;
        format(&new)?;
        file.sync_all().map_err(|e| failed("sync", e))?;
        fs::rename(&new, &original).map_err(|e| failed("rename", e))?;
        sync_dir(&self.folder).map_err(|e| failed("sync", e))?;
        *made = true;
        Ok(())
    }

    /// Makes a fresh writable layer at `path`. Blocks.
    pub(crate) fn clone_to(&self, path: &Path) -> Result<File, Error> {
        self.prepare()?;
        let failed = |e| Error::io(format!("copy the scratch disk to {}", path.display()), e);
        absent_is_fine(fs::remove_file(path)).map_err(failed)?;
        let from = File::open(self.original()).map_err(failed)?;
        let to = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        if !reflink(&from, &to) {
            copy_sparse(&from, &to).map_err(failed)?;
        }
        Ok(to)
    }
}

/// The layer dies with its container, so: no journal (the one thing it buys is recovery), no
/// reserved blocks, inode tables left to the guest (lazy), no discard of a file full of holes.
fn format(path: &Path) -> Result<(), Error> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal"])
        .args(["-E", "lazy_itable_init=1,nodiscard"])
        .arg(path)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .map_err(|e| Error::io("run mkfs.ext4 (Debian package e2fsprogs)", e))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if text.contains("No space left") {
            return Err(Error::ResourceExhausted { message: format!("mkfs.ext4: {text}") });
        }
        return Err(Error::Internal(anyhow::anyhow!("mkfs.ext4: {}: {text}", output.status)));
    }
    Ok(())
}

/// Shares all blocks of `from`, where the file system can.
#[allow(unsafe_code)] // nix has no FICLONE
fn reflink(from: &File, to: &File) -> bool {
    // SAFETY: FICLONE (ioctl_ficlone(2)) takes a descriptor number as its argument and touches no
    // memory of ours; both files stay open during the call because they are borrowed.
    unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) == 0 }
}

/// Copies what is data, leaves holes holes.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut buffer = vec![0; PIECE];
    let mut at: u64 = 0;
    loop {
        at = match lseek64(from, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::Error::ENXIO) => return Ok(()), // only a hole is left
            Err(e) => return Err(e.into()),
        };
        let end = lseek64(from, at as i64, Whence::SeekHole)? as u64;
        while at < end {
            let piece = usize::try_from(end - at).map_or(PIECE, |n| n.min(PIECE));
            from.read_exact_at(&mut buffer[..piece], at)?;
            to.write_all_at(&buffer[..piece], at)?;
            at += piece as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_is_a_sparse_ext4_of_the_wanted_size() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path().to_owned(), 1 << 30);
        let file = scratch.clone_to(&dir.path().join("a.img")).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 64 << 20, "{} blocks", meta.blocks());
        // s_magic of the superblock (Documentation/filesystems/ext4/super.rst).
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, 1024 + 0x38).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
    }

    #[test]
    fn a_sparse_copy_keeps_data_and_holes() {
        let from = tempfile::tempfile().unwrap();
        from.set_len(100 << 20).unwrap();
        from.write_all_at(b"begin", 0).unwrap();
        from.write_all_at(b"middle", (50 << 20) + 7).unwrap();
        let to = tempfile::tempfile().unwrap();
        copy_sparse(&from, &to).unwrap();
        let mut text = [0; 6];
        to.read_exact_at(&mut text, (50 << 20) + 7).unwrap();
        assert_eq!(&text, b"middle");
        assert_eq!(to.metadata().unwrap().len(), 100 << 20);
        assert!(to.metadata().unwrap().blocks() < 1000);
    }
}
