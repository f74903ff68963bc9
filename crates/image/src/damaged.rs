//! Damaged files of the store: moved to `damaged/`, logged once, and listed in verbose Status. The
//! daemon starts without them. `damaged/` keeps the newest entries, and none older than a month.

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
    damaged: Mutex<Vec<Damaged>>,
}

impl DamagedFiles {
    /// `root` is the store's root. Entries left in `damaged/` by an earlier process are listed.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let directory = root.join("damaged");
        let reason = "moved to damaged/ by an earlier start".to_owned();
        let old = if directory.is_dir() { list(&directory)? } else { Vec::new() };
        let old = old.into_iter().map(|(_, e)| Damaged { path: e.path(), reason: reason.clone() });
        let files = Self(Arc::new(Inner { damaged: Mutex::new(old.collect()), directory }));
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
        let shown = path.display();
        let now = match self.try_move(path) {
            Ok(now) => now,
            Err(error) => {
                tracing::error!(path = %shown, %error, "cannot move a damaged file to damaged/");
                path.to_owned()
            }
        };
        tracing::error!(path = %shown, now = %now.display(), reason, "damaged");
        let damaged = Damaged { path: now, reason: format!("{shown}: {reason}") };
        self.damaged().push(damaged);
        self.prune(SystemTime::now());
    }

    fn try_move(&self, path: &Path) -> Result<PathBuf, Error> {
        create_directory(&self.0.directory)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut names = (0..MAX_NAMES).map(|n| match n {
            0 => self.0.directory.join(&*name),
            n => self.0.directory.join(format!("{name}.{n}")),
        });
        let target = names.find(|path| fs::symlink_metadata(path).is_err()).ok_or_else(|| {
            let reason = format!("no free name for {name}: delete its contents");
            Error::Record { path: self.0.directory.clone(), reason }
        })?;
        fs::rename(path, &target).map_err(|e| Error::io("rename", path, e))?;
        sync_directory(&self.0.directory)?;
        Ok(target)
    }
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
