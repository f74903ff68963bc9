//! Host pods: their agent is a process of the host, started and watched like a VMM
//! ([`agent_api::host_pod`]).

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use agent_api::host_pod::Start;
use nix::sys::socket::SockType;

use super::handle::Handle;
use crate::error::Error;
use crate::guest::SOCKETS;
use crate::host::{blocking, cgroup, ignore_not_found, sockets};
use crate::launcher::{Namespaces, Program};
use crate::model::HostNamespaces;
use crate::policy::Pod;
use crate::ports::Attachment;

/// Subdirectory of the state directory on which the agent mounts its root.
const ROOT: &str = "root";

/// The agent's program, arguments and descriptors. Blocks.
pub(super) fn program(
    handle: &Handle,
    own: HostNamespaces,
    attachment: &Attachment,
    leaf: &Path,
) -> Result<Program, Error> {
    let (paths, node) = (&handle.paths, &handle.node);
    let failed = |what: &str, path: &Path, e| Error::io(format!("{what} {}", path.display()), e);
    let root = paths.state_dir.join(ROOT);
    for directory in [&paths.state_dir, &paths.directory, &root] {
        node.failpoints.wrap_blocking("host: make a pod's directory", || {
            let mut directories = fs::DirBuilder::new();
            let made = directories.recursive(true).mode(0o700).create(directory);
            made.map_err(|e| failed("create", directory, e))
        })?;
    }
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&paths.log);
    let log = log.map_err(|e| failed("create", &paths.log, e))?;
    let open =
        |path: &Path| File::open(path).map(OwnedFd::from).map_err(|e| failed("open", path, e));
    // Paths of volumes and images are in the daemon's mount namespace.
    let mut fds = vec![open(Path::new("/proc/self/ns/mnt"))?];
    for (_, name) in SOCKETS {
        let path = paths.state_dir.join(name);
        let socket = sockets::listen_at(&path, SockType::Stream);
        fds.push(socket.map_err(|e| failed("listen at", &path, e))?);
    }
    if !own.network {
        fds.push(open(&attachment.netns)?);
    }
    let below = leaf.strip_prefix(&node.cgroup_root).unwrap_or(leaf);
    let start = Start {
        root,
        cgroup_mount: node.cgroup_root.clone(),
        cgroup: below.to_string_lossy().into_owned(),
        network: own.network,
        pid: own.pid,
        ipc: own.ipc,
    };
    let cgroup = node.failpoints.wrap_blocking("host: make the cgroup", || {
        cgroup::make(leaf).map_err(|e| failed("create cgroup", leaf, e))
    })?;
    Ok(Program {
        exe: node.config.agent(),
        args: start.to_args(),
        cgroup: cgroup.into(),
        stderr: log.into(),
        fds,
        own: Namespaces {
            mount: true,
            pid: !own.pid,
            ipc: !own.ipc,
            // The host's network goes with the host's name.
            uts: !own.network,
            net: false,
        },
    })
}

/// Kills the remaining processes after the agent's exit: without a PID namespace of its own they
/// survive it.
pub(super) async fn kill_remaining(handle: &Handle, pod: &Pod) {
    if handle.machine.host().is_none() {
        return;
    }
    let Some(leaf) = pod.cgroup().map(Path::to_owned) else { return };
    let killed = blocking(move || ignore_not_found(fs::write(leaf.join("cgroup.kill"), "1"))).await;
    if let Err(error) = killed {
        tracing::error!(pod = handle.id, %error, "cannot kill processes of a host pod");
    }
}

/// Creates an empty directory for a container's writable layer; returns its name for the agent.
pub(super) async fn make_layer(path: PathBuf) -> Result<String, Error> {
    let name = format!("{}{}", agent_api::host_pod::FOLDER, path.display());
    let made = blocking(move || {
        ignore_not_found(fs::remove_dir_all(&path))?;
        fs::DirBuilder::new().mode(0o700).create(&path)
    });
    made.await.map_err(|e| Error::io("create a writable layer", e))?;
    Ok(name)
}
