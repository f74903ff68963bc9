//! Write protection of shares on the host.
//!
//! The guest's kernel protects the mount of a share in each container. In addition, the server's
//! mounts are read-only on the host as long as no container may write to their files. One file of
//! the host is one inode in the guest, which the server opens through any of the mounts that
//! contain it. So all mounts that may contain the same file (same file system, one root directory
//! inside the other) are writable as soon as one of them has to be. The flag is that of the mount,
//! so it also applies to files opened before.
//!
//! Mounts that the host has made read-only stay read-only. Each protected mount is kept as a file
//! descriptor of its root: mount ids are reused, and paths lead through directories that the guest
//! can rename.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use vmm_api::shares::Access;

use crate::table::{Mount, Table};
use crate::{SHARES, SOURCES, sys};

/// A mount that is writable unless this module protects it.
struct Guarded {
    share: String,
    mount: Mount,
    root: OwnedFd,
    protected: bool,
    /// A mount below the share, not the share itself.
    below: bool,
}

#[derive(Default)]
pub(crate) struct Protection {
    shares: BTreeMap<String, Access>,
    guarded: Vec<Guarded>,
}

/// The share that a mount belongs to, and whether it is the share's own mount.
fn share<'a>(mount: &'a Mount, folder: &str) -> Option<(&'a str, bool)> {
    let rest = mount.point.strip_prefix(&folder[1..]).ok()?;
    let mut components = rest.components();
    let name = components.next()?.as_os_str().to_str()?;
    Some((name, components.as_path().as_os_str().is_empty()))
}

/// Whether users with this access write through a mount of the share.
fn writes(access: Access, below: bool) -> bool {
    match access {
        Access::ReadWrite | Access::AsMounted => true,
        Access::ReadOnly => below,
        Access::ReadOnlyRecursive => false,
    }
}

impl Protection {
    /// Protects a mount that was just attached as the source of a share, before the server accesses
    /// it. `tree` is its root.
    pub(crate) fn begin(
        &mut self,
        table: &Table,
        name: &str,
        access: Access,
        tree: &OwnedFd,
    ) -> nix::Result<()> {
        self.shares.insert(name.to_owned(), access);
        if access == Access::AsMounted {
            return Ok(());
        }
        let mounts = table.read()?;
        match access {
            Access::ReadOnly => sys::protect(tree.as_fd(), true)?,
            Access::ReadOnlyRecursive => sys::protect_all(tree.as_fd())?,
            Access::ReadWrite | Access::AsMounted => {}
        }
        for mount in mounts {
            let of = share(&mount, SOURCES).filter(|(of, _)| *of == name);
            let Some((_, is_share)) = of.filter(|_| !mount.read_only) else { continue };
            let root = match is_share {
                true => tree.try_clone().map_err(|_| Errno::EMFILE)?,
                // A file descriptor in a slave mount would keep the host from unmounting the
                // original.
                false if mount.slave => continue,
                false => match sys::open_beneath(&mount.point) {
                    Ok(root) if sys::mount_id(root.as_fd())? == mount.id => root,
                    // Another mount covers it, or directories are being renamed: its flag is not
                    // changed.
                    _ => continue,
                },
            };
            let (share, below) = (name.to_owned(), !is_share);
            let protected = !writes(access, below);
            self.guarded.push(Guarded { share, mount, root, protected, below });
        }
        Ok(())
    }

    /// The share is a copy of its source: protects the copy instead.
    pub(crate) fn copied(&mut self, table: &Table, name: &str) -> nix::Result<()> {
        let source =
            self.guarded.iter().position(|guarded| guarded.share == name && !guarded.below);
        // The host has mounted it read-only, or its access is AsMounted.
        let Some(source) = source else { return Ok(()) };
        let protected = self.guarded.swap_remove(source).protected;
        let root = sys::open_beneath(&Path::new(&SHARES[1..]).join(name))?;
        let id = sys::mount_id(root.as_fd())?;
        let mount = table.read()?.into_iter().find(|mount| mount.id == id).ok_or(Errno::ENOENT)?;
        let guarded = Guarded { share: name.to_owned(), mount, root, protected, below: false };
        self.guarded.push(guarded);
        Ok(())
    }

    pub(crate) fn set(&mut self, name: &str, access: Access) {
        self.shares.insert(name.to_owned(), access);
    }

    /// To be called before the share is unmounted. The guest may still have files of it open.
    pub(crate) fn remove(&mut self, name: &str) {
        self.shares.remove(name);
        for guarded in self.guarded.extract_if(.., |guarded| guarded.share == name) {
            if !guarded.protected && !guarded.below {
                // EBUSY while files are open for writing.
                let _ = sys::protect(guarded.root.as_fd(), true);
            }
        }
    }

    /// Makes mounts writable that a container may write to, and protects the others. A mount with
    /// files open for writing stays writable until the next call.
    pub(crate) fn update(&mut self, table: &Table) -> nix::Result<()> {
        if self.guarded.is_empty() {
            return Ok(());
        }
        let mounts = table.read()?;
        let written: Vec<&Mount> = mounts.iter().filter(|mount| self.is_written(mount)).collect();
        let mut result = Ok(());
        for guarded in &mut self.guarded {
            let writable = written.iter().any(|mount| mount.overlaps(&guarded.mount));
            if writable != guarded.protected {
                continue;
            }
            match sys::protect(guarded.root.as_fd(), !writable) {
                Ok(()) => guarded.protected = !writable,
                // Files are open for writing, or it is not mounted any more.
                Err(Errno::EBUSY | Errno::EINVAL) if !writable => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Whether a container may write through this mount of the server.
    fn is_written(&self, mount: &Mount) -> bool {
        let Some((name, is_share)) = share(mount, SHARES) else { return false };
        let Some(access) = self.shares.get(name) else { return false };
        let guarded = self.guarded.iter().any(|guarded| guarded.mount.id == mount.id);
        writes(*access, !is_share) && (guarded || !mount.read_only)
    }
}
