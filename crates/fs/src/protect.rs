//! Write protection of shares on the host's side.
//!
//! The guest's kernel protects each container's own mount of a share. Here the mounts that the server
//! looks at are read-only, too, for as long as nobody in the guest may write to the files behind
//! them. A file of the guest is one file whichever share leads to it, and the server has it open
//! through one of the mounts that lead to it; so mounts that may lead to the same file (one file
//! system, one folder inside the other) are all writable as soon as one of them has to be. The flag
//! is the mount's, so what was opened through it before changes with it.
//!
//! What the host has mounted read-only stays so. Each mount that is protected here is held by a
//! descriptor of its root: ids of mounts are used again, and paths lead through folders that the
//! guest can move.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use vmm_api::shares::Access;

use crate::table::{Mount, Table};
use crate::{SHARES, SOURCES, sys};

/// A mount that could be written to if it were not for this module.
struct Guarded {
    share: String,
    mount: Mount,
    root: OwnedFd,
    protected: bool,
    /// Not the share itself, but mounted below it.
    below: bool,
}

#[derive(Default)]
pub(crate) struct Protection {
    shares: BTreeMap<String, Access>,
    guarded: Vec<Guarded>,
}

/// The share that a mount belongs to, and whether it is the share itself.
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
    /// Protects what has just been mounted as the source of a share, before the server looks at it.
    /// `tree` is its root.
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
                // The host could not unmount what is held in a mount that follows its own.
                false if mount.slave => continue,
                false => match sys::place(&mount.point) {
                    Ok(root) if sys::mount_id(root.as_fd())? == mount.id => root,
                    // Another one lies on it, or folders are being moved: it stays as it is now.
                    _ => continue,
                },
            };
            let (share, below) = (name.to_owned(), !is_share);
            let protected = !writes(access, below);
            self.guarded.push(Guarded { share, mount, root, protected, below });
        }
        Ok(())
    }

    /// The server looks at a copy of the share's source.
    pub(crate) fn copied(&mut self, table: &Table, name: &str) -> nix::Result<()> {
        let source =
            self.guarded.iter().position(|guarded| guarded.share == name && !guarded.below);
        // The host has it read-only, or its flags are its own.
        let Some(source) = source else { return Ok(()) };
        let protected = self.guarded.swap_remove(source).protected;
        let root = sys::place(&Path::new(&SHARES[1..]).join(name))?;
        let id = sys::mount_id(root.as_fd())?;
        let mount = table.read()?.into_iter().find(|mount| mount.id == id).ok_or(Errno::ENOENT)?;
        let guarded = Guarded { share: name.to_owned(), mount, root, protected, below: false };
        self.guarded.push(guarded);
        Ok(())
    }

    pub(crate) fn set(&mut self, name: &str, access: Access) {
        self.shares.insert(name.to_owned(), access);
    }

    /// Before the share's mounts go. The guest may remember their files.
    pub(crate) fn remove(&mut self, name: &str) {
        self.shares.remove(name);
        for guarded in self.guarded.extract_if(.., |guarded| guarded.share == name) {
            if !guarded.protected && !guarded.below {
                // Not while files are being written to.
                let _ = sys::protect(guarded.root.as_fd(), true);
            }
        }
    }

    /// Makes writable what somebody writes to, and protects the rest. What is open for writing stays
    /// writable until next time.
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
                // Written to just now; or not mounted any more.
                Err(Errno::EBUSY | Errno::EINVAL) if !writable => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Whether somebody writes through a mount that the server looks at.
    fn is_written(&self, mount: &Mount) -> bool {
        let Some((name, is_share)) = share(mount, SHARES) else { return false };
        let Some(access) = self.shares.get(name) else { return false };
        let guarded = self.guarded.iter().any(|guarded| guarded.mount.id == mount.id);
        writes(*access, !is_share) && (guarded || !mount.read_only)
    }
}
