//! Containers and the requests on them, one request per file.

pub mod create;
pub mod exec;
pub mod freeze;
pub mod images;
mod mounted_images;
mod mounting;
mod namespaces;
pub mod oom;
mod oom_watch;
pub mod process;
pub mod remove;
pub mod rootfs;
mod shares;
pub mod signal;
pub mod start;
pub mod stats;
mod streams;
pub mod update;
pub mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::Process as OciProcess;

use crate::oci::cgroup::Cgroup;
use crate::oci::create::Bundle;
use crate::oci::helper::StartPipe;
use crate::oci::seccomp::Filter;
use crate::oci::userns::UserNamespace;
use crate::reaper::ExitStatus;
use process::Process;
use rootfs::Rootfs;
use volumes::StagedVolumes;

/// Resources of a container; removed in reverse order, also after an incomplete creation.
#[derive(Debug, Default)]
pub struct Parts {
    pub rootfs: Option<Rootfs>,
    pub volumes: Option<StagedVolumes>,
    pub cgroup: Option<Cgroup>,
    pub bundle: Option<Bundle>,
}

#[derive(Debug)]
pub struct Container {
    pub init: Process,
    pub execs: BTreeMap<String, Process>,
    pub parts: Parts,
    /// Reports whether the program was executed; taken by StartContainer.
    pub start: Option<StartPipe>,
    /// The completed process of the OCI spec; defaults of execs.
    pub process: OciProcess,
    pub seccomp: Option<Filter>,
    pub userns: Option<Arc<UserNamespace>>,
    /// OOM kills that were reported.
    pub oom_kills: u64,
    /// Read while an exec starts, written while the container is paused: a helper that has joined the
    /// cgroup would be frozen, and its program would start unnoticed after the thaw.
    pub starts: Arc<tokio::sync::RwLock<()>>,
}

impl Container {
    fn oom_kills_now(&self) -> u64 {
        self.parts.cgroup.as_ref().map_or(0, Cgroup::oom_kills)
    }

    /// An event if there were OOM kills since the last call.
    pub fn take_oom(&mut self, id: &str) -> Option<v1::Oom> {
        let now = self.oom_kills_now();
        if now <= self.oom_kills {
            return None;
        }
        self.oom_kills = now;
        Some(v1::Oom { container_id: id.to_owned() })
    }

    /// Records the exit of a process. After the exit of init all other processes are killed.
    pub fn process_exited(
        &mut self,
        id: &str,
        exec_id: &str,
        status: ExitStatus,
    ) -> Option<v1::Exit> {
        let kills = self.oom_kills;
        if !exec_id.is_empty() {
            let process = self.execs.get_mut(exec_id)?;
            let oom = kills > process.oom_kills_before && status.is_sigkill();
            return Some(process.set_stopped(id, exec_id, status, oom));
        }
        // The kernel does this in a PID namespace of its own, but not in a shared one.
        if let Some(cgroup) = &self.parts.cgroup
            && let Err(error) = cgroup.kill()
        {
            tracing::error!(container = id, error = %error.chain(), "cannot kill the cgroup");
        }
        self.start = None;
        Some(self.init.set_stopped(id, "", status, kills > 0))
    }
}
