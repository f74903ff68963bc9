//! Changes of attributes (FUSE_SETATTR), and extended attributes.
//!
//! POSIX ACLs are hidden from the guest: its kernel would show them, but not apply them.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmodat, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, ftruncate};
use virtiofsd::filesystem::{GetxattrReply, ListxattrReply, SetattrValid};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::soft_idmap::Id;

use super::credentials::keep_set_id;
use super::handles::Handle;
use super::node::Node;
use super::stat::Stat;
use super::{Passthrough, calls, own_path};

/// Longest value and list, bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const XATTR_MAX: u32 = 64 << 10;

impl Passthrough {
    pub(super) fn set_attributes(
        &self,
        node: &Arc<Node>,
        attr: &SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<Stat> {
        let handle = handle.map(|handle| self.handles.get(node.id, handle)).transpose()?;
        let fd = self.descriptors.get(node)?;
        if valid.contains(SetattrValid::MODE) {
            keep_set_id(true)?;
            let mode = Mode::from_bits_truncate(attr.mode);
            fchmodat(&self.own, &*own_path(&fd), mode, FchmodatFlags::FollowSymlink)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let (uid, gid) = (attr.uid.into_inner(), attr.gid.into_inner());
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(uid));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(gid));
            fchownat(&*fd, c"", uid, gid, AtFlags::AT_EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            keep_set_id(!valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.set_size(node, &fd, handle.as_deref(), attr.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let atime = time(
                valid.contains(SetattrValid::ATIME),
                valid.contains(SetattrValid::ATIME_NOW),
                (attr.atime, attr.atimensec),
            );
            let mtime = time(
                valid.contains(SetattrValid::MTIME),
                valid.contains(SetattrValid::MTIME_NOW),
                (attr.mtime, attr.mtimensec),
            );
            match &handle {
                Some(handle) => futimens(&handle.file, &atime, &mtime)?,
                None => {
                    let flags = UtimensatFlags::FollowSymlink;
                    utimensat(&self.own, &*own_path(&fd), &atime, &mtime, flags)?;
                }
            }
        }
        calls::stat_of(fd.as_fd())
    }

    fn set_size(
        &self,
        node: &Node,
        fd: &OwnedFd,
        handle: Option<&Handle>,
        size: u64,
    ) -> io::Result<()> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let size = i64::try_from(size).map_err(invalid)?;
        if !node.is_regular() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let opened: File;
        let file = match handle {
            Some(handle) => &handle.file,
            None => {
                opened = self.reopen(fd, libc::O_WRONLY | libc::O_NONBLOCK)?;
                &opened
            }
        };
        Ok(ftruncate(file, size)?)
    }

    pub(super) fn get_xattr(
        &self,
        node: &Arc<Node>,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        allowed(name)?;
        let fd = self.descriptors.get(node)?;
        let mut value = vec![0; size.min(XATTR_MAX) as usize];
        let got = calls::get_xattr(&own_path(&fd), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(got as u32));
        }
        value.truncate(got);
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn list_xattrs(&self, node: &Arc<Node>, size: u32) -> io::Result<ListxattrReply> {
        let fd = self.descriptors.get(node)?;
        let mut names = vec![0; size.min(XATTR_MAX) as usize];
        let got = calls::list_xattrs(&own_path(&fd), &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(got as u32));
        }
        names.truncate(got);
        let shown = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| allowed(name).is_ok()));
        Ok(ListxattrReply::Names(shown.flatten().copied().collect()))
    }

    pub(super) fn set_xattr(
        &self,
        node: &Arc<Node>,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        allowed(name)?;
        let fd = self.descriptors.get(node)?;
        calls::set_xattr(&own_path(&fd), name, value, flags as i32)
    }

    pub(super) fn remove_xattr(&self, node: &Arc<Node>, name: &CStr) -> io::Result<()> {
        allowed(name)?;
        let fd = self.descriptors.get(node)?;
        calls::remove_xattr(&own_path(&fd), name)
    }
}

fn allowed(name: &CStr) -> io::Result<()> {
    let acls: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
    if acls.contains(&name.to_bytes()) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(())
}

fn time(set: bool, now: bool, (seconds, nanos): (u64, u32)) -> TimeSpec {
    match (set, now) {
        (_, true) => TimeSpec::UTIME_NOW,
        (true, false) => TimeSpec::new(seconds as i64, i64::from(nanos)),
        (false, false) => TimeSpec::UTIME_OMIT,
    }
}
