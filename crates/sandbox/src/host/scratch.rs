//! Scratch disks: sparse copies of an ext4 file system with project quotas, formatted once per
//! size. A pod has one; in pods started by an earlier release each container has one.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use nix::unistd::{Whence, lseek64};

use super::{ignore_not_found, sync_dir};
use crate::error::Error;

/// Incremented with the options below, so that templates of older releases are not used.
const FORMAT: u32 = 2;
/// Chunk of a sparse copy, bytes.
const CHUNK: usize = 1 << 20;
/// Independent of the host's mke2fs.conf. No journal: a scratch disk is never recovered, as it is
/// deleted with its pod. Without resize_inode, backup superblocks and scattered metadata a copy
/// writes about 200 KiB instead of 5 MiB.
const FEATURES: &str = "none,filetype,ext_attr,dir_index,extent,64bit,flex_bg,sparse_super2,\
    large_file,huge_file,uninit_bg,dir_nlink,extra_isize,quota,project";
/// Inode tables remain holes, which read as zeros.
const EXTENDED: &str = "quotatype=prjquota,lazy_itable_init=1,nodiscard,num_backup_sb=0,\
    packed_meta_blocks=1";
/// Bytes of the disk for each of its inodes.
pub(crate) const INODE_RATIO: u64 = 16384;

/// The formatted templates.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: PathBuf,
    /// Sizes of existing templates.
    made: Mutex<BTreeSet<u64>>,
}

impl Scratch {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, made: Mutex::default() }
    }

    fn template(&self, size: u64) -> PathBuf {
        self.directory.join(format!("scratch-v{FORMAT}-{size}.ext4"))
    }

    /// Removes templates of earlier releases. Blocks.
    pub(crate) fn remove_old(&self) {
        let current = format!("scratch-v{FORMAT}-");
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("scratch-v") && !name.starts_with(&current) {
                // Retried at the next start.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Creates the template if missing. Blocks.
    fn prepare(&self, size: u64) -> Result<(), Error> {
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let template = self.template(size);
        if made.contains(&size) || template.exists() {
            made.insert(size);
            return Ok(());
        }
        let failed = |what: &str, e| Error::io(format!("{what} {}", template.display()), e);
        // Other processes may share the directory. The lock is released on drop or exit.
        let lock =
            File::create(self.directory.join("scratch.lock")).map_err(|e| failed("lock", e))?;
        lock.lock().map_err(|e| failed("lock", e))?;
        if template.exists() {
            made.insert(size);
            return Ok(());
        }
        let new = template.with_extension("new");
        ignore_not_found(fs::remove_file(&new)).map_err(|e| failed("clear", e))?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(|e| failed("create", e))?;
        file.set_len(size).map_err(|e| failed("size", e))?;
        format(&new)?;
        file.sync_all().map_err(|e| failed("sync", e))?;
        fs::rename(&new, &template).map_err(|e| failed("rename", e))?;
        sync_dir(&self.directory).map_err(|e| failed("sync", e))?;
        made.insert(size);
        Ok(())
    }

    /// Creates a disk of `size` bytes at `path`. Blocks.
    pub(crate) fn clone_to(&self, path: &Path, size: u64) -> Result<File, Error> {
        self.prepare(size)?;
        let failed = |e| Error::io(format!("copy the scratch disk to {}", path.display()), e);
        ignore_not_found(fs::remove_file(path)).map_err(failed)?;
        let from = File::open(self.template(size)).map_err(failed)?;
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

fn format(path: &Path) -> Result<(), Error> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0"])
        .args(["-i", &INODE_RATIO.to_string(), "-O", FEATURES, "-E", EXTENDED])
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

/// Reflinks all blocks of `from`, if the file system supports it.
#[allow(unsafe_code)] // nix has no FICLONE
fn reflink(from: &File, to: &File) -> bool {
    // SAFETY: FICLONE (ioctl_ficlone(2)) takes a descriptor number as its argument and touches no
    // memory of ours; both files stay open during the call because they are borrowed.
    unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) == 0 }
}

/// Copies data and keeps holes.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut buffer = vec![0; CHUNK];
    let mut at: u64 = 0;
    loop {
        at = match lseek64(from, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::Error::ENXIO) => return Ok(()), // only a hole is left
            Err(e) => return Err(e.into()),
        };
        let end = lseek64(from, at as i64, Whence::SeekHole)? as u64;
        while at < end {
            let chunk = usize::try_from(end - at).map_or(CHUNK, |n| n.min(CHUNK));
            from.read_exact_at(&mut buffer[..chunk], at)?;
            to.write_all_at(&buffer[..chunk], at)?;
            at += chunk as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_scratch_disk_is_a_sparse_ext4_of_the_requested_size() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("scratch-v1-1073741824.ext4"), "old").unwrap();
        let scratch = Scratch::new(dir.path().to_owned());
        for size in [16 << 20, 64 << 30] {
            let file = scratch.clone_to(&dir.path().join("a.img"), size).unwrap();
            let meta = file.metadata().unwrap();
            assert_eq!(meta.len(), size);
            assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
            // s_magic, s_feature_ro_compat and s_prj_quota_inum of the superblock
            // (Documentation/filesystems/ext4/super.rst): quota and project are there.
            let mut field = [0; 4];
            file.read_exact_at(&mut field[..2], 1024 + 0x38).unwrap();
            assert_eq!(field[..2], [0x53, 0xef]);
            file.read_exact_at(&mut field, 1024 + 0x64).unwrap();
            assert_eq!(u32::from_le_bytes(field) & 0x2100, 0x2100);
            file.read_exact_at(&mut field, 1024 + 0x26c).unwrap();
            assert_ne!(u32::from_le_bytes(field), 0);
        }
        scratch.remove_old();
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        left.sort();
        let names: Vec<_> = left.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
        let originals = ["scratch-v2-16777216.ext4", "scratch-v2-68719476736.ext4"];
        assert_eq!(names, ["a.img", originals[0], originals[1], "scratch.lock"]);
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
