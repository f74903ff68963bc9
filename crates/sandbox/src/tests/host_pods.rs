//! Host pods: a fake agent on its own sockets, no VMM.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::Arc;

use agent_api::host_pod::Start;
use agent_api::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::agent::{Guest, LISTENING};
use super::lifecycle::exec;
use super::test_node::{TestNode, eventually, guests, run_test};
use crate::model::{
    Access, ContainerState, HostNamespaces, PidMode, PodResources, PodState, Propagation, Volume,
    VolumeSource,
};
use crate::{Error, Sandboxes};

impl TestNode {
    pub(super) fn serve_host_pod(&self, args: &[String], sockets: [OwnedFd; 3], mut child: Child) {
        let start = Start::from_args(args).unwrap();
        assert!(start.root.is_dir() && start.cgroup_mount.is_dir());
        let (_, pod) = start.cgroup.rsplit_once("nacelle-").unwrap();
        let guest = Arc::new(Guest::default());
        self.inner.guests.lock().unwrap().insert(pod.to_owned(), (child.id(), guest.clone()));
        let sockets = sockets.map(|socket| {
            let listener = std::os::unix::net::UnixListener::from(socket);
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let served = guests().spawn(async move {
            let sockets = sockets.map(|s| tokio::net::UnixListener::from_std(s).unwrap());
            guest.serve_sockets(sockets).await;
        });
        std::thread::spawn(move || {
            let _ = child.wait();
            served.abort();
        });
    }

    async fn run_host_pod(&self, daemon: &Sandboxes, host: HostNamespaces) -> String {
        let mut spec = self.pod_spec("web");
        spec.host = Some(host);
        daemon.run_pod(spec).await.unwrap()
    }
}

const NETWORK: HostNamespaces = HostNamespaces { network: true, pid: true, ipc: false };

#[test]
fn a_host_pod_runs_without_a_vm_and_leaves_nothing() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = node.run_host_pod(&daemon, NETWORK).await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!(view.state, PodState::Ready);
        assert!(view.addresses.is_empty() && view.netns.is_none() && view.vmm_pid.is_some());
        assert!(node.inner.attached.lock().unwrap().is_empty(), "the host's network is there");
        let mut spec = node.container_spec("app", &["print-forever", "one\n"]);
        spec.pid = PidMode::Node;
        spec.volumes = vec![Volume {
            container_path: "/data".into(),
            source: VolumeSource::Shared { host_path: node.path("") },
            access: Access::ReadWrite,
            propagation: Propagation::Bidirectional,
        }];
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        let request = node.guest(&pod).lock().create.clone().unwrap();
        let rootfs = request.rootfs.as_ref().unwrap();
        assert_eq!(rootfs.lower_serial, format!("file:{}", node.path("image").display()));
        let layer = rootfs.upper_serial.strip_prefix("dir:").unwrap();
        assert!(std::path::Path::new(layer).is_dir());
        assert_eq!(request.pid_mode(), v1::PidMode::Node);
        let volume = &request.volumes[0];
        assert_eq!(volume.source(), v1::VolumeSource::Host);
        assert_eq!(volume.propagation(), v1::Propagation::Shared);
        assert!(node.inner.devices.lock().unwrap().is_empty());
        eventually("log", || node.log("app.log") == ["one"]).await;
        let output = daemon.exec_sync(&id, exec(&["print", "hi"]), None, 100).await.unwrap();
        assert_eq!(output.stdout, b"hi");
        daemon.port_forward(&pod, LISTENING).await.unwrap();
        // A host pod has no size.
        let change = PodResources { memory_mib: Some(1 << 20), ..PodResources::default() };
        daemon.update_pod(&pod, change).await.unwrap();
        assert!(matches!(daemon.console(&pod, 0), Err(Error::FailedPrecondition { .. })));
        // The layer is removed with its content.
        std::fs::create_dir_all(format!("{layer}/data/a/b")).unwrap();
        daemon.remove_container(&id).await.unwrap();
        assert!(!std::path::Path::new(layer).exists());
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        eventually("nothing is left", || node.leftovers().is_empty()).await;
    });
}

#[test]
fn a_host_pod_survives_the_daemon_and_its_processes_end_with_its_agent() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = node.run_host_pod(&daemon, HostNamespaces { ipc: true, ..NETWORK }).await;
        let id =
            daemon.create_container(&pod, node.container_spec("app", &["forever"])).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        let output = daemon.exec_sync(&id, exec(&["print", "hi"]), None, 100).await.unwrap();
        assert_eq!(output.stdout, b"hi");

        // A container process in a cgroup of its own, as the real agent creates it.
        let below = node.cgroup_file(&pod, "c1");
        std::fs::create_dir(&below).unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        std::fs::write(below.join("cgroup.procs"), child.id().to_string()).unwrap();
        kill(Pid::from_raw(node.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("pod is not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady)
            .await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("agent"));
        let exit = daemon.container(&id).unwrap().exit.unwrap();
        assert_eq!((exit.code, exit.reason.as_str()), (137, "AgentDied"));
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
        assert!(!ended.await.unwrap().success());
        daemon.remove_pod(&pod).await.unwrap();
        eventually("nothing is left", || node.leftovers().is_empty()).await;
    });
}

#[test]
fn the_start_of_a_host_pod_without_its_network_namespace_is_undone() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let host = HostNamespaces { pid: true, ..HostNamespaces::default() };
        let mut spec = node.pod_spec("web");
        spec.host = Some(host);
        // The fake network creates no namespace, so the agent cannot be started in it.
        let error = daemon.run_pod(spec).await.unwrap_err().to_string();
        assert!(error.contains("netns") || error.contains("No such file"), "{error}");
        eventually("nothing is left", || node.leftovers().is_empty()).await;
    });
}
