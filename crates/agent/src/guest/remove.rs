//! Deletes directory trees of containers, of any size and depth, with bounded stack and
//! descriptors: a directory that is not empty is moved up next to the one it was found in, and
//! deleted later.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Empties a directory that nothing else writes to. Continues after failures and returns the last
/// one. Blocks.
pub fn remove_contents(dir: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = open(dir, flags, Mode::empty())?;
    let mut moved = NameCounter::default();
    let mut failed = None;
    loop {
        let (mut progress, before) = (false, moved.0);
        for name in names(&top)? {
            match remove_entry(&top, &name, &mut moved) {
                Ok(()) => progress = true,
                Err(error) => failed = Some(error),
            }
        }
        if !progress && moved.0 == before {
            return failed.map_or(Ok(()), |error| Err(error.into()));
        }
    }
}

/// Counter for the names of moved directories.
#[derive(Default)]
struct NameCounter(u64);

type Name = std::ffi::CString;

/// Maximum entries read at once.
const BATCH: usize = 1024;

fn names(dir: &OwnedFd) -> nix::Result<Vec<Name>> {
    Ok(entries(dir)?.into_iter().map(|(name, _)| name).collect())
}

fn entries(dir: &OwnedFd) -> nix::Result<Vec<(Name, Option<Type>)>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    // A new descriptor, as reading changes the file position.
    let mut dir = Dir::openat(dir, ".", flags, Mode::empty())?;
    let mut found = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            found.push((name.to_owned(), entry.file_type()));
        }
        if found.len() >= BATCH {
            break;
        }
    }
    Ok(found)
}

/// Removes one entry of `top`; its subdirectories may be moved to `top`.
fn remove_entry(top: &OwnedFd, name: &Name, moved: &mut NameCounter) -> nix::Result<()> {
    match unlinkat(top, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = openat(top, name.as_c_str(), flags, Mode::empty())?;
    loop {
        let found = entries(&dir)?;
        if found.is_empty() {
            return unlinkat(top, name.as_c_str(), UnlinkatFlags::RemoveDir);
        }
        let mut failed = None;
        for (name, kind) in &found {
            if let Err(error) = clear(&dir, name, *kind, top, moved) {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
    }
}

fn clear(
    dir: &OwnedFd,
    name: &Name,
    kind: Option<Type>,
    top: &OwnedFd,
    moved: &mut NameCounter,
) -> nix::Result<()> {
    if kind != Some(Type::Directory) {
        match unlinkat(dir, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            other => return other,
        }
    }
    match unlinkat(dir, name.as_c_str(), UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
        other => return other,
    }
    loop {
        moved.0 += 1;
        let place = format!("moved-{}", moved.0);
        match renameat(dir.as_fd(), name.as_c_str(), top.as_fd(), place.as_str()) {
            // Name in use since an earlier, incomplete call.
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_of_any_depth_is_deleted_and_targets_of_symlinks_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (trash, kept) = (dir.path().join("trash"), dir.path().join("kept"));
        fs::create_dir_all(trash.join("1/wide")).unwrap();
        fs::write(&kept, "x").unwrap();
        for n in 0..2500 {
            fs::write(trash.join(format!("1/wide/{n}")), "").unwrap();
        }
        symlink(&kept, trash.join("1/link")).unwrap();
        symlink(dir.path(), trash.join("2")).unwrap();
        // Longer than PATH_MAX, and deeper than the descriptor limit.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut at = open(&trash.join("1"), flags, Mode::empty()).unwrap();
        for _ in 0..3000 {
            nix::sys::stat::mkdirat(&at, "deeper", Mode::S_IRWXU).unwrap();
            at = openat(&at, "deeper", flags, Mode::empty()).unwrap();
        }
        drop(at);
        fs::create_dir_all(trash.join("moved-1/full")).unwrap();
        remove_contents(&trash).unwrap();
        assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(&kept).unwrap(), "x");
        remove_contents(&trash).unwrap();
    }
}
