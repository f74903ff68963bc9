//! The agent of a pod without a VM, started as the launcher starts it, in a cgroup of its own.
//!
//! Needs root, cgroup v2 in the kernel, loop devices, EROFS, mkfs.erofs, unshare(1) and a static
//! busybox; prints SKIP if something is missing.
#![allow(unsafe_code)] // passes descriptors to the agent

mod common;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_api::host_pod::Start;
use agent_api::v1;
use common::{Guest, spec};
use serde_json::json;

struct Host {
    guest: Guest,
    cgroup: PathBuf,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.guest.child.wait();
        let start = std::time::Instant::now();
        while self.cgroup.exists() && start.elapsed() < common::TIMEOUT {
            for entry in fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(entry.path());
            }
            let _ = fs::remove_dir(&self.cgroup);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

fn cgroup_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

/// Starts an agent; `own` are unshare(1)'s letters of its own namespaces.
async fn host_pod(own: &str, network: bool, pid: bool, ipc: bool) -> Option<Host> {
    let Some(mount) = cgroup_mount() else {
        println!("SKIP: cgroup v2 is not mounted");
        return None;
    };
    let made = Command::new("mkfs.erofs").arg("--help").output().is_ok();
    if !made || !Path::new("/dev/loop-control").exists() {
        println!("SKIP: no mkfs.erofs, or no loop devices");
        return None;
    }
    let dir = common::root_dir()?;
    let path = |name: &str| dir.path().join(name);
    let image = Command::new("mkfs.erofs").arg(path("image")).arg(path("root")).output().unwrap();
    assert!(image.status.success(), "{image:?}");
    for dir in ["at", "layer", "data"] {
        fs::create_dir(path(dir)).unwrap();
    }
    let name = dir.path().file_name().unwrap().to_str().unwrap().trim_start_matches('.');
    let start = Start {
        root: path("at"),
        cgroup_mount: mount.clone(),
        cgroup: format!("nacelle-host-{name}"),
        network,
        pid,
        ipc,
    };
    let cgroup = mount.join(&start.cgroup);
    fs::create_dir(&cgroup).unwrap();
    let sockets = ["control.sock", "stdio.sock", "forward.sock"];
    let listener = |name: &str| OwnedFd::from(UnixListener::bind(path(name)).unwrap());
    let mut fds: Vec<OwnedFd> = vec![File::open("/proc/self/ns/mnt").unwrap().into()];
    fds.extend(sockets.map(listener));
    if !network {
        fds.push(File::open("/proc/self/ns/net").unwrap().into());
    }
    // Above the numbers that are passed to the agent.
    let above: Vec<i32> = fds
        .iter()
        .map(|fd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap())
        .collect();
    let procs = File::options().write(true).open(cgroup.join("cgroup.procs")).unwrap();
    let procs_fd = procs.as_raw_fd();
    let mut command = Command::new("unshare");
    command.arg(format!("-m{own}"));
    if own.contains('p') {
        command.args(["--fork", "--kill-child"]);
    }
    command.arg(env!("CARGO_BIN_EXE_nacelle-agent")).args(start.to_args());
    command.env("NACELLE_LOG", "debug").stdin(Stdio::null());
    // SAFETY: the closure makes system calls only, on descriptors that are open until it has run.
    unsafe {
        command.pre_exec(move || {
            if libc::write(procs_fd, c"0".as_ptr().cast(), 1) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            for (number, fd) in (3..).zip(&above) {
                if libc::dup2(*fd, number) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    drop(fds);
    let lower = format!("file:{}", path("image").display());
    let guest = Guest::in_dir(child, dir, lower).await;
    Some(Host { guest, cgroup })
}

fn loops(image: &Path) -> usize {
    let name = image.to_str().unwrap();
    let all = fs::read_dir("/sys/block").unwrap().flatten();
    let files =
        all.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    files.filter(|file| file.trim().starts_with(name)).count()
}

#[tokio::test]
async fn a_container_uses_the_hosts_network_and_processes_and_leaves_nothing_behind() {
    let Some(mut host) = host_pod("i", true, true, false).await else { return };
    let guest = &mut host.guest;
    guest.configure().await;
    assert_ne!(nix::unistd::gethostname().unwrap(), "pod-host", "the host's name is unchanged");
    // /proc/<pid>/exe is the sealed copy; cmdline and comm are unchanged.
    let agent = PathBuf::from(format!("/proc/{}", guest.child.id()));
    let program = fs::read_link(agent.join("exe")).unwrap();
    assert_eq!(program.to_str(), Some("/memfd:nacelle-agent (deleted)"));
    let command = fs::read_to_string(agent.join("cmdline")).unwrap();
    assert!(command.split('\0').next().unwrap().ends_with("nacelle-agent"), "{command:?}");
    assert_eq!(fs::read_to_string(agent.join("comm")).unwrap(), "nacelle-agent\n");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("{:04X}", listener.local_addr().unwrap().port());
    let image = guest.dir.path().join("image");
    let data = guest.dir.path().join("data");
    fs::write(data.join("in"), "from the host\n").unwrap();
    let test = std::process::id();
    let script = format!(
        "grep -q ':{port} ' /proc/net/tcp && echo network; test -d /proc/{test} && echo processes; \
         cat /data/in; echo out >/data/out; echo x >/written; ls /dev/sda /dev/vda 2>/dev/null; \
         grep ^0: /proc/self/cgroup; exit 5"
    );
    let mut request = guest.request("c1", &spec(&script, json!({})));
    request.pid_mode = v1::PidMode::Node.into();
    let rootfs = request.rootfs.as_mut().unwrap();
    rootfs.upper_serial = format!("dir:{}", guest.dir.path().join("layer").display());
    request.volumes = vec![v1::VolumeMount {
        volume_id: data.to_str().unwrap().into(),
        destination: "/data".into(),
        source: v1::VolumeSource::Host.into(),
        ..Default::default()
    }];
    let (output, exit) = guest.run(request).await;
    assert_eq!(output, "network\nprocesses\nfrom the host\n0::/\n");
    assert_eq!(exit.code, 5);
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "out\n");
    assert_eq!(fs::read_to_string(guest.dir.path().join("layer/data/written")).unwrap(), "x\n");
    assert_eq!(loops(&image), 1);
    let stats = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let layer = stats.containers[0].writable_layer.unwrap();
    assert!(layer.inodes_used >= 1 && layer.used_bytes < 1 << 20, "{layer:?}");
    assert!(stats.pod.unwrap().interfaces.is_empty());
    guest.remove("c1").await.unwrap();
    assert_eq!(loops(&image), 0);
    assert!(!host.cgroup.join("c1").exists());
}

#[tokio::test]
async fn a_pod_with_its_own_namespaces_has_a_hostname_and_cannot_see_the_host() {
    let Some(mut host) = host_pod("uip", false, false, false).await else { return };
    let guest = &mut host.guest;
    guest.configure().await;
    let test = std::process::id();
    let script =
        format!("hostname; echo $$; test -d /proc/{test} || echo alone; ls /dev/shm | wc -l");
    let request = guest.request("c1", &spec(&script, json!({})));
    assert_eq!(guest.run(request).await.0, "pod-host\n1\nalone\n0\n");
    // A running container and an exec in it, ended by Shutdown.
    let request = guest.request("c2", &spec("sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("c2").await.unwrap();
    guest.exec("c2", "e", json!({"args": ["sh", "-c", "echo $$; exit 4"]})).await.unwrap();
    assert_eq!(guest.exit("c2", "e").await.code, 4);
    guest.client.shutdown(v1::ShutdownRequest {}).await.unwrap();
    guest.child.wait().unwrap();
    let empty = || {
        let events = fs::read_to_string(host.cgroup.join("cgroup.events")).unwrap();
        events.contains("populated 0")
    };
    let start = std::time::Instant::now();
    while !empty() {
        assert!(start.elapsed() < common::TIMEOUT, "processes are still running");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn requests_that_would_change_the_host_are_refused() {
    let Some(mut host) = host_pod("", true, true, true).await else { return };
    let guest = &mut host.guest;
    let sysctls = [("vm.swappiness".to_owned(), "1".to_owned())].into();
    let request = v1::ConfigurePodRequest { pod_id: "pod".into(), sysctls, ..Default::default() };
    let status = guest.client.configure_pod(request).await.unwrap_err();
    assert!(status.message().contains("not namespaced"), "{status}");
    guest.configure().await;
    let status = guest.client.resize_pod(v1::ResizePodRequest { cpus: 1 }).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    let status = guest.client.rescan_devices(v1::RescanDevicesRequest::default()).await;
    assert_eq!(status.unwrap_err().code(), tonic::Code::FailedPrecondition);
    let release = v1::ReleaseDeviceRequest { disk_serial: "x".into(), mac: String::new() };
    let status = guest.client.release_device(release).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    let mut request = guest.request("c1", &spec("true", json!({})));
    request.rootfs.as_mut().unwrap().lower_serial = "disk0".into();
    let status = guest.client.create_container(request).await.unwrap_err();
    assert!(status.message().contains("no VM"), "{status}");
    let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 100}]);
    let userns = json!({"linux": {"namespaces": [{"type": "user"}], "uidMappings": mapping,
        "gidMappings": mapping}});
    let request = guest.request("c1", &spec("true", userns));
    let status = guest.client.create_container(request).await.unwrap_err();
    assert!(status.message().contains("no VM"), "{status}");
}

#[tokio::test]
async fn mounts_propagate_between_a_container_and_the_host() {
    let Some(mut host) = host_pod("", true, true, true).await else { return };
    let guest = &mut host.guest;
    guest.configure().await;
    let data = guest.dir.path().join("data");
    let shared = Shared::new(&data);
    let volume = |propagation: v1::Propagation| v1::VolumeMount {
        volume_id: data.to_str().unwrap().into(),
        destination: "/data".into(),
        source: v1::VolumeSource::Host.into(),
        propagation: propagation.into(),
        ..Default::default()
    };
    let admin = json!({"process": {"capabilities": {
        "bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"],
        "permitted": ["CAP_SYS_ADMIN"]}}});
    let script = "mkdir -p /data/in && mount -t tmpfs x /data/in && echo y >/data/in/file";
    let mut request = guest.request("c1", &spec(script, admin));
    request.volumes = vec![volume(v1::Propagation::Shared)];
    let (_, exit) = guest.run(request).await;
    assert_eq!(exit.code, 0);
    assert_eq!(fs::read_to_string(data.join("in/file")).unwrap(), "y\n");
    guest.remove("c1").await.unwrap();
    assert!(data.join("in/file").exists(), "a removal does not unmount on the host");
    let script = "until test -e /data/late/file; do sleep 0.1; done; cat /data/late/file";
    let mut request = guest.request("c2", &spec(script, json!({})));
    request.volumes = vec![volume(v1::Propagation::Slave)];
    guest.create(request).await;
    let mut stdout = guest.open(agent_api::stdio::Kind::Stdout, "c2", "", 0).await;
    guest.start("c2").await.unwrap();
    shared.mount("late");
    fs::write(data.join("late/file"), "z\n").unwrap();
    assert_eq!(stdout.read_all().await, b"z\n");
    guest.remove("c2").await.unwrap();
    assert!(data.join("late/file").exists());
}

/// A shared mount in this mount namespace, unmounted on drop.
struct Shared(PathBuf);

impl Shared {
    fn new(at: &Path) -> Self {
        let made = Self(at.to_owned());
        for args in [["-t", "tmpfs", "data"].as_slice(), ["--make-shared"].as_slice()] {
            assert!(Command::new("mount").args(args).arg(at).status().unwrap().success());
        }
        made
    }

    fn mount(&self, name: &str) {
        let at = self.0.join(name);
        fs::create_dir(&at).unwrap();
        let made = Command::new("mount").args(["-t", "tmpfs", "late"]).arg(at).status().unwrap();
        assert!(made.success());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-R").arg(&self.0).status();
    }
}
