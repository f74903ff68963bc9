//! Mounts that the host makes below a share with HostToContainer propagation: the guest sees
//! copies, which do not keep the host's mounts in use.
//!
//! ```text
//!   /sources/<share>  the mount from the daemon: mounts of the host propagate to it (slave)
//!   /shares/<share>   what the guest sees: private copies of the share and of the mounts below it
//! ```
//! The host cannot unmount a mount that is in use in a slave of it (`EBUSY`, mount_namespaces(7)),
//! and the server has file descriptors of files that the guest knows. So the server never opens
//! files in sources, only in copies, which are detached once the original was unmounted. The file
//! system itself stays in use until the guest forgets its files, as after `umount -l`.
//!
//! A mount point is a path through directories that the guest may write to. It is resolved below
//! the root (RESOLVE_BENEATH), without symbolic links, and the id of the mount found is checked. A
//! guest that renames directories at that moment gets a copy at another place of its own share.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::{chdir, fchdir};

use crate::table::{Mount, Table};
use crate::{SHARES, SOURCES, sys};

/// Most copies of one pod; each has a file descriptor. Attack: a pod shares all directories of a
/// node many times, on a node with many mounts.
const MIRRORS_MAX: usize = 4096;

struct Mirror {
    of: Mount,
    /// Root of the copy.
    copy: OwnedFd,
    /// Where the copy is mounted.
    place: PathBuf,
}

#[derive(Default)]
pub(crate) struct Mirrors {
    /// Names of the shares that follow the host's mounts.
    shares: BTreeSet<String>,
    /// A mount on another one comes after it.
    mirrors: Vec<Mirror>,
    /// Mounts that could not be copied, which was logged.
    failed: BTreeSet<Mount>,
}

fn below(mount: &Mount) -> Option<(&str, &Path)> {
    let rest = mount.point.strip_prefix(&SOURCES[1..]).ok()?;
    let mut components = rest.components();
    let name = components.next()?.as_os_str().to_str()?;
    Some((name, components.as_path()))
}

impl Mirrors {
    /// Whether the share whose source was just mounted follows the host's mounts.
    pub(crate) fn follows(table: &Table, name: &str) -> nix::Result<bool> {
        let mounts = table.read()?;
        let mut own = mounts.iter().filter(|m| below(m).is_some_and(|(share, _)| share == name));
        Ok(own.any(|mount| mount.slave))
    }

    /// Mounts a copy of the source as the share.
    pub(crate) fn add(&mut self, table: &Table, name: &str) -> nix::Result<()> {
        let source = sys::open_beneath(&Path::new(&SOURCES[1..]).join(name))?;
        let target = sys::open_beneath(&Path::new(&SHARES[1..]).join(name))?;
        let copy = sys::copy_mount(source.as_fd())?;
        sys::make_private(copy.as_fd())?;
        sys::attach_at(copy.as_fd(), target.as_fd())?;
        self.shares.insert(name.to_owned());
        self.update(table)
    }

    /// Forgets the copies of a share; `true` if it followed the host's mounts.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        let place = Path::new(&SHARES[1..]).join(name);
        self.mirrors.retain(|mirror| !mirror.place.starts_with(&place));
        self.shares.remove(name)
    }

    /// Adds and removes copies according to the mount table.
    pub(crate) fn update(&mut self, table: &Table) -> nix::Result<()> {
        if self.shares.is_empty() {
            return Ok(());
        }
        let mounts = table.read()?;
        let mut wanted: Vec<(&Mount, PathBuf)> = Vec::new();
        for mount in &mounts {
            let Some((name, path)) = below(mount) else { continue };
            // The lowest mount at the share's mount point is the share itself.
            let is_share = path.as_os_str().is_empty()
                && !mounts.iter().any(|other| other.id == mount.parent && below(other).is_some());
            if self.shares.contains(name) && !is_share {
                wanted.push((mount, Path::new(&SHARES[1..]).join(name).join(path)));
            }
        }
        self.failed.retain(|failed| wanted.iter().any(|(mount, _)| **mount == *failed));
        self.detach_unmounted(&wanted)?;
        // A mount on another one must come after it; for mounts at one path the table is in that
        // order.
        wanted.sort_by_key(|(_, place)| place.components().count());
        for (mount, place) in wanted {
            if self.mirrors.iter().any(|mirror| mirror.of == *mount) {
                continue;
            }
            match self.copy(mount, &place) {
                Ok(()) => {}
                // Another mount covers it, or directories are being renamed: retried at the next
                // update.
                Err(Errno::ESTALE) => {}
                Err(error) => {
                    if self.failed.insert(mount.clone()) {
                        log::error!(
                            "{}: the mount cannot be copied: {}",
                            place.display(),
                            error.desc()
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// Detaches copies whose original was unmounted, and mounts on them.
    fn detach_unmounted(&mut self, wanted: &[(&Mount, PathBuf)]) -> nix::Result<()> {
        let (mut gone, mut kept): (Vec<Mirror>, Vec<Mirror>) = Default::default();
        for mirror in std::mem::take(&mut self.mirrors) {
            let stays = wanted.iter().any(|(mount, _)| **mount == mirror.of)
                && !gone.iter().any(|lower| mirror.place.starts_with(&lower.place));
            if stays { kept.push(mirror) } else { gone.push(mirror) }
        }
        self.mirrors = kept;
        // The last one is the topmost.
        let results: Vec<_> = gone.iter().rev().map(|mirror| detach(&mirror.copy)).collect();
        results.into_iter().collect()
    }

    fn copy(&mut self, mount: &Mount, place: &Path) -> nix::Result<()> {
        if self.mirrors.len() >= MIRRORS_MAX {
            return Err(Errno::ENOSPC);
        }
        let copy = {
            let source = sys::open_beneath(&mount.point)?;
            if sys::mount_id(source.as_fd())? != mount.id {
                return Err(Errno::ESTALE);
            }
            sys::copy_mount(source.as_fd())?
        };
        sys::make_private(copy.as_fd())?;
        let target = sys::open_beneath(place)?;
        sys::attach_at(copy.as_fd(), target.as_fd())?;
        self.mirrors.push(Mirror { of: mount.clone(), copy, place: place.to_owned() });
        Ok(())
    }
}

/// Unmounts the mount with root `copy`. Files that are open in it stay open.
fn detach(copy: &OwnedFd) -> nix::Result<()> {
    // umount2 takes only a path; `.` after fchdir names the mount of a file descriptor.
    fchdir(copy)?;
    let done = umount2(".", MntFlags::MNT_DETACH);
    chdir("/")?;
    match done {
        // Unmounted already, with the directory that it was mounted on.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error),
    }
}
