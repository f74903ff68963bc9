//! The pod's user namespace: one for all of its containers (CRI UserNamespace, mode POD), created
//! with the first container that has one, and kept by a descriptor.
//!
//! Ownership: images are shown through an id-mapped mount; what the guest creates for a container
//! (writable layer, mount points, small volumes, pipes, terminals) is owned by the mapped ids.
#![allow(unsafe_code)] // fork

use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork, pipe};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use serde::{Deserialize, Serialize};

use super::helper::{self, Streams};
use crate::error::{Context, Error, Result};

pub(super) const VERB: &str = "@userns";

/// Maximum lines of a map; the kernel allows 340, the CRI one.
const MAX_RANGES: usize = 32;

/// Maps `count` ids from `inside` in the container to ids from `outside` in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

/// uid and gid map of a user namespace. Id 0 is mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    users: Vec<Range>,
    groups: Vec<Range>,
}

#[derive(Debug)]
pub struct UserNamespace {
    pub mapping: Mapping,
    fd: OwnedFd,
}

fn ranges(what: &'static str, given: Option<&Vec<LinuxIdMapping>>) -> Result<Vec<Range>> {
    let given = given.map(Vec::as_slice).unwrap_or_default();
    if given.is_empty() || given.len() > MAX_RANGES {
        let reason = format!("a user namespace needs 1 to {MAX_RANGES} ranges");
        return Err(Error::invalid(what, reason));
    }
    let ranges: Vec<Range> = given
        .iter()
        .map(|range| Range {
            inside: range.container_id(),
            outside: range.host_id(),
            count: range.size(),
        })
        .collect();
    let fits = |start: u32, count: u32| count != 0 && start.checked_add(count).is_some();
    if ranges
        .iter()
        .any(|range| !fits(range.inside, range.count) || !fits(range.outside, range.count))
    {
        return Err(Error::invalid(what, "a range is empty or exceeds the highest id"));
    }
    if outside(&ranges, 0).is_none() {
        return Err(Error::invalid(what, "id 0 of the container is not mapped"));
    }
    Ok(ranges)
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        id.checked_sub(range.inside).filter(|n| *n < range.count).map(|n| range.outside + n)
    })
}

fn text(ranges: &[Range]) -> String {
    let mut text = String::new();
    for Range { inside, outside, count } in ranges {
        let _ = writeln!(text, "{inside} {outside} {count}");
    }
    text
}

impl Mapping {
    /// None if the spec has no user namespace.
    pub fn of(linux: &Linux) -> Result<Option<Self>> {
        let wants_userns = linux
            .namespaces()
            .iter()
            .flatten()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
        if !wants_userns {
            return Ok(None);
        }
        Ok(Some(Self {
            users: ranges("oci_spec.linux.uidMappings", linux.uid_mappings().as_ref())?,
            groups: ranges("oci_spec.linux.gidMappings", linux.gid_mappings().as_ref())?,
        }))
    }

    /// The guest's uid and gid of a user of the container.
    pub fn outside(&self, uid: u32, gid: u32) -> Result<(u32, u32)> {
        match (outside(&self.users, uid), outside(&self.groups, gid)) {
            (Some(uid), Some(gid)) => Ok((uid, gid)),
            _ => Err(Error::invalid(
                "user",
                format!("{uid}:{gid} is not mapped in the pod's user namespace"),
            )),
        }
    }

    pub fn root(&self) -> (u32, u32) {
        // `of` has checked that id 0 is mapped.
        self.outside(0, 0).unwrap_or_default()
    }

    pub fn has_group(&self, gid: u32) -> bool {
        outside(&self.groups, gid).is_some()
    }
}

impl UserNamespace {
    /// Creates the namespace. `spawned` gets the pids of the processes used for it.
    pub async fn make(mapping: Mapping, spawned: impl Fn(i32)) -> Result<Self> {
        let job = Job { users: text(&mapping.users), groups: text(&mapping.groups) };
        let made = helper::run(VERB, job, Streams::null(), Vec::new(), &spawned).await?;
        spawned(made.pid);
        let what = || "keep the pod's user namespace".to_owned();
        let file = std::fs::File::open(format!("/proc/{}/ns/user", made.pid)).context(what);
        let _ = kill(Pid::from_raw(made.pid), Signal::SIGKILL);
        Ok(Self { mapping, fd: file?.into() })
    }

    /// Path of the namespace for other processes of the guest.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Content of uid_map and gid_map.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    users: String,
    groups: String,
}

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    let step = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let (ready_read, ready_write) = pipe().map_err(|error| step("pipe", &error))?;
    // SAFETY: this process has one thread, so the child may use all of its state.
    match unsafe { fork() }.map_err(|error| step("fork", &error))? {
        ForkResult::Child => {
            drop((start, ready_read));
            if unshare(CloneFlags::CLONE_NEWUSER).is_ok() {
                let _ = nix::unistd::write(&ready_write, b"x");
            }
            drop(ready_write);
            // SAFETY: nothing in this process uses a descriptor after this.
            unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
            loop {
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => {
            drop(ready_write);
            let mut byte = [0];
            let write = |file: &str, text: &str| {
                std::fs::write(format!("/proc/{child}/{file}"), text)
                    .map_err(|error| step(file, &error))
            };
            let result = match nix::unistd::read(&ready_read, &mut byte) {
                Ok(1) => write("uid_map", &job.users).and_then(|()| write("gid_map", &job.groups)),
                _ => Err("unshare(CLONE_NEWUSER) failed".to_owned()),
            };
            if result.is_err() {
                let _ = kill(child, Signal::SIGKILL);
            }
            result.map(|()| child.as_raw())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(json: &str) -> Result<Option<Mapping>> {
        Mapping::of(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn ids_are_mapped_by_ranges() {
        let json = r#"{"namespaces":[{"type":"user"}],
            "uidMappings":[{"containerID":0,"hostID":1000,"size":100}],
            "gidMappings":[{"containerID":0,"hostID":2000,"size":10}]}"#;
        let found = mapping(json).unwrap().unwrap();
        assert_eq!(found.root(), (1000, 2000));
        assert_eq!(found.outside(99, 9).unwrap(), (1099, 2009));
        assert!(found.outside(100, 0).is_err() && found.outside(0, 10).is_err());
        assert_eq!(text(&found.users), "0 1000 100\n");
        assert_eq!(mapping(r#"{"namespaces":[{"type":"pid"}]}"#).unwrap(), None);
    }

    #[test]
    fn invalid_maps_are_refused() {
        for (users, word) in [
            ("[]", "ranges"),
            (r#"[{"containerID":1,"hostID":1000,"size":100}]"#, "id 0"),
            (r#"[{"containerID":0,"hostID":1000,"size":0}]"#, "empty"),
            (r#"[{"containerID":0,"hostID":4294967295,"size":2}]"#, "exceeds"),
        ] {
            let json = format!(
                r#"{{"namespaces":[{{"type":"user"}}],"uidMappings":{users},"gidMappings":{users}}}"#
            );
            let error = mapping(&json).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
