//! Helper `create`: builds a container with libcontainer; its init waits on libcontainer's notify
//! socket until `start` writes to it.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::seccomp::is_notify;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{LinuxSeccomp, PosixRlimit, Spec};
use serde::{Deserialize, Serialize};

use super::command::{self, Failure};
use super::helper::{self, Made, Streams};
use crate::error::{Doing, Result};

pub(super) const VERB: &str = "@create";

/// File of a bundle with the seccomp filter that is loaded last.
const FILTER: &str = "seccomp.json";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// libcontainer's name of the container; short, as a socket's path is made of it.
    name: String,
    /// Folder that holds libcontainer's state, one folder a container.
    state: PathBuf,
    /// Folder that holds `config.json` and maybe [`FILTER`].
    bundle: PathBuf,
    console: Option<PathBuf>,
    /// Taken on before anything else.
    rlimits: Vec<PosixRlimit>,
}

/// Where a container's files for libcontainer are.
#[derive(Debug, Clone)]
pub struct Bundle {
    name: String,
    state: PathBuf,
    dir: PathBuf,
}

impl Bundle {
    /// Makes the folder and writes the specification.
    pub fn new(base: &Path, number: u64, mut spec: Spec) -> Result<Self> {
        let name = format!("c{number}");
        let dir = base.join("bundles").join(&name);
        let state = base.join("state");
        let what = || format!("write bundle {}", dir.display());
        std::fs::create_dir_all(&state).doing(what)?;
        std::fs::create_dir_all(&dir).doing(what)?;
        if let Some(filter) = take_filter(&mut spec) {
            let text = serde_json::to_vec(&filter).map_err(std::io::Error::from).doing(what)?;
            std::fs::write(dir.join(FILTER), text).doing(what)?;
        }
        let text = serde_json::to_vec(&spec).map_err(std::io::Error::from).doing(what)?;
        std::fs::write(dir.join("config.json"), text).doing(what)?;
        Ok(Self { name, state, dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the container's init process.
    pub async fn create(
        &self,
        streams: Streams,
        console: Option<PathBuf>,
        rlimits: Vec<PosixRlimit>,
        spawned: impl FnOnce(i32),
    ) -> Result<Made> {
        let job = Job {
            name: self.name.clone(),
            state: self.state.clone(),
            bundle: self.dir.clone(),
            console,
            rlimits,
        };
        helper::run(VERB, job, streams, None, spawned).await
    }

    /// Lets the init process run its program.
    pub fn start(&self) -> Result<()> {
        let socket = self.state.join(&self.name).join("notify.sock");
        let what = || "tell the container's init process to start".to_owned();
        let mut stream = UnixStream::connect(socket).doing(what)?;
        stream.write_all(b"start container").doing(what)
    }

    /// Removes both folders; goes on past failures.
    pub fn remove(&self) {
        for dir in [&self.state.join(&self.name), &self.dir] {
            if let Err(error) = std::fs::remove_dir_all(dir)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %dir.display(), %error, "left behind");
            }
        }
    }
}

/// Takes out the filter of a process with no_new_privs, which may load one at any time.
/// libcontainer would do so before it waits for the start, and a filter need not allow what that
/// takes. It stays there if somebody is to be told of system calls.
fn take_filter(spec: &mut Spec) -> Option<LinuxSeccomp> {
    if spec.process().as_ref()?.no_new_privileges() != Some(true) {
        return None;
    }
    let linux = spec.linux_mut().as_mut()?;
    if linux.seccomp().as_ref().is_some_and(is_notify) {
        return None;
    }
    linux.seccomp_mut().take()
}

fn read_filter(bundle: &Path) -> std::result::Result<Option<LinuxSeccomp>, String> {
    match std::fs::read(bundle.join(FILTER)) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    let syscall = create_syscall();
    for rlimit in &job.rlimits {
        syscall.set_rlimit(rlimit).map_err(|error| format!("rlimit: {error}"))?;
    }
    let filter = read_filter(&job.bundle).map_err(|error| format!("{FILTER}: {error}"))?;
    let executor = Program { start: Arc::new(start), filter };
    let build = || {
        let container = ContainerBuilder::new(job.name, SyscallType::default())
            .with_executor(executor)
            .with_root_path(job.state)?
            .with_console_socket(job.console)
            .validate_id()?
            .as_init(job.bundle)
            .with_systemd(false)
            .with_detach(true)
            .build()?;
        Ok::<_, libcontainer::error::LibcontainerError>(container.pid())
    };
    match build() {
        Ok(Some(pid)) => Ok(pid.as_raw()),
        Ok(None) => Err("the container has no process".to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // Transparent errors repeat their source.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}

/// Runs the container's program when it is started.
#[derive(Clone)]
struct Program {
    start: Arc<OwnedFd>,
    filter: Option<LinuxSeccomp>,
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> std::result::Result<(), ExecutorError> {
        match spec.process() {
            Some(process) => command::execute(process, self.filter.as_ref(), &self.start),
            None => command::fail(
                &self.start,
                &Failure { missing: true, message: "no process given".to_owned() },
            ),
        }
    }

    /// Nothing here: a missing program is reported by StartContainer, as callers expect.
    fn validate(&self, _: &Spec) -> std::result::Result<(), ExecutorValidationError> {
        Ok(())
    }

    /// Nothing here: `command` passes the environment to execve(2) itself.
    fn setup_envs(
        &self,
        _: HashMap<String, String>,
    ) -> std::result::Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_taken_from_processes_without_new_privileges_only() {
        for (privileges, action, taken) in [
            (r#","noNewPrivileges":true"#, "SCMP_ACT_ERRNO", true),
            (r#","noNewPrivileges":true"#, "SCMP_ACT_NOTIFY", false),
            ("", "SCMP_ACT_ERRNO", false),
        ] {
            let json = format!(
                r#"{{"ociVersion":"1.0.2",
                    "process":{{"cwd":"/","user":{{"uid":0,"gid":0}}{privileges}}},
                    "linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                    {{"names":["mkdir"],"action":"{action}"}}]}}}}}}"#
            );
            let mut spec: Spec = serde_json::from_str(&json).unwrap();
            let left = |spec: &Spec| spec.linux().as_ref().unwrap().seccomp().is_some();
            assert!(left(&spec));
            assert_eq!(take_filter(&mut spec).is_some(), taken, "{privileges} {action}");
            assert_eq!(left(&spec), !taken);
        }
    }
}
