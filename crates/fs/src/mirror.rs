//! What is mounted on the host below a share that follows it (HostToContainer): the guest sees
//! copies, which hold nothing of the host's.
//!
//! ```text
//!   /sources/<share>  as the daemon handed it over: mounts of the host come and go in it (slave)
//!   /shares/<share>   what the guest sees: private copies of the share and of what is mounted in it
//! ```
//! The host cannot unmount what is in use in a mount that follows its own (`EBUSY`,
//! mount_namespaces(7)), and the server keeps a descriptor of each file that the guest remembers.
//! So it never has one of the sources: only of the copies, which are detached when their original
//! has gone. Until the guest forgets its files the file system itself stays in use, as after
//! `umount -l`.
//!
//! Where a mount lies is known as a path, which leads through folders that the guest may write to.
//! It is followed below the root, through no link, and to nothing but the mount that was meant;
//! a guest that moves folders about at that moment gets a copy in another place of its own share.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::{chdir, fchdir};

use crate::table::{Mount, Table};
use crate::{SHARES, SOURCES, sys};

/// Copies of one pod, each with a descriptor here. Attack: a pod that shares all of a node's
/// folders, many times, on a node with many mounts.
const MIRRORS_MAX: usize = 4096;

struct Mirror {
    of: Mount,
    /// Its root.
    copy: OwnedFd,
    /// Where it was put.
    place: PathBuf,
}

#[derive(Default)]
pub(crate) struct Mirrors {
    /// Names of the shares that follow the host.
    shares: BTreeSet<String>,
    /// What is mounted on another one comes after it.
    mirrors: Vec<Mirror>,
    /// What could not be copied, and has been complained about.
    failed: BTreeSet<Mount>,
}

fn below(mount: &Mount) -> Option<(&str, &Path)> {
    let rest = mount.point.strip_prefix(&SOURCES[1..]).ok()?;
    let mut components = rest.components();
    let name = components.next()?.as_os_str().to_str()?;
    Some((name, components.as_path()))
}

impl Mirrors {
    /// Whether the share whose source has just been mounted follows the host.
    pub(crate) fn follows(table: &Table, name: &str) -> nix::Result<bool> {
        let mounts = table.read()?;
        let mut own = mounts.iter().filter(|m| below(m).is_some_and(|(share, _)| share == name));
        Ok(own.any(|mount| mount.slave))
    }

    /// Shows the source to the guest.
    pub(crate) fn add(&mut self, table: &Table, name: &str) -> nix::Result<()> {
        let source = sys::place(&Path::new(&SOURCES[1..]).join(name))?;
        let target = sys::place(&Path::new(&SHARES[1..]).join(name))?;
        let copy = sys::copy_mount(source.as_fd())?;
        sys::make_private(copy.as_fd())?;
        sys::attach_at(copy.as_fd(), target.as_fd())?;
        self.shares.insert(name.to_owned());
        self.update(table)
    }

    /// Whether it was one of these.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        let place = Path::new(&SHARES[1..]).join(name);
        self.mirrors.retain(|mirror| !mirror.place.starts_with(&place));
        self.shares.remove(name)
    }

    /// Does what the host has done.
    pub(crate) fn update(&mut self, table: &Table) -> nix::Result<()> {
        if self.shares.is_empty() {
            return Ok(());
        }
        let mounts = table.read()?;
        let mut wanted: Vec<(&Mount, PathBuf)> = Vec::new();
        for mount in &mounts {
            let Some((name, path)) = below(mount) else { continue };
            // The lowest one at the share's own place is the share.
            let is_share = path.as_os_str().is_empty()
                && !mounts.iter().any(|other| other.id == mount.parent && below(other).is_some());
            if self.shares.contains(name) && !is_share {
                wanted.push((mount, Path::new(&SHARES[1..]).join(name).join(path)));
            }
        }
        self.failed.retain(|failed| wanted.iter().any(|(mount, _)| **mount == *failed));
        self.drop_gone(&wanted)?;
        // What is mounted on another one has to come after it; the table is in that order for
        // those at one place.
        wanted.sort_by_key(|(_, place)| place.components().count());
        for (mount, place) in wanted {
            if self.mirrors.iter().any(|mirror| mirror.of == *mount) {
                continue;
            }
            match self.copy(mount, &place) {
                Ok(()) => {}
                // Something else lies on it, or somebody moves folders: not this time.
                Err(Errno::ESTALE) => {}
                Err(error) => {
                    if self.failed.insert(mount.clone()) {
                        log::error!("{}: not shown: {}", place.display(), error.desc());
                    }
                }
            }
        }
        Ok(())
    }

    /// Detaches copies without an original, and what is mounted on them.
    fn drop_gone(&mut self, wanted: &[(&Mount, PathBuf)]) -> nix::Result<()> {
        let (mut gone, mut kept): (Vec<Mirror>, Vec<Mirror>) = Default::default();
        for mirror in std::mem::take(&mut self.mirrors) {
            let stays = wanted.iter().any(|(mount, _)| **mount == mirror.of)
                && !gone.iter().any(|lower| mirror.place.starts_with(&lower.place));
            if stays { kept.push(mirror) } else { gone.push(mirror) }
        }
        self.mirrors = kept;
        // The last one lies on top.
        let results: Vec<_> = gone.iter().rev().map(|mirror| detach(&mirror.copy)).collect();
        results.into_iter().collect()
    }

    fn copy(&mut self, mount: &Mount, place: &Path) -> nix::Result<()> {
        if self.mirrors.len() >= MIRRORS_MAX {
            return Err(Errno::ENOSPC);
        }
        let copy = {
            let source = sys::place(&mount.point)?;
            if sys::mount_id(source.as_fd())? != mount.id {
                return Err(Errno::ESTALE);
            }
            sys::copy_mount(source.as_fd())?
        };
        sys::make_private(copy.as_fd())?;
        let target = sys::place(place)?;
        sys::attach_at(copy.as_fd(), target.as_fd())?;
        self.mirrors.push(Mirror { of: mount.clone(), copy, place: place.to_owned() });
        Ok(())
    }
}

/// Unmounts what `copy` is the root of. Files that are open in it stay open.
fn detach(copy: &OwnedFd) -> nix::Result<()> {
    // The one way to name a mount by a descriptor.
    fchdir(copy)?;
    let done = umount2(".", MntFlags::MNT_DETACH);
    chdir("/")?;
    match done {
        // Gone already, with the folder that it was mounted on.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error),
    }
}
