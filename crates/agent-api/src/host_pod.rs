//! Command line and descriptors of the agent of a pod without a VM: `nacelle-agent --host-pod ...`.
//! It serves the same protocol as in a guest, on the listening sockets that it inherits.

use std::path::PathBuf;

/// First argument.
pub const FLAG: &str = "--host-pod";
/// Descriptor of the host's mount namespace, in which host paths are resolved.
pub const MOUNTS_FD: i32 = 3;
/// Descriptor of the listening socket of the gRPC service.
pub const CONTROL_FD: i32 = 4;
/// Same for process streams.
pub const STDIO_FD: i32 = 5;
/// Same for forwarded connections.
pub const FORWARD_FD: i32 = 6;
/// Descriptor of the pod's network namespace, if it does not use the host's.
pub const NETNS_FD: i32 = 7;

/// Prefix of a disk serial that is the path of an image file on the host.
pub const FILE: &str = "file:";
/// Prefix of a disk serial that is the path of a host directory, as writable layer.
pub const FOLDER: &str = "dir:";

/// Arguments of the agent. The launcher starts it in a new mount namespace, and in new PID, IPC and
/// UTS namespaces unless the pod uses the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// An empty directory on which the agent mounts its root, in its own mount namespace.
    pub root: PathBuf,
    /// Mount point of cgroup v2 on the host.
    pub cgroup_mount: PathBuf,
    /// The pod's cgroup relative to that, in which the agent is started.
    pub cgroup: String,
    /// The pod uses the host's network and UTS namespaces.
    pub network: bool,
    /// The pod uses the host's PID namespace.
    pub pid: bool,
    /// The pod uses the host's IPC namespace.
    pub ipc: bool,
}

const NETWORK: &str = "network";
const PID: &str = "pid";
const IPC: &str = "ipc";

impl Start {
    /// The arguments, without the program.
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

    /// Parses the arguments; None if they do not start with [`FLAG`] or are malformed.
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
    fn arguments_round_trip() {
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
