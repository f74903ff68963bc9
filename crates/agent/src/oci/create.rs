//! Helper `create`: builds a container with libcontainer; its init waits on libcontainer's notify
//! socket until `start` writes to it.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{PosixRlimit, Spec};
use serde::{Deserialize, Serialize};

use super::command::{self, Failure};
use super::helper::{self, Made, Streams};
use crate::error::{Doing, Result};

pub(super) const VERB: &str = "@create";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// libcontainer's name of the container; short, as a socket's path is made of it.
    name: String,
    /// Folder that holds libcontainer's state, one folder a container.
    state: PathBuf,
    /// Folder that holds `config.json`.
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
    pub fn new(base: &Path, number: u64, spec: &Spec) -> Result<Self> {
        let name = format!("c{number}");
        let dir = base.join("bundles").join(&name);
        let state = base.join("state");
        let what = || format!("write bundle {}", dir.display());
        std::fs::create_dir_all(&state).doing(what)?;
        std::fs::create_dir_all(&dir).doing(what)?;
        let text = serde_json::to_vec(spec).map_err(std::io::Error::from).doing(what)?;
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

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    let syscall = create_syscall();
    for rlimit in &job.rlimits {
        syscall.set_rlimit(rlimit).map_err(|error| format!("rlimit: {error}"))?;
    }
    let executor = Program { start: Arc::new(start) };
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
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> std::result::Result<(), ExecutorError> {
        match spec.process() {
            Some(process) => command::execute(process, &self.start),
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
