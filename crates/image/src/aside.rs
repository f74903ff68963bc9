//! Damaged files of the store: moved to `damaged/`, logged once, and listed in verbose Status. The
//! daemon starts without them. Nothing limits the size of `damaged/`: an operator deletes it after a
//! look.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::files::{create_directory, list, sync_directory};

/// Names that are tried for a file whose own is taken.
const MAX_NAMES: usize = 1000;

/// Something that was moved aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Where it is now.
    pub path: PathBuf,
    pub reason: String,
}

#[derive(Debug, Clone)]
pub struct Aside(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    damaged: Mutex<Vec<Damaged>>,
}

impl Aside {
    /// `root` is the store's. What an earlier process moved aside and is still there is in the list.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let directory = root.join("damaged");
        let reason = "moved aside by an earlier start".to_owned();
        let old = if directory.is_dir() { list(&directory)? } else { Vec::new() };
        let old = old.into_iter().map(|(_, e)| Damaged { path: e.path(), reason: reason.clone() });
        Ok(Self(Arc::new(Inner { damaged: Mutex::new(old.collect()), directory })))
    }

    pub fn list(&self) -> Vec<Damaged> {
        self.0.damaged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Moves a file or directory aside. If that fails (a full disk, for example) it stays where it is
    /// and is listed all the same: it must not keep the daemon from starting.
    pub fn take(&self, path: &Path, reason: &str) {
        let shown = path.display();
        let now = match self.take_away(path) {
            Ok(now) => now,
            Err(error) => {
                tracing::error!(path = %shown, %error, "a damaged file cannot be moved aside");
                path.to_owned()
            }
        };
        tracing::error!(path = %shown, now = %now.display(), reason, "damaged");
        let damaged = Damaged { path: now, reason: format!("{shown}: {reason}") };
        self.0.damaged.lock().unwrap_or_else(PoisonError::into_inner).push(damaged);
    }

    fn take_away(&self, path: &Path) -> Result<PathBuf, Error> {
        create_directory(&self.0.directory)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut names = (0..MAX_NAMES).map(|n| match n {
            0 => self.0.directory.join(&*name),
            n => self.0.directory.join(format!("{name}.{n}")),
        });
        let target = names.find(|path| fs::symlink_metadata(path).is_err()).ok_or_else(|| {
            let reason = format!("no name is free for {name}: delete what is in it");
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
    fn files_and_folders_of_one_name_are_kept_beside_each_other_and_listed_again() {
        let dir = tempfile::tempdir().unwrap();
        let aside = Aside::open(dir.path()).unwrap();
        assert!(aside.list().is_empty() && !dir.path().join("damaged").exists());
        let path = dir.path().join("record.json");
        fs::write(&path, "{").unwrap();
        aside.take(&path, "cut");
        fs::create_dir(&path).unwrap();
        aside.take(&path, "a folder");
        assert!(!path.exists() && dir.path().join("damaged/record.json.1").is_dir());
        assert_eq!(aside.list().len(), 2);
        assert!(aside.list()[0].reason.ends_with("record.json: cut"));
        assert_eq!(Aside::open(dir.path()).unwrap().list().len(), 2);
        // What cannot be moved is listed where it is.
        let gone = dir.path().join("gone");
        aside.take(&gone, "odd");
        assert_eq!(aside.list()[2].path, gone);
    }
}
