//! How the host starts an agent for a pod that has no VM: `nacelle-agent --host-pod ...`, with the
//! descriptors below. It then serves the same protocol on the listeners it was given.

use std::path::PathBuf;

/// First argument of such an agent.
pub const FLAG: &str = "--host-pod";
/// A mount namespace: paths of the host are looked up there.
pub const MOUNTS_FD: i32 = 3;
/// Listening stream socket of the gRPC service.
pub const CONTROL_FD: i32 = 4;
/// ... of process streams.
pub const STDIO_FD: i32 = 5;
/// ... of forwarded connections.
pub const FORWARD_FD: i32 = 6;
/// The pod's network namespace, unless it has the host's.
pub const NETNS_FD: i32 = 7;

/// Begins a disk's name that stands for an image file of the host.
pub const FILE: &str = "file:";
/// Begins a disk's name that stands for a folder of the host, as a writable layer.
pub const FOLDER: &str = "dir:";

/// What is told by arguments. The agent is started with a mount namespace of its own, and with PID,
/// IPC and UTS namespaces of its own as far as the pod does not have the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// A folder on which the agent mounts its root, where nobody else sees it.
    pub root: PathBuf,
    /// Where the host has cgroup v2 mounted.
    pub cgroup_mount: PathBuf,
    /// The pod's cgroup below that, in which the agent is born.
    pub cgroup: String,
    /// The pod has the host's network and host name.
    pub network: bool,
    /// ... the host's processes.
    pub pid: bool,
    /// ... the host's shared memory and message queues.
    pub ipc: bool,
}

const NETWORK: &str = "network";
const PID: &str = "pid";
const IPC: &str = "ipc";

impl Start {
    /// The command line, without the program.
    pub fn to_args(&self) -> Vec<String> {
        let Self { root, cgroup_mount, cgroup, network, pid, ipc } = self;
        let mut args = vec![
            FLAG.to_owned(),
            root.to_string_lossy().into_owned(),
            cgroup_mount.to_string_lossy().into_owned(),
            cgroup.clone(),
        ];
        let shared = [(network, NETWORK), (pid, PID), (ipc, IPC)];
        args.extend(shared.into_iter().filter(|(has, _)| **has).map(|(_, name)| name.to_owned()));
        args
    }

    /// None: not such a command line.
    pub fn from_args(args: &[String]) -> Option<Self> {
        let [flag, root, cgroup_mount, cgroup, shared @ ..] = args else { return None };
        let known = |name: &String| [NETWORK, PID, IPC].contains(&name.as_str());
        if flag != FLAG || !shared.iter().all(known) {
            return None;
        }
        let has = |name: &str| shared.iter().any(|given| given == name);
        Some(Self {
            root: root.into(),
            cgroup_mount: cgroup_mount.into(),
            cgroup: cgroup.clone(),
            network: has(NETWORK),
            pid: has(PID),
            ipc: has(IPC),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_survives_the_command_line() {
        let mut start = Start {
            root: "/run/x".into(),
            cgroup_mount: "/sys/fs/cgroup".into(),
            cgroup: "a/b".into(),
            network: true,
            pid: false,
            ipc: true,
        };
        assert_eq!(Start::from_args(&start.to_args()), Some(start.clone()));
        start.network = false;
        assert_eq!(Start::from_args(&start.to_args()), Some(start.clone()));
        let mut args = start.to_args();
        args.push("time".into());
        assert_eq!(Start::from_args(&args), None);
        assert_eq!(Start::from_args(&["--version".into()]), None);
    }
}
