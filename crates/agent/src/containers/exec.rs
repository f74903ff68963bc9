//! Exec: a further process in a running container.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use oci_spec::runtime::Process as OciProcess;
use serde_json::{Map, Value};

use super::process::{Life, Process};
use super::streams::{self, Ends};
use crate::agent::{Agent, Owner};
use crate::error::{Doing, Error, Result};
use crate::guest::inroot::Root;
use crate::lanes::LOOK_UP;
use crate::oci::exec::{self, Program, Target};
use crate::oci::helper::{Made, Streams};
use crate::oci::spec::{Groups, complete_process};
use crate::oci::user::Database;
use crate::stdio::pty;

/// Exec records of one container, ended but uncollected ones included: each may hold a window of
/// output.
const MAX_EXECS: usize = 512;

/// From an init process' death until it is known here.
const ENDING: Duration = Duration::from_millis(200);

/// Returns the pid.
pub async fn exec(agent: &Arc<Agent>, request: v1::ExecRequest) -> Result<i32> {
    crate::ids::check("exec_id", &request.exec_id)?;
    agent.sweep_execs();
    let (target, userns, base, seccomp, hostname, number, proc) = {
        let mut state = agent.lock();
        let number = state.number();
        let full = state.events.is_full();
        let hostname = state.pod.as_ref().map(|pod| pod.hostname.clone()).unwrap_or_default();
        let container = state.container(&request.container_id)?;
        if container.init.life != Life::Running {
            return Err(stopped(&request.container_id));
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
        let base = container.process.clone();
        let userns = container.userns.clone();
        let target =
            Target { pid: container.init.pid, cgroup: cgroup.dir(), userns: userns.is_some() };
        // While the lock is held, the pid cannot have been given to another process.
        let proc = proc_folder(target.pid)?;
        (target, userns, base, container.seccomp.clone(), hostname, number, proc)
    };
    // Without a user the process has the container's own, whose groups and home are known.
    let users = if request.user.is_empty() {
        Database::default()
    } else {
        let lane = agent.lanes.of_container(&request.container_id);
        tokio::select! {
            users = lane.run("look up the user in /etc", LOOK_UP, move || Ok(users_of(&proc))) => {
                users?
            }
            () = ended(agent, &request.container_id) => return Err(stopped(&request.container_id)),
        }
    };
    let mut process = merge(&base, &request.oci_process)?;
    process.set_terminal(Some(request.tty));
    // The container's own groups are complete.
    let groups = if request.user.is_empty() { Groups::Given } else { Groups::Merged };
    complete_process(&mut process, &users, &request.user, groups, &hostname)?;
    let owner = super::create::owner(&process, userns.as_deref())?;
    let program = Program { process, seccomp };

    let (given, ends, sockets) = if request.tty {
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .doing(|| "make a console socket".to_owned())?;
        (Streams::null(), None, Some(pair))
    } else {
        let (given, ends) = streams::pipes(request.stdin, owner)?;
        (given, Some(ends), None)
    };
    let (receiver, sender) = sockets.unzip();
    let file = agent.config.base.join(format!("exec-{number}.json"));
    let expecting = agent.expect_child();
    let made = exec::start(target, &program, &file, given, sender, |pid| {
        agent.know_helper(pid);
    });
    let made = match made.await {
        Ok(made) => made,
        Err(error) => return Err(not_running(agent, &request.container_id).await.unwrap_or(error)),
    };
    // Its end is kept aside until it is adopted below, or forgotten if it failed to start.
    let pid = made.pid;
    if let Err(error) = take_charge(agent, &request, made, ends, receiver, owner).await {
        // A program that could not be run has told so, and is ending. Any other would run unknown.
        if !matches!(error, Error::Command { .. }) {
            agent.give_up(pid);
        }
        return Err(error);
    }
    let owner = Owner::Process { container: request.container_id, exec: request.exec_id };
    agent.adopt(pid, owner);
    drop(expecting);
    Ok(pid)
}

/// A process' folder of /proc, which outlives the process, but never becomes another one's.
fn proc_folder(pid: i32) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let path = format!("/proc/{pid}");
    open(path.as_str(), flags, Mode::empty()).doing(|| format!("open {path}"))
}

/// As the container sees them: something may be mounted over the image's /etc, and it may not
/// answer.
fn users_of(proc: &OwnedFd) -> Database {
    Root::open(format!("/proc/self/fd/{}/root", proc.as_raw_fd()).as_ref())
        .map(|root| Database::read(&root))
        .unwrap_or_default()
}

/// Waits until the program runs, and makes it known.
async fn take_charge(
    agent: &Agent,
    request: &v1::ExecRequest,
    made: Made,
    ends: Option<Ends>,
    receiver: Option<OwnedFd>,
    owner: (u32, u32),
) -> Result<()> {
    made.start.wait().await?;
    let mut process = Process::new(made.pid, Life::Running);
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

fn stopped(container: &str) -> Error {
    Error::Precondition(format!("container {container:?} is not running"))
}

/// A command that fails to come up beside an init that is just ending has failed because of that.
async fn not_running(agent: &Agent, container: &str) -> Option<Error> {
    let ended = ended(agent, container);
    tokio::time::timeout(ENDING, ended).await.ok().map(|()| stopped(container))
}

/// Waits for the end of a container's init process.
async fn ended(agent: &Agent, container: &str) {
    loop {
        let reaped = agent.reaped.notified();
        if agent.lock().containers.get(container).is_none_or(|found| found.init.is_ended()) {
            return;
        }
        reaped.await;
    }
}

/// The request's process over the container's: fields that it does not have are the container's,
/// and variables are added to the container's.
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
    fn a_partial_process_is_laid_over_the_containers() {
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
