//! Deletes trees that containers have made: of any size and depth, so neither the stack nor the
//! number of open files depends on them. A folder that is not empty is moved up, beside the one it
//! was found in, and has its turn later.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Empties a folder that nobody else writes to. Goes on past what cannot be removed, which is told
/// at the end. Blocks.
pub fn everything_in(folder: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = open(folder, flags, Mode::empty())?;
    let mut moved = Moved::default();
    let mut failed = None;
    loop {
        let (mut progress, before) = (false, moved.0);
        for name in names(&top)? {
            match one(&top, &name, &mut moved) {
                Ok(()) => progress = true,
                Err(error) => failed = Some(error),
            }
        }
        if !progress && moved.0 == before {
            return failed.map_or(Ok(()), |error| Err(error.into()));
        }
    }
}

/// Names for folders that are moved up; what is there has others.
#[derive(Default)]
struct Moved(u64);

type Name = std::ffi::CString;

/// What a folder holds; at most some of a huge one.
const AT_ONCE: usize = 1024;

fn names(folder: &OwnedFd) -> nix::Result<Vec<Name>> {
    Ok(entries(folder)?.into_iter().map(|(name, _)| name).collect())
}

fn entries(folder: &OwnedFd) -> nix::Result<Vec<(Name, Option<Type>)>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    // A descriptor of its own, as its position is read on from.
    let mut dir = Dir::openat(folder, ".", flags, Mode::empty())?;
    let mut found = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            found.push((name.to_owned(), entry.file_type()));
        }
        if found.len() >= AT_ONCE {
            break;
        }
    }
    Ok(found)
}

/// Removes one entry of `top`; if it is a folder, its folders may be in `top` afterwards.
fn one(top: &OwnedFd, name: &Name, moved: &mut Moved) -> nix::Result<()> {
    match unlinkat(top, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let folder = openat(top, name.as_c_str(), flags, Mode::empty())?;
    loop {
        let found = entries(&folder)?;
        if found.is_empty() {
            return unlinkat(top, name.as_c_str(), UnlinkatFlags::RemoveDir);
        }
        let mut failed = None;
        for (name, kind) in &found {
            if let Err(error) = clear(&folder, name, *kind, top, moved) {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
    }
}

fn clear(
    folder: &OwnedFd,
    name: &Name,
    kind: Option<Type>,
    top: &OwnedFd,
    moved: &mut Moved,
) -> nix::Result<()> {
    if kind != Some(Type::Directory) {
        match unlinkat(folder, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            other => return other,
        }
    }
    match unlinkat(folder, name.as_c_str(), UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
        other => return other,
    }
    loop {
        moved.0 += 1;
        let place = format!("moved-{}", moved.0);
        match renameat(folder.as_fd(), name.as_c_str(), top.as_fd(), place.as_str()) {
            // Of an earlier call that did not come to its end.
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
    fn a_tree_of_any_depth_goes_and_what_its_links_lead_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (trash, kept) = (dir.path().join("trash"), dir.path().join("kept"));
        fs::create_dir_all(trash.join("1/wide")).unwrap();
        fs::write(&kept, "x").unwrap();
        for n in 0..2500 {
            fs::write(trash.join(format!("1/wide/{n}")), "").unwrap();
        }
        symlink(&kept, trash.join("1/link")).unwrap();
        symlink(dir.path(), trash.join("2")).unwrap();
        // Deeper than a path can say, and than folders could be held open.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut at = open(&trash.join("1"), flags, Mode::empty()).unwrap();
        for _ in 0..3000 {
            nix::sys::stat::mkdirat(&at, "deeper", Mode::S_IRWXU).unwrap();
            at = openat(&at, "deeper", flags, Mode::empty()).unwrap();
        }
        drop(at);
        fs::create_dir_all(trash.join("moved-1/full")).unwrap();
        everything_in(&trash).unwrap();
        assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(&kept).unwrap(), "x");
        everything_in(&trash).unwrap();
    }
}
