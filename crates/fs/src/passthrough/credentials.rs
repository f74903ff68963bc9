//! Credentials of the calling thread: the ids of the guest's user while a file is created, and with
//! or without CAP_FSETID while a file is changed.
//!
//! A file is created with the caller's effective ids, so that owner, group, quota and default ACLs
//! are as on a local file system. The ids are per thread (raw system calls). Changing from root to
//! another user clears the effective capabilities; changing back restores all permitted ones.
//!
//! With CAP_FSETID set-id bits survive a change; each request of the guest says whether they may
//! (FUSE_HANDLE_KILLPRIV_V2). The capability is left as the last change needed it, so that a series
//! of equal changes needs no system calls.

use std::cell::Cell;
use std::io;

use super::calls;
use crate::{jail, sys};

const DAC_OVERRIDE: u32 = 1;
const FSETID: u32 = 4;

thread_local! {
    /// Whether CAP_FSETID is effective in this thread.
    static KEEPS_SET_ID: Cell<bool> = const { Cell::new(true) };
}

fn permitted() -> u64 {
    jail::mask(&jail::SERVER)
}

/// Sets whether set-id bits survive the following changes.
pub(super) fn keep_set_id(keep: bool) -> io::Result<()> {
    if KEEPS_SET_ID.get() == keep {
        return Ok(());
    }
    let effective = if keep { permitted() } else { permitted() & !(1 << FSETID) };
    sys::set_effective_capabilities(effective, permitted())?;
    KEEPS_SET_ID.set(keep);
    Ok(())
}

/// The guest's user that creates a file.
#[derive(Debug)]
pub(super) struct Caller<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups that matter for the new file; none in most requests.
    pub(super) groups: &'a [u32],
    /// The guest's kernel (before 6.3) does not send groups; it has checked the permission itself.
    pub(super) groups_unknown: bool,
}

/// Guard that restores root's credentials.
#[derive(Debug)]
#[must_use]
pub(super) struct CredentialsGuard {
    uid: bool,
    gid: bool,
    groups: bool,
}

impl Caller<'_> {
    /// Takes the credentials of this user until the guard is dropped. For root nothing is changed.
    pub(super) fn assume(&self) -> io::Result<CredentialsGuard> {
        let mut guard = CredentialsGuard { uid: false, gid: false, groups: false };
        if self.uid == 0 {
            keep_set_id(true)?;
        }
        if !self.groups.is_empty() {
            calls::set_groups(self.groups)?;
            guard.groups = true;
        }
        // The group first: CAP_SETGID is not effective any more after the change of the user.
        if self.gid != 0 {
            calls::set_effective_gid(self.gid)?;
            guard.gid = true;
        }
        if self.uid != 0 {
            calls::set_effective_uid(self.uid)?;
            guard.uid = true;
            if self.groups_unknown {
                sys::set_effective_capabilities(1 << DAC_OVERRIDE, permitted())?;
            }
        }
        Ok(guard)
    }
}

impl Drop for CredentialsGuard {
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
            // The next request would be handled with the wrong credentials.
            eprintln!("nacelle-fs: cannot restore root's credentials: {error}");
            std::process::exit(1);
        }
    }
}
