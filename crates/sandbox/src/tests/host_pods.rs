//! Pods that have namespaces of the host: a fake agent on sockets of its own, no VMM.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::Arc;

use agent_api::host_pod::Start;
use agent_api::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::agent::{Guest, LISTENING};
use super::life::exec;
use super::world::{World, eventually, guests, story};
use crate::model::{
    Access, ContainerState, HostNamespaces, PidMode, PodResources, PodState, Propagation, Volume,
    VolumeSource,
};
use crate::{Error, Sandboxes};

impl World {
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
fn a_host_pod_lives_without_a_vm_and_leaves_nothing() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = world.run_host_pod(&daemon, NETWORK).await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!(view.state, PodState::Ready);
        assert!(view.addresses.is_empty() && view.netns.is_none() && view.vmm_pid.is_some());
        assert!(world.inner.attached.lock().unwrap().is_empty(), "the host's network is there");
        let mut spec = world.container_spec("app", &["print-forever", "one\n"]);
        spec.pid = PidMode::Node;
        spec.volumes = vec![Volume {
            container_path: "/data".into(),
            source: VolumeSource::Shared { host_path: world.path("") },
            access: Access::ReadWrite,
            propagation: Propagation::Bidirectional,
        }];
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        let request = world.guest(&pod).lock().create.clone().unwrap();
        let rootfs = request.rootfs.as_ref().unwrap();
        assert_eq!(rootfs.lower_serial, format!("file:{}", world.path("image").display()));
        let layer = rootfs.upper_serial.strip_prefix("dir:").unwrap();
        assert!(std::path::Path::new(layer).is_dir());
        assert_eq!(request.pid_mode(), v1::PidMode::Node);
        let volume = &request.volumes[0];
        assert_eq!(volume.source(), v1::VolumeSource::Host);
        assert_eq!(volume.propagation(), v1::Propagation::Shared);
        assert!(world.inner.devices.lock().unwrap().is_empty());
        eventually("log", || world.log("app.log") == ["one"]).await;
        let output = daemon.exec_sync(&id, exec(&["print", "hi"]), None, 100).await.unwrap();
        assert_eq!(output.stdout, b"hi");
        daemon.port_forward(&pod, LISTENING).await.unwrap();
        // There is nothing to resize but the containers.
        let change = PodResources { memory_mib: Some(1 << 20), ..PodResources::default() };
        daemon.update_pod(&pod, change).await.unwrap();
        assert!(matches!(daemon.console(&pod, 0), Err(Error::FailedPrecondition { .. })));
        // What a container has left in its layer goes with it.
        std::fs::create_dir_all(format!("{layer}/data/a/b")).unwrap();
        daemon.remove_container(&id).await.unwrap();
        assert!(!std::path::Path::new(layer).exists());
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        eventually("nothing is left", || world.leftovers().is_empty()).await;
    });
}

#[test]
fn a_host_pod_survives_the_daemon_and_its_agents_end_is_the_end_of_its_processes() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = world.run_host_pod(&daemon, HostNamespaces { ipc: true, ..NETWORK }).await;
        let id =
            daemon.create_container(&pod, world.container_spec("app", &["forever"])).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        daemon.shutdown().await;
        drop(daemon);
        let daemon = world.daemon().await;
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        let output = daemon.exec_sync(&id, exec(&["print", "hi"]), None, 100).await.unwrap();
        assert_eq!(output.stdout, b"hi");

        // A process of a container, as the real agent has it.
        let below = world.cgroup_file(&pod, "c1");
        std::fs::create_dir(&below).unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        std::fs::write(below.join("cgroup.procs"), child.id().to_string()).unwrap();
        kill(Pid::from_raw(world.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("pod is not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady)
            .await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("agent"));
        let exit = daemon.container(&id).unwrap().exit.unwrap();
        assert_eq!((exit.code, exit.reason.as_str()), (137, "AgentDied"));
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
        assert!(!ended.await.unwrap().success());
        daemon.remove_pod(&pod).await.unwrap();
        eventually("nothing is left", || world.leftovers().is_empty()).await;
    });
}

#[test]
fn a_host_pod_is_given_a_network_of_its_own_or_is_unwound() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let host = HostNamespaces { pid: true, ..HostNamespaces::default() };
        let mut spec = world.pod_spec("web");
        spec.host = Some(host);
        // The fake network makes no namespace, so the agent cannot be given one.
        let error = daemon.run_pod(spec).await.unwrap_err().to_string();
        assert!(error.contains("netns") || error.contains("No such file"), "{error}");
        eventually("nothing is left", || world.leftovers().is_empty()).await;
    });
}
