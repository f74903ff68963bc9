//! On whose behalf the calling thread acts: as the guest's user while something is made, and with or
//! without CAP_FSETID while something is changed.
//!
//! A file is made with the caller's effective ids, so that owner, group, quota and default ACLs come
//! out as on a local file system. The ids are those of the thread alone (raw system calls). Going
//! away from root takes the effective capabilities, coming back restores all permitted ones.
//!
//! With CAP_FSETID set-id bits survive a change; the guest says for each change whether its process
//! may keep them (FUSE_HANDLE_KILLPRIV_V2). The capability stays as the last change wanted it, so
//! that a series of changes by the same kind of user costs no system calls.

use std::cell::Cell;
use std::io;

use super::calls;
use crate::{jail, sys};

const DAC_OVERRIDE: u32 = 1;
const FSETID: u32 = 4;

thread_local! {
    /// Whether this thread has CAP_FSETID in effect.
    static KEEPS_SET_ID: Cell<bool> = const { Cell::new(true) };
}

fn permitted() -> u64 {
    jail::mask(&jail::SERVER)
}

/// Makes set-id bits survive the changes that follow, or go.
pub(super) fn keep_set_id(keep: bool) -> io::Result<()> {
    if KEEPS_SET_ID.get() == keep {
        return Ok(());
    }
    let effective = if keep { permitted() } else { permitted() & !(1 << FSETID) };
    sys::set_effective_capabilities(effective, permitted())?;
    KEEPS_SET_ID.set(keep);
    Ok(())
}

/// Who makes something.
#[derive(Debug)]
pub(super) struct Caller<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups that count for what is made; none in most requests.
    pub(super) groups: &'a [u32],
    /// The guest's kernel (before 6.3) cannot tell the groups: it has checked the permission.
    pub(super) groups_unknown: bool,
}

/// Ends acting as somebody else.
#[derive(Debug)]
#[must_use]
pub(super) struct Acting {
    uid: bool,
    gid: bool,
    groups: bool,
}

impl Caller<'_> {
    /// Acts as this user until the guard is dropped. Root stays what the server is.
    pub(super) fn act(&self) -> io::Result<Acting> {
        let mut acting = Acting { uid: false, gid: false, groups: false };
        if self.uid == 0 {
            keep_set_id(true)?;
        }
        if !self.groups.is_empty() {
            calls::set_groups(self.groups)?;
            acting.groups = true;
        }
        // The group first: the right to change it goes with the user.
        if self.gid != 0 {
            calls::set_effective_gid(self.gid)?;
            acting.gid = true;
        }
        if self.uid != 0 {
            calls::set_effective_uid(self.uid)?;
            acting.uid = true;
            if self.groups_unknown {
                sys::set_effective_capabilities(1 << DAC_OVERRIDE, permitted())?;
            }
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let mut restored = Ok(());
        if self.uid {
            restored = calls::set_effective_uid(0);
            KEEPS_SET_ID.set(true);
        }
        if self.gid {
            restored = restored.and(calls::set_effective_gid(0));
        }
        if self.groups {
            restored = restored.and(calls::set_groups(&[]));
        }
        if let Err(error) = restored {
            // The next request would be served with the wrong rights.
            eprintln!("nacelle-fs: cannot become root again: {error}");
            std::process::exit(1);
        }
    }
}
