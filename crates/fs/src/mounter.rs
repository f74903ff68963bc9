//! The mounter: mounts and unmounts shares below /shares at the daemon's request.
//!
//! It processes no input of a guest: it creates and removes entries by names without a slash in a
//! tmpfs that the server cannot write to. It resolves paths into a share only to mounts that the
//! host has made there ([`crate::mirror`]).

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use vmm_api::shares::{Access, Error, Reply, Request, SHARES_MAX, VERSION_ACCESS, is_name};
use vmm_api::transport::{TransportError, receive, send};

use crate::jail::Entries;
use crate::mirror::Mirrors;
use crate::protect::Protection;
use crate::sys;

/// Most connections. The daemon makes one per call; further ones wait in the listener's backlog.
const CLIENTS_MAX: usize = 8;

/// The state of the mounter.
pub struct Mounter {
    entries: Entries,
    shares: BTreeSet<String>,
    mirrors: Mirrors,
    protection: Protection,
}

impl Mounter {
    pub fn new(entries: Entries) -> Self {
        Self {
            entries,
            shares: BTreeSet::new(),
            mirrors: Mirrors::default(),
            protection: Protection::default(),
        }
    }

    /// Handles a request.
    pub fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Reply {
        let done = match (request, <[OwnedFd; 1]>::try_from(fds)) {
            (Request::Add { name, access }, Ok([tree])) => self.add(name, access, &tree),
            (Request::Access { name, access }, Err(fds)) if fds.is_empty() => {
                self.set_access(&name, access)
            }
            (Request::Remove { name }, Err(fds)) if fds.is_empty() => self.remove(&name),
            (Request::List, Err(fds)) if fds.is_empty() => {
                let names = self.shares.iter().cloned().collect();
                return Reply::Shares { names, version: VERSION_ACCESS };
            }
            (Request::Add { .. }, Err(fds)) => Err(Error::Descriptors { got: fds.len(), want: 1 }),
            (_, Ok(_)) => Err(Error::Descriptors { got: 1, want: 0 }),
            (_, Err(fds)) => Err(Error::Descriptors { got: fds.len(), want: 0 }),
        };
        match done {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error(error),
        }
    }

    fn add(&mut self, name: String, access: Access, tree: &OwnedFd) -> Result<(), Error> {
        if !is_name(&name) {
            return Err(Error::Name { name });
        }
        if self.shares.contains(&name) {
            return Err(Error::Exists { name });
        }
        if self.shares.len() >= SHARES_MAX {
            return Err(Error::Full { limit: SHARES_MAX });
        }
        let failed = |what: &str, e: Errno| Error::Failed {
            message: format!("{what} {name}: {}", e.desc()),
        };
        let stat = fstat(tree).map_err(|e| failed("fstat", e))?;
        let folder = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => true,
            SFlag::S_IFREG => false,
            _ => return Err(Error::Kind { name }),
        };
        for entries in [&self.entries.shares, &self.entries.sources] {
            let mode = Mode::from_bits_truncate(0o755);
            let made = match folder {
                true => mkdirat(entries, name.as_str(), mode),
                false => mknodat(entries, name.as_str(), SFlag::S_IFREG, mode, 0),
            };
            if let Err(e) = made {
                self.drop_entries(&name)?;
                return Err(failed("create the mount point of", e));
            }
        }
        if let Err(e) = self.mount(&name, access, tree) {
            self.unmount(&name)?;
            return Err(failed("mount", e));
        }
        self.shares.insert(name);
        Ok(())
    }

    /// Mounts `tree` below /sources first, which the guest does not see: only then does the mount
    /// table show whether it follows the host's mounts.
    fn mount(&mut self, name: &str, access: Access, tree: &OwnedFd) -> nix::Result<()> {
        let place = |folder: &str| CString::new(format!("{folder}/{name}")).unwrap_or_default();
        let (table, mounted) = (&self.entries.table, &self.entries.mounted);
        sys::attach_mount(tree.as_fd(), &place(crate::SOURCES))?;
        self.protection.begin(mounted, name, access, tree)?;
        if Mirrors::follows(mounted, name)? {
            self.mirrors.add(table, name)?;
            self.protection.copied(mounted, name)?;
        } else {
            sys::attach_mount(tree.as_fd(), &place(crate::SHARES))?;
        }
        self.protection.update(mounted)
    }

    fn set_access(&mut self, name: &str, access: Access) -> Result<(), Error> {
        if !self.shares.contains(name) {
            return Err(Error::NoSuchShare { name: name.to_owned() });
        }
        self.protection.set(name, access);
        self.protection.update(&self.entries.mounted).map_err(|e| Error::Failed {
            message: format!("change the write protection of {name}: {}", e.desc()),
        })
    }

    fn remove(&mut self, name: &str) -> Result<(), Error> {
        if !self.shares.contains(name) {
            return Err(Error::NoSuchShare { name: name.to_owned() });
        }
        self.unmount(name)?;
        self.shares.remove(name);
        if let Err(error) = self.protection.update(&self.entries.mounted) {
            log::error!("write protection after removal of {name}: {}", error.desc());
        }
        Ok(())
    }

    /// Idempotent.
    fn unmount(&mut self, name: &str) -> Result<(), Error> {
        self.protection.remove(name);
        self.mirrors.remove(name);
        for folder in [crate::SHARES, crate::SOURCES] {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            // Several mounts may be stacked there.
            loop {
                match umount2(format!("{folder}/{name}").as_str(), flags) {
                    Ok(()) => {}
                    Err(Errno::EINVAL | Errno::ENOENT) => break,
                    Err(e) => {
                        let message = format!("unmount {name}: {}", e.desc());
                        return Err(Error::Failed { message });
                    }
                }
            }
        }
        self.drop_entries(name)
    }

    fn drop_entries(&self, name: &str) -> Result<(), Error> {
        for entries in [&self.entries.shares, &self.entries.sources] {
            let result = match unlinkat(entries, name, UnlinkatFlags::RemoveDir) {
                Err(Errno::ENOTDIR) => unlinkat(entries, name, UnlinkatFlags::NoRemoveDir),
                other => other,
            };
            match result {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(e) => {
                    return Err(Error::Failed { message: format!("remove {name}: {}", e.desc()) });
                }
            }
        }
        Ok(())
    }

    /// Serves the control socket and follows the host's mounts until the server process exits.
    pub fn run(mut self, listener: OwnedFd, server: OwnedFd) -> nix::Result<()> {
        let mut clients: Vec<OwnedFd> = Vec::new();
        loop {
            let room = clients.len() < CLIENTS_MAX;
            let mut waiting = vec![
                PollFd::new(server.as_fd(), PollFlags::POLLIN),
                PollFd::new(
                    listener.as_fd(),
                    if room { PollFlags::POLLIN } else { PollFlags::empty() },
                ),
            ];
            waiting.push(PollFd::new(self.entries.table.as_fd(), PollFlags::POLLPRI));
            waiting.extend(clients.iter().map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
            match poll(&mut waiting, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
            let ready: Vec<bool> = waiting.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0] {
                return Ok(());
            }
            let mut number = 3;
            if ready[2] {
                let followed = self.mirrors.update(&self.entries.table);
                let mut protected = || self.protection.update(&self.entries.mounted);
                if let Err(error) = followed.and_then(|()| protected()) {
                    log::error!(
                        "the host's mounts below shares cannot be updated: {}",
                        error.desc()
                    );
                }
            }
            clients.retain(|client| {
                let stays = !ready[number] || self.answer(client);
                number += 1;
                stays
            });
            if ready[1] {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                if let Ok(client) = accept4(listener.as_raw_fd(), flags) {
                    clients.push(own(client));
                }
            }
        }
    }

    /// Answers one request; `false` when the client is to be disconnected.
    fn answer(&mut self, client: &OwnedFd) -> bool {
        let reply = match receive::<Request>(client.as_fd()) {
            Ok((request, fds)) => self.handle(request, fds),
            Err(TransportError::Socket(Errno::EAGAIN | Errno::EINTR)) => return true,
            Err(TransportError::Closed | TransportError::Socket(_)) => return false,
            Err(error) => Reply::Error(Error::Failed { message: error.to_string() }),
        };
        send(client.as_fd(), &reply, &[]).is_ok()
    }
}

#[allow(unsafe_code)] // accept4 returns a plain number
fn own(fd: i32) -> OwnedFd {
    // SAFETY: accept4 has just returned this file descriptor; nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
