//! Helper `create`: creates a container with libcontainer; its init process waits on libcontainer's
//! notify socket until `Bundle::start`.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::capabilities;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{LinuxCapabilities, PosixRlimit, Spec};
use serde::{Deserialize, Serialize};

use super::command::{self, Failure};
use super::helper::{self, Spawned, Streams};
use super::seccomp::Filter;
use crate::error::{Context, Result};

pub(super) const VERB: &str = "@create";

/// File of a bundle with a [`Confinement`].
const CONFINEMENT: &str = "confinement.json";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// Container id for libcontainer; short, as the path of a socket contains it.
    name: String,
    /// libcontainer's root directory, with one directory for each container.
    state: PathBuf,
    /// Bundle directory: `config.json` and optionally [`CONFINEMENT`].
    bundle: PathBuf,
    console: Option<PathBuf>,
    /// Set before anything else.
    rlimits: Vec<PosixRlimit>,
}

/// Location of a container's OCI bundle and of libcontainer's state.
#[derive(Debug, Clone)]
pub struct Bundle {
    name: String,
    state: PathBuf,
    dir: PathBuf,
}

impl Bundle {
    /// Creates the directory and writes `config.json`. `filter` is that of the spec's seccomp profile.
    pub fn new(base: &Path, number: u64, mut spec: Spec, filter: Option<Filter>) -> Result<Self> {
        let name = format!("c{number}");
        let dir = base.join("bundles").join(&name);
        let state = base.join("state");
        let what = || format!("write bundle {}", dir.display());
        std::fs::create_dir_all(&state).context(what)?;
        std::fs::create_dir_all(&dir).context(what)?;
        if let Some(confinement) = filter.and_then(|own| Confinement::take(&mut spec, own)) {
            let text =
                serde_json::to_vec(&confinement).map_err(std::io::Error::from).context(what)?;
            std::fs::write(dir.join(CONFINEMENT), text).context(what)?;
        }
        let text = serde_json::to_vec(&spec).map_err(std::io::Error::from).context(what)?;
        std::fs::write(dir.join("config.json"), text).context(what)?;
        Ok(Self { name, state, dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Creates the container's init process. `inherit` are descriptors that the spec's paths refer to.
    pub async fn create(
        &self,
        streams: Streams,
        console: Option<PathBuf>,
        rlimits: Vec<PosixRlimit>,
        inherit: Vec<OwnedFd>,
        spawned: impl FnOnce(i32),
    ) -> Result<Spawned> {
        let job = Job {
            name: self.name.clone(),
            state: self.state.clone(),
            bundle: self.dir.clone(),
            console,
            rlimits,
        };
        helper::run(VERB, job, streams, inherit, spawned).await
    }

    /// Notifies the init process to execute its program.
    pub fn start(&self) -> Result<()> {
        let socket = self.state.join(&self.name).join("notify.sock");
        let what = || "send the start notification to init".to_owned();
        let mut stream = UnixStream::connect(socket).context(what)?;
        stream.write_all(b"start container").context(what)
    }

    /// Removes both directories; continues after a failure.
    pub fn remove(&self) {
        for dir in [&self.state.join(&self.name), &self.dir] {
            if let Err(error) = std::fs::remove_dir_all(dir)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %dir.display(), %error, "cannot remove a bundle");
            }
        }
    }
}

/// The seccomp filter, which is loaded here instead of by libcontainer, and what has to follow it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Confinement {
    filter: Filter,
    /// Capabilities to drop after the filter: without no_new_privs, loading needs CAP_SYS_ADMIN.
    capabilities: Option<LinuxCapabilities>,
    /// With no_new_privs the filter is loaded directly before execve, so it need not allow earlier
    /// steps such as the wait for the start.
    late: bool,
}

impl Confinement {
    /// Takes the profile of `filter` out of the OCI spec.
    fn take(spec: &mut Spec, filter: Filter) -> Option<Self> {
        spec.linux_mut().as_mut()?.seccomp_mut().take()?;
        let process = spec.process_mut().as_mut()?;
        let late = process.no_new_privileges() == Some(true);
        let capabilities = process.capabilities().clone().filter(|_| !late);
        if !late {
            process.set_capabilities(None);
        }
        Some(Self { filter, capabilities, late })
    }

    fn read(bundle: &Path) -> std::result::Result<Option<Self>, String> {
        match std::fs::read(bundle.join(CONFINEMENT)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Loads the filter, then drops capabilities, in the order of runc.
    fn enter(&self) -> std::result::Result<(), String> {
        self.filter.load()?;
        match &self.capabilities {
            Some(kept) => capabilities::drop_privileges(kept, &*create_syscall())
                .map_err(|error| format!("capabilities: {error}")),
            None => Ok(()),
        }
    }
}

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    let syscall = create_syscall();
    for rlimit in &job.rlimits {
        syscall.set_rlimit(rlimit).map_err(|error| format!("rlimit: {error}"))?;
    }
    let confinement =
        Confinement::read(&job.bundle).map_err(|error| format!("{CONFINEMENT}: {error}"))?;
    let executor = Program { start: Arc::new(start), confinement };
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

/// Executes the container's program after the start notification.
#[derive(Clone)]
struct Program {
    start: Arc<OwnedFd>,
    confinement: Option<Confinement>,
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> std::result::Result<(), ExecutorError> {
        match spec.process() {
            Some(process) => {
                let late = self.confinement.as_ref().filter(|own| own.late);
                command::execute(process, late.map(|own| &own.filter), &self.start)
            }
            None => command::fail(
                &self.start,
                &Failure { missing: true, message: "no process given".to_owned() },
            ),
        }
    }

    /// Called by libcontainer after all setup, before init reports that it is created: the last
    /// step with more capabilities than the program. A missing program is not an error here;
    /// StartContainer reports it, as runc does.
    fn validate(&self, _: &Spec) -> std::result::Result<(), ExecutorValidationError> {
        match self.confinement.as_ref().filter(|own| !own.late) {
            Some(own) => own.enter().map_err(ExecutorValidationError::ArgValidationError),
            None => Ok(()),
        }
    }

    /// Not used: `command` passes the environment to execve(2).
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
    fn capabilities_needed_to_load_the_filter_are_taken_out_with_it() {
        for (privileges, late) in [(r#","noNewPrivileges":true"#, true), ("", false)] {
            let json = format!(
                r#"{{"ociVersion":"1.0.2",
                    "process":{{"cwd":"/","user":{{"uid":0,"gid":0}},
                    "capabilities":{{"bounding":["CAP_CHOWN"]}}{privileges}}},
                    "linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ERRNO"}}}}}}"#
            );
            let mut spec: Spec = serde_json::from_str(&json).unwrap();
            let profile = spec.linux().as_ref().unwrap().seccomp().clone().unwrap();
            let filter = Filter::compile(&profile).unwrap();
            let taken = Confinement::take(&mut spec, filter.clone()).unwrap();
            assert_eq!((taken.late, taken.capabilities.is_none()), (late, late));
            assert!(spec.linux().as_ref().unwrap().seccomp().is_none());
            let left = spec.process().as_ref().unwrap().capabilities();
            assert_eq!(
                left.is_some(),
                late,
                "libcontainer drops the capabilities left in the spec"
            );
            assert_eq!(Confinement::take(&mut spec, filter), None);
        }
    }
}
