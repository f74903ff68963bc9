//! Containers and what can be done with them, one verb a file.

pub mod create;
pub mod exec;
pub mod images;
mod namespaces;
pub mod oom;
pub mod process;
pub mod remove;
pub mod rootfs;
pub mod signal;
pub mod start;
pub mod stats;
mod streams;
pub mod update;
pub mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::{LinuxSeccomp, Process as OciProcess};

use crate::oci::cgroup::Cgroup;
use crate::oci::create::Bundle;
use crate::oci::helper::StartPipe;
use crate::oci::userns::UserNamespace;
use crate::reaper::Ended;
use process::Process;
use rootfs::Rootfs;
use volumes::Staged;

/// What a container stands on; taken down in reverse, also when only some of it was built.
#[derive(Debug, Default)]
pub struct Parts {
    pub rootfs: Option<Rootfs>,
    pub volumes: Option<Staged>,
    pub cgroup: Option<Cgroup>,
    pub bundle: Option<Bundle>,
}

#[derive(Debug)]
pub struct Container {
    pub init: Process,
    pub execs: BTreeMap<String, Process>,
    pub parts: Parts,
    /// Tells whether the program runs; taken by the first StartContainer.
    pub start: Option<StartPipe>,
    /// As completed; execs take from it what they do not say themselves.
    pub process: OciProcess,
    pub seccomp: Option<LinuxSeccomp>,
    pub userns: Option<Arc<UserNamespace>>,
    /// OOM kills that were told.
    pub oom_kills: u64,
}

impl Container {
    fn oom_kills_now(&self) -> u64 {
        self.parts.cgroup.as_ref().map_or(0, Cgroup::oom_kills)
    }

    /// An event if there were OOM kills since the last look.
    pub fn new_oom(&mut self, id: &str) -> Option<v1::Oom> {
        let now = self.oom_kills_now();
        if now <= self.oom_kills {
            return None;
        }
        self.oom_kills = now;
        Some(v1::Oom { container_id: id.to_owned() })
    }

    /// Records the end of a process; after init's, everything else in the container is killed.
    pub fn process_ended(&mut self, id: &str, exec_id: &str, status: Ended) -> Option<v1::Exit> {
        let kills = self.oom_kills;
        if !exec_id.is_empty() {
            let process = self.execs.get_mut(exec_id)?;
            let oom = kills > process.oom_kills_before && status.by_kill();
            return Some(process.ended(id, exec_id, status, oom));
        }
        // Its own PID namespace would see to it, a shared one does not.
        if let Some(cgroup) = &self.parts.cgroup
            && let Err(error) = cgroup.kill()
        {
            tracing::error!(container = id, error = %error.chain(), "cannot kill the rest");
        }
        self.start = None;
        Some(self.init.ended(id, "", status, kills > 0))
    }
}
