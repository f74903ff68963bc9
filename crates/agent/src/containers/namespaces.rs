//! The namespaces that containers of a pod share (PID, user), created at first use.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use agent_api::v1;

use crate::agent::{Agent, Owner};
use crate::error::{Context, Error, Result};
use crate::guest::identity;
use crate::oci::pod_pid;
use crate::oci::spec::PidNamespace;
use crate::oci::userns::{Mapping, UserNamespace};

/// The PID namespace of a container, and the descriptor to inherit to the helper for one to join.
/// A descriptor, as the pid may be another process' one by the time the helper uses it, and as the
/// helper, in the pod's user namespace, has no access to the other process.
pub(super) async fn pid_namespace(
    agent: &Arc<Agent>,
    request: &v1::CreateContainerRequest,
    userns: Option<&UserNamespace>,
) -> Result<(PidNamespace, Option<OwnedFd>)> {
    let of = |pid: i32| {
        let path = format!("/proc/{pid}/ns/pid");
        let file = File::open(&path).context(|| format!("open {path}"))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok((PidNamespace::Join(path), Some(OwnedFd::from(file))))
    };
    match v1::PidMode::try_from(request.pid_mode) {
        Ok(v1::PidMode::Container) => Ok((PidNamespace::Own, None)),
        Ok(v1::PidMode::Node) if userns.is_some() => Err(Error::invalid(
            "pid_mode",
            "the node's PID namespace cannot be used with a user namespace",
        )),
        Ok(v1::PidMode::Node) => Ok((PidNamespace::Guest, None)),
        Ok(v1::PidMode::Pod) => of(pod_pid_1(agent, userns).await?),
        Ok(v1::PidMode::Target) => {
            let state = agent.lock();
            let target = &state.container(&request.pid_target)?.init;
            if target.is_stopped() {
                return Err(Error::Precondition(format!(
                    "target container {:?} has ended",
                    request.pid_target
                )));
            }
            // The pid cannot have been reused: children are reaped under the lock.
            of(target.pid)
        }
        Err(_) => Err(Error::invalid("pid_mode", format!("{} is unknown", request.pid_mode))),
    }
}

/// PID 1 of the pod's shared PID namespace, made at first use.
async fn pod_pid_1(agent: &Arc<Agent>, userns: Option<&UserNamespace>) -> Result<i32> {
    let _making = agent.pod_pid_lock.lock().await;
    if let Some(pid) = agent.lock().pod_pid {
        return Ok(pid);
    }
    let spawn_guard = agent.begin_spawn();
    let pid =
        pod_pid::make(userns.map(UserNamespace::path), |pid| agent.register_helper(pid)).await?;
    agent.lock().pod_pid = Some(pid);
    agent.track(pid, Owner::PodPid);
    drop(spawn_guard);
    Ok(pid)
}

/// The pod's user namespace, shared by all containers that have one.
pub(super) async fn user_namespace(
    agent: &Arc<Agent>,
    mapping: Mapping,
) -> Result<Arc<UserNamespace>> {
    // A user namespace needs sysctls that would change the host.
    agent.config.require_vm()?;
    let mut made = agent.userns.lock().await;
    let userns = match &*made {
        Some(userns) if userns.mapping == mapping => Arc::clone(userns),
        Some(_) => {
            return Err(Error::invalid(
                "oci_spec.linux.uidMappings",
                "another container of the pod has a different mapping",
            ));
        }
        None => {
            let spawn_guard = agent.begin_spawn();
            let userns =
                UserNamespace::make(mapping, |pid| agent.track(pid, Owner::Helper)).await?;
            drop(spawn_guard);
            identity::allow_unprivileged_network()?;
            Arc::clone(made.insert(Arc::new(userns)))
        }
    };
    let shm = agent.config.base.join("shm");
    crate::guest::shm::set_owner(&shm, &userns.mapping)?;
    agent.lock().volumes.set_mapping(&userns.mapping)?;
    Ok(userns)
}
