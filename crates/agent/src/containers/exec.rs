//! Exec: starts a further process in a running container.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use oci_spec::runtime::Process as OciProcess;
use serde_json::{Map, Value};
use tokio::sync::OwnedRwLockReadGuard;

use super::Container;
use super::process::{Process, Status};
use super::streams::{self, Ends};
use crate::agent::{Agent, Owner};
use crate::blocking::LOOKUP_TIMEOUT;
use crate::error::{Context, Error, Result};
use crate::guest::inroot::Root;
use crate::oci::exec::{self, Program, Target};
use crate::oci::helper::{Spawned, Streams};
use crate::oci::pidfd;
use crate::oci::spec::{Groups, complete_process};
use crate::oci::user::Database;
use crate::stdio::pty;

/// Maximum execs of one container, including exited ones that were not collected: each may hold a
/// window of output.
const MAX_EXECS: usize = 512;

/// Time in which the death of an init process is reaped.
const INIT_EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// Returns the pid.
pub async fn exec(agent: &Arc<Agent>, request: v1::ExecRequest) -> Result<i32> {
    crate::ids::check("exec_id", &request.exec_id)?;
    agent.remove_collected_execs();
    let (target, userns, base, seccomp, hostname, number) = {
        let mut state = agent.lock();
        let number = state.allocate_number();
        let full = state.events.is_full();
        let hostname = state.pod.as_ref().map(|pod| pod.hostname.clone()).unwrap_or_default();
        let container = state.container(&request.container_id)?;
        if container.init.status != Status::Running {
            return Err(not_running_error(&request.container_id));
        }
        if container.execs.contains_key(&request.exec_id) {
            return Err(Error::Exists { what: "exec", id: request.exec_id });
        }
        if full || container.execs.len() >= MAX_EXECS {
            return Err(Error::Exhausted {
                what: "execs whose exits were not collected",
                limit: MAX_EXECS as u64,
            });
        }
        let Some(cgroup) = &container.parts.cgroup else {
            return Err(Error::Precondition("the container is being removed".to_owned()));
        };
        check_not_paused(container)?;
        let base = container.process.clone();
        let userns = container.userns.clone();
        // The pid cannot have been reused while the lock is held: children are reaped under it.
        let pid = container.init.pid;
        let init = pidfd(pid).context(|| format!("open process {pid}"))?;
        let proc = open_proc_dir(pid)?;
        let target = Target { init, proc, cgroup: cgroup.dir(), userns: userns.is_some() };
        (target, userns, base, container.seccomp.clone(), hostname, number)
    };
    // Without a user the exec runs as the container's user, whose groups and home are known.
    let users = if request.user.is_empty() {
        Database::default()
    } else {
        let pool = agent.pools.for_container(&request.container_id);
        let proc = target.proc.try_clone().context(|| "duplicate a descriptor".to_owned())?;
        tokio::select! {
            users = pool.run("read the user database in /etc", LOOKUP_TIMEOUT, move || {
                Ok(read_users(&proc))
            }) => {
                users?
            }
            () = wait_for_init_exit(agent, &request.container_id) => return Err(not_running_error(&request.container_id)),
        }
    };
    let mut process = merge(&base, &request.oci_process)?;
    process.set_terminal(Some(request.tty));
    // The container's own groups are already merged.
    let groups = if request.user.is_empty() { Groups::Given } else { Groups::Merged };
    complete_process(&mut process, &users, &request.user, groups, &hostname)?;
    let owner = super::create::owner(&process, userns.as_deref())?;
    let program = Program { process, seccomp };

    let (child_stdio, ends, sockets) = if request.tty {
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .context(|| "create a console socket".to_owned())?;
        (Streams::null(), None, Some(pair))
    } else {
        let (child_stdio, ends) = streams::pipes(request.stdin, owner)?;
        (child_stdio, Some(ends), None)
    };
    let (receiver, sender) = sockets.unzip();
    let file = agent.config.base.join(format!("exec-{number}.json"));
    let _starting = begin_start(agent, &request.container_id)?;
    let spawn_guard = agent.begin_spawn();
    let spawned = exec::start(target, &program, &file, child_stdio, sender, |pid| {
        agent.register_helper(pid);
    });
    let spawned = match spawned.await {
        Ok(spawned) => spawned,
        Err(error) => {
            return Err(init_exit_error(agent, &request.container_id).await.unwrap_or(error));
        }
    };
    // From here its exit is kept until it is registered below.
    let pid = spawned.pid;
    if let Err(error) = register_exec(agent, &request, spawned, ends, receiver, owner).await {
        // A failed execve has been reported and the process exits. Any other process would run
        // untracked.
        if !matches!(error, Error::Command { .. }) {
            agent.kill_untracked(pid);
        }
        return Err(error);
    }
    let owner = Owner::Process { container: request.container_id, exec: request.exec_id };
    agent.track(pid, owner);
    drop(spawn_guard);
    Ok(pid)
}

/// Also while it is being frozen. The new process would be frozen before its start completes.
fn check_not_paused(container: &Container) -> Result<()> {
    match &container.parts.cgroup {
        Some(cgroup) if cgroup.is_freezing() => {
            Err(Error::Precondition("the container is paused".to_owned()))
        }
        _ => Ok(()),
    }
}

/// Delays a pause of the container; fails at once if it is paused or about to be.
fn begin_start(agent: &Agent, id: &str) -> Result<OwnedRwLockReadGuard<()>> {
    let mut state = agent.lock();
    let container = state.container_mut(id)?;
    let starts = Arc::clone(&container.starts).try_read_owned();
    let starts =
        starts.map_err(|_| Error::Precondition("the container is being paused".to_owned()))?;
    check_not_paused(container)?;
    Ok(starts)
}

/// An O_PATH descriptor of `/proc/<pid>`: valid after the process, and never another process' one.
fn open_proc_dir(pid: i32) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let path = format!("/proc/{pid}");
    open(path.as_str(), flags, Mode::empty()).context(|| format!("open {path}"))
}

/// The user database as the container sees it. A mount over the image's /etc may not answer.
fn read_users(proc: &OwnedFd) -> Database {
    Root::open(format!("/proc/self/fd/{}/root", proc.as_raw_fd()).as_ref())
        .map(|root| Database::read(&root))
        .unwrap_or_default()
}

/// Waits for the execve of the program, connects its streams and records the exec.
async fn register_exec(
    agent: &Agent,
    request: &v1::ExecRequest,
    spawned: Spawned,
    ends: Option<Ends>,
    receiver: Option<OwnedFd>,
    owner: (u32, u32),
) -> Result<()> {
    spawned.start.wait().await?;
    let mut process = Process::new(spawned.pid, Status::Running);
    match (ends, receiver) {
        (Some(ends), _) => ends.connect(&mut process, true)?,
        (None, Some(receiver)) => {
            let size = (request.tty_width, request.tty_height);
            let master = pty::receive(receiver)?;
            streams::connect_terminal(master, request.stdin, size, owner, &mut process)?;
        }
        (None, None) => {}
    }
    let mut state = agent.lock();
    let container = state.container_mut(&request.container_id)?;
    process.oom_kills_before = container.oom_kills;
    container.execs.insert(request.exec_id.clone(), process);
    Ok(())
}

fn not_running_error(container: &str) -> Error {
    Error::Precondition(format!("container {container:?} is not running"))
}

/// The error to return if the exec failed because the container's init exited at the same time.
async fn init_exit_error(agent: &Agent, container: &str) -> Option<Error> {
    let ended = wait_for_init_exit(agent, container);
    tokio::time::timeout(INIT_EXIT_TIMEOUT, ended).await.ok().map(|()| not_running_error(container))
}

/// Waits for the exit of a container's init process.
async fn wait_for_init_exit(agent: &Agent, container: &str) {
    loop {
        let reaped = agent.reaped.notified();
        if agent.lock().containers.get(container).is_none_or(|found| found.init.is_stopped()) {
            return;
        }
        reaped.await;
    }
}

/// The request's process merged over the container's: missing or empty fields are the container's,
/// and variables are appended to it.
fn merge(base: &OciProcess, partial: &[u8]) -> Result<OciProcess> {
    let bad = |error: serde_json::Error| Error::invalid("oci_process", error.to_string());
    let mut merged = serde_json::to_value(base).map_err(bad)?;
    let partial: Map<String, Value> = if partial.is_empty() {
        Map::new()
    } else {
        serde_json::from_slice(partial).map_err(bad)?
    };
    let Some(fields) = merged.as_object_mut() else { return Ok(base.clone()) };
    for (name, value) in partial {
        let empty = match &value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            _ => false,
        };
        if empty {
            continue;
        }
        match (name.as_str(), fields.get_mut(&name), value) {
            ("env", Some(Value::Array(known)), Value::Array(more)) => known.extend(more),
            (_, _, value) => {
                fields.insert(name, value);
            }
        }
    }
    serde_json::from_value(merged).map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_process_is_merged_over_the_containers_process() {
        let base: OciProcess = serde_json::from_str(
            r#"{"cwd":"/srv","args":["main"],"env":["A=1","B=2"],"user":{"uid":5,"gid":6},
                "noNewPrivileges":true}"#,
        )
        .unwrap();
        let merged = merge(&base, br#"{"args":["ls","-l"],"env":["B=3"],"cwd":""}"#).unwrap();
        assert_eq!(merged.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(merged.env().as_deref().unwrap(), ["A=1", "B=2", "B=3"]);
        assert_eq!(merged.cwd().to_str(), Some("/srv"));
        assert_eq!((merged.user().uid(), merged.no_new_privileges()), (5, Some(true)));
        assert_eq!(merge(&base, b"").unwrap(), base);
        assert!(merge(&base, b"[]").is_err());
    }
}
