//! Damaged files of the store: moved to `damaged/`, logged once, and listed in verbose Status. The
//! daemon starts without them. `damaged/` keeps the newest [`MAX_KEPT`] entries; when one is added, and
//! at start, those older than [`MAX_AGE`] are removed. Files of a newer release are not damaged: they
//! are moved to `newer/`, which is never pruned.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::error::Error;
use crate::files::{create_directory, list, remove_any, sync_directory};

/// Names tried (`name`, `name.1`, ...) before giving up because all exist.
const MAX_NAMES: usize = 1000;
/// Files and directories that are kept, and for how long: enough for a look at what went wrong.
const MAX_KEPT: usize = 64;
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A file or directory that was moved to `damaged/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Its present path.
    pub path: PathBuf,
    pub reason: String,
}

#[derive(Debug, Clone)]
pub struct DamagedFiles(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    newer: PathBuf,
    damaged: Mutex<Vec<Damaged>>,
}

impl DamagedFiles {
    /// `root` is the store's root. Entries left in `damaged/` by an earlier process are listed.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let (directory, newer) = (root.join("damaged"), root.join("newer"));
        let mut old = Vec::new();
        for (directory, reason) in [
            (&directory, "moved to damaged/ by an earlier start"),
            (&newer, "of a newer release, moved to newer/ by an earlier start"),
        ] {
            let entries = if directory.is_dir() { list(directory)? } else { Vec::new() };
            let entries = entries.into_iter().map(|(_, entry)| entry.path());
            old.extend(entries.map(|path| Damaged { path, reason: reason.to_owned() }));
        }
        let files = Self(Arc::new(Inner { damaged: Mutex::new(old), directory, newer }));
        files.prune(SystemTime::now());
        Ok(files)
    }

    fn damaged(&self) -> MutexGuard<'_, Vec<Damaged>> {
        self.0.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn list(&self) -> Vec<Damaged> {
        self.damaged().clone()
    }

    /// Removes what is too old, and the oldest of what is too much.
    fn prune(&self, now: SystemTime) {
        let Ok(entries) = list(&self.0.directory) else { return };
        let mut kept: Vec<(i64, i64, PathBuf)> = Vec::new();
        for (_, entry) in entries {
            // The time of the last change of the inode: that of its move to here.
            let Ok(metadata) = entry.metadata() else { continue };
            kept.push((metadata.ctime(), metadata.ctime_nsec(), entry.path()));
        }
        kept.sort();
        let too_many = kept.len().saturating_sub(MAX_KEPT);
        let oldest = now.checked_sub(MAX_AGE).unwrap_or(SystemTime::UNIX_EPOCH);
        let oldest = oldest.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        for (n, (moved, _, path)) in kept.into_iter().enumerate() {
            if n >= too_many && u64::try_from(moved).unwrap_or(0) >= oldest {
                continue;
            }
            match remove_any(&path) {
                Ok(()) => {
                    tracing::info!(path = %path.display(), "damaged, removed after its time");
                    self.damaged().retain(|damaged| damaged.path != path);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "damaged, cannot be removed");
                }
            }
        }
    }

    /// Moves a file or directory to `damaged/`. If that fails (a full disk, for example), it stays
    /// in place and is listed all the same: damage must not prevent the daemon from starting.
    pub fn move_away(&self, path: &Path, reason: &str) {
        self.move_to(&self.0.directory, path, reason);
        self.prune(SystemTime::now());
    }

    /// Moves a file or directory of a newer release to `newer/`.
    pub fn move_newer(&self, path: &Path, reason: &str) {
        self.move_to(&self.0.newer, path, reason);
    }

    fn move_to(&self, directory: &Path, path: &Path, reason: &str) {
        let shown = path.display();
        let now = match try_move(directory, path) {
            Ok(now) => now,
            Err(error) => {
                tracing::error!(path = %shown, %error, "cannot move a file of the store away");
                path.to_owned()
            }
        };
        tracing::error!(path = %shown, now = %now.display(), reason, "cannot be used");
        let damaged = Damaged { path: now, reason: format!("{shown}: {reason}") };
        let mut all = self.damaged();
        // One that cannot be moved is found again.
        all.retain(|known| known.path != damaged.path);
        all.push(damaged);
    }
}

fn try_move(directory: &Path, path: &Path) -> Result<PathBuf, Error> {
    create_directory(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut names = (0..MAX_NAMES).map(|n| match n {
        0 => directory.join(&*name),
        n => directory.join(format!("{name}.{n}")),
    });
    let target = names.find(|path| fs::symlink_metadata(path).is_err()).ok_or_else(|| {
        let reason = format!("no free name for {name}: delete its contents");
        Error::Record { path: directory.to_owned(), reason }
    })?;
    fs::rename(path, &target).map_err(|e| Error::io("rename", path, e))?;
    sync_directory(directory)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_directories_of_one_name_are_both_kept_and_listed_after_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = DamagedFiles::open(dir.path()).unwrap();
        assert!(damaged.list().is_empty() && !dir.path().join("damaged").exists());
        let path = dir.path().join("record.json");
        fs::write(&path, "{").unwrap();
        damaged.move_away(&path, "cut");
        fs::create_dir(&path).unwrap();
        damaged.move_away(&path, "a directory");
        assert!(!path.exists() && dir.path().join("damaged/record.json.1").is_dir());
        assert_eq!(damaged.list().len(), 2);
        assert!(damaged.list()[0].reason.ends_with("record.json: cut"));
        assert_eq!(DamagedFiles::open(dir.path()).unwrap().list().len(), 2);
        // A file that cannot be moved is listed with its original path.
        let gone = dir.path().join("gone");
        damaged.move_away(&gone, "odd");
        assert_eq!(damaged.list()[2].path, gone);
    }

    #[test]
    fn files_of_a_newer_release_are_never_pruned_and_one_that_stays_is_listed_once() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = DamagedFiles::open(dir.path()).unwrap();
        for n in 0..MAX_KEPT + 3 {
            let path = dir.path().join(format!("{n}.json"));
            fs::write(&path, "{}").unwrap();
            damaged.move_newer(&path, "version 2");
        }
        damaged.prune(SystemTime::now() + MAX_AGE + Duration::from_secs(3600));
        let kept = || fs::read_dir(dir.path().join("newer")).unwrap().count();
        assert_eq!((kept(), damaged.list().len()), (MAX_KEPT + 3, MAX_KEPT + 3));
        assert_eq!(DamagedFiles::open(dir.path()).unwrap().list().len(), MAX_KEPT + 3);
        for _ in 0..2 {
            damaged.move_away(&dir.path().join("gone"), "odd");
        }
        assert_eq!(damaged.list().len(), MAX_KEPT + 4);
    }

    #[test]
    fn the_oldest_entries_are_removed_first_and_all_after_a_month() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = DamagedFiles::open(dir.path()).unwrap();
        for n in 0..MAX_KEPT + 3 {
            let path = dir.path().join(format!("{n}.json"));
            if n % 2 == 0 {
                fs::write(&path, "{").unwrap();
            } else {
                fs::create_dir_all(path.join("deep")).unwrap();
            }
            damaged.move_away(&path, "cut");
            // Times of files are as coarse as the kernel's tick.
            std::thread::sleep(Duration::from_millis(12));
        }
        let kept = || fs::read_dir(dir.path().join("damaged")).unwrap().count();
        assert_eq!((kept(), damaged.list().len()), (MAX_KEPT, MAX_KEPT));
        let has = |n: usize| dir.path().join(format!("damaged/{n}.json")).exists();
        assert!(!has(0) && !has(2) && has(3) && has(MAX_KEPT + 2));
        damaged.prune(SystemTime::now() + MAX_AGE - Duration::from_secs(3600));
        assert_eq!(kept(), MAX_KEPT);
        damaged.prune(SystemTime::now() + MAX_AGE + Duration::from_secs(3600));
        assert_eq!((kept(), damaged.list().len()), (0, 0));
    }
}
