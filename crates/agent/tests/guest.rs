//! The agent as PID 1 of a microVM: boot, disks, limits, OOM events, device rules, hot-unplug,
//! power-off, streams, image and block volumes, user namespaces. Few boots, as booting takes most
//! of the time.
//!
//! Needs KVM, root, nacelle-vmm, mkfs.erofs and mke2fs in PATH, a static busybox, and NACELLE_GUEST
//! with the guest's kernel and initramfs. The lab has all of these: the story
//! `agent::the agent's tests as PID 1 of a VM pass` runs them with `--ignored`.

mod common;

use std::os::fd::AsFd;

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{Guest, boot, spec};
use serde_json::json;

#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn a_guest_boots_enforces_limits_and_powers_off() {
    let _guard = common::serialize().await;
    let mut guest = boot().await;
    identity(&mut guest).await;
    disks(&mut guest).await;
    memory_reserve(&mut guest).await;
    memory_limit(&mut guest).await;
    process_limit(&mut guest).await;
    cpu_limit(&mut guest).await;
    device_rules(&mut guest).await;
    images_and_block_volumes(&mut guest).await;
    user_namespace(&mut guest).await;
    release(&mut guest).await;
    power_off(&mut guest).await;
}

#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn a_guest_serves_many_execs_and_much_output() {
    let _guard = common::serialize().await;
    let mut guest = boot().await;
    many_execs(&mut guest).await;
    throughput(&mut guest).await;
    power_off(&mut guest).await;
}

#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn a_stock_distribution_kernel_runs_containers() {
    let _guard = common::serialize().await;
    let boot = common::boot_with("debian/vmlinuz", "initramfs-debian.cpio", &[]);
    let mut guest = boot.await;
    identity(&mut guest).await;
    disks(&mut guest).await;
    memory_limit(&mut guest).await;
    power_off(&mut guest).await;
}

#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn disks_can_be_plugged_and_unplugged_while_the_guest_runs() {
    let _guard = common::serialize().await;
    let mut guest = boot().await;
    let control = guest.dir.path().join("control");
    let vmm = vmm_api::client::Client::connect(&control, common::TIMEOUT).unwrap();
    let scratch = guest.dir.path().join("scratch");
    for round in 0..3 {
        let serial = format!("hot-{round}");
        let file = guest.dir.path().join(&serial);
        std::fs::copy(&scratch, &file).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(file).unwrap();
        let disk =
            vmm_api::DiskConfig { serial: serial.clone(), file: vmm_api::Fd(0), read_only: false };
        vmm.call(&vmm_api::Request::AddDisk { disk }, &[file.as_fd()]).unwrap();
        let rescan =
            v1::RescanDevicesRequest { disk_serials: vec![serial.clone()], macs: Vec::new() };
        guest.client.rescan_devices(rescan).await.unwrap();
        let mut request = guest.request("hot", &spec("touch /x; df / | wc -l", json!({})));
        request.rootfs.as_mut().unwrap().upper_serial = serial.clone();
        assert_eq!(guest.run(request).await.0, "2\n");
        guest.remove("hot").await.unwrap();
        guest.client.release_device(release_of(&serial)).await.unwrap();
        vmm.order(&vmm_api::Request::RemoveDevice { id: serial }).unwrap();
    }
    power_off(&mut guest).await;
}

/// A NIC that is present at boot; the host's end is a tap.
#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn a_nic_gets_name_addresses_and_routes() {
    let _guard = common::serialize().await;
    let boot = common::boot_with("vmlinux", "initramfs.cpio", &["--tap", TAP]);
    let mut guest = boot.await;
    for args in [
        &["address", "add", "10.55.0.1/24", "dev", TAP][..],
        &["address", "add", "fd55::1/64", "dev", TAP, "nodad"],
        &["address", "add", "10.66.0.1/32", "dev", "lo"],
        &["link", "set", TAP, "up"],
    ] {
        assert!(std::process::Command::new("ip").args(args).status().unwrap().success());
    }
    let request = guest.request("mac", &spec("cat /sys/class/net/eth0/address", json!({})));
    let mac = guest.run(request).await.0.trim().to_owned();
    let route = |destination: &str, gateway: &str| v1::Route {
        destination: destination.into(),
        gateway: gateway.into(),
        interface: "pod0".into(),
    };
    let request = v1::ConfigurePodRequest {
        pod_id: "pod".into(),
        interfaces: vec![v1::Interface {
            mac,
            name: "pod0".into(),
            mtu: 1400,
            addresses: vec!["10.55.0.2/24".into(), "fd55::2/64".into()],
        }],
        // The second gateway is outside of the interface's prefixes.
        routes: vec![route("", "10.55.0.1"), route("10.77.0.0/16", "10.66.0.1")],
        ..Default::default()
    };
    guest.client.configure_pod(request.clone()).await.unwrap();
    guest.client.configure_pod(request).await.unwrap();
    let mut replies = Vec::new();
    for (id, address) in [("v4", "10.55.0.1"), ("routed", "10.66.0.1"), ("v6", "fd55::1")] {
        let host = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
        let port = host.local_addr().unwrap().port();
        let script = format!("ip route; cat /sys/class/net/pod0/mtu; nc {address} {port}");
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            host.accept().await.unwrap().0.write_all(b"hello from the host").await.unwrap();
        });
        let request = guest.request(id, &spec(&script, json!({})));
        replies.push(guest.run(request).await.0);
    }
    for reply in &replies {
        assert!(reply.contains("default via 10.55.0.1 dev pod0"), "{reply}");
        assert!(reply.contains("10.77.0.0/16 via 10.66.0.1 dev pod0 onlink"), "{reply}");
        assert!(reply.ends_with("1400\nhello from the host"), "{reply}");
    }
    let stats = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let nic = &stats.pod.unwrap().interfaces[0];
    assert!(nic.name == "pod0" && nic.rx_bytes > 0 && nic.tx_bytes > 0, "{nic:?}");
    power_off(&mut guest).await;
}

async fn images_and_block_volumes(guest: &mut Guest) {
    let image = |sub_path: &str, destination: &str| v1::VolumeMount {
        volume_id: "disk0".into(),
        destination: destination.into(),
        sub_path: sub_path.into(),
        source: v1::VolumeSource::Image as i32,
        ..Default::default()
    };
    let disk = |path: &str, permissions: &str| v1::BlockDevice {
        disk_serial: "disk1".into(),
        path: path.into(),
        permissions: permissions.into(),
    };
    let script = "/i/bin/ls /e/passwd; touch /i/x 2>&1; ls -l /dev/xvda | cut -c1-10; \
                  dd if=/dev/xvda bs=1k skip=1 count=1 2>/dev/null | wc -c; \
                  dd if=/dev/zero of=/srv/disk bs=1k count=1 2>&1 | grep -c permitted; \
                  cat /srv/disk | head -c 10 | wc -c";
    let mut request = guest.request("volumes", &spec(script, json!({})));
    request.volumes = vec![image("", "/i"), image("etc", "/e")];
    request.block_devices = vec![disk("/dev/xvda", "r"), disk("/srv/disk", "rm")];
    let (output, _) = guest.run(request.clone()).await;
    let lines = "/e/passwd\ntouch: /i/x: Read-only file system\nbrw-rw----\n1024\n1\n10\n";
    assert_eq!(output, lines);
    guest.remove("volumes").await.unwrap();
    request.volumes = vec![image("nosuch", "/i")];
    let error = guest.client.create_container(request).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound, "{error}");
}

async fn user_namespace(guest: &mut Guest) {
    let maps = json!([{"containerID": 0, "hostID": 1000, "size": 100_000}]);
    let capabilities = ["CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_FOWNER"];
    let extra = json!({
        "process": {"capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        }},
        "linux": {"namespaces": [{"type": "user"}], "uidMappings": maps, "gidMappings": maps},
    });
    let script = "cat /proc/self/uid_map; stat -c %u:%g / /etc/passwd /v/key /i/etc/passwd; \
                  chown 101:102 /etc/passwd; echo x >> /etc/passwd; stat -c %u:%g /etc/passwd; \
                  touch /fresh; stat -c %u:%g /fresh";
    for (id, upper) in [("mapped", "disk1"), ("mapped-tmpfs", "")] {
        let mut request = guest.request(id, &spec(script, extra.clone()));
        request.rootfs.as_mut().unwrap().upper_serial = upper.into();
        guest
            .client
            .write_volume(v1::WriteVolumeRequest {
                volume_id: "mapped.v".into(),
                files: vec![v1::VolumeFile {
                    path: "key".into(),
                    mode: 0o100_644,
                    uid: 7,
                    ..Default::default()
                }],
                ..Default::default()
            })
            .await
            .unwrap();
        request.volumes = vec![
            v1::VolumeMount {
                volume_id: "mapped.v".into(),
                destination: "/v".into(),
                ..Default::default()
            },
            v1::VolumeMount {
                volume_id: "disk0".into(),
                destination: "/i".into(),
                source: v1::VolumeSource::Image as i32,
                ..Default::default()
            },
        ];
        let (output, _) = guest.run(request).await;
        let lines = "         0       1000     100000\n0:0\n0:0\n7:0\n0:0\n101:102\n0:0\n";
        assert_eq!(output, lines, "{id}");
        guest.remove(id).await.unwrap();
    }
}

const TAP: &str = "ncagent0";

async fn power_off(guest: &mut Guest) {
    let _ = guest.client.shutdown(v1::ShutdownRequest {}).await;
    let start = std::time::Instant::now();
    let status = loop {
        if let Some(status) = guest.child.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < common::TIMEOUT, "the VM does not exit");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert!(status.success(), "{status}");
}

async fn identity(guest: &mut Guest) {
    let hello = guest.client.hello(v1::HelloRequest { protocol: 1 }).await.unwrap().into_inner();
    println!("kernel {}, up {} ms", hello.kernel_release, hello.uptime_ms);
    assert!(!hello.configured);
    let request = v1::ConfigurePodRequest {
        pod_id: "pod".into(),
        hostname: "pod-host".into(),
        unix_time_ns: 2_000_000_000_000_000_000,
        entropy: vec![7; 64],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        ..Default::default()
    };
    guest.client.configure_pod(request.clone()).await.unwrap();
    guest.client.configure_pod(request.clone()).await.unwrap();
    let other = v1::ConfigurePodRequest { pod_id: "other".into(), ..request.clone() };
    let error = guest.client.configure_pod(other).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::AlreadyExists);
    let bad = v1::ConfigurePodRequest {
        sysctls: [("kernel.core_pattern".to_owned(), "|/x".to_owned())].into(),
        ..request
    };
    let error = guest.client.configure_pod(bad).await.unwrap_err();
    assert!(error.message().contains("kernel.core_pattern"), "{error}");
}

async fn disks(guest: &mut Guest) {
    let script = "hostname; date +%Y; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  touch /new && ls /new; df -k / | tail -1 | awk '{print $1}'; \
                  dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null; ls /dev/vda 2>&1; \
                  cat /proc/self/cgroup; mount | grep -c cgroup2; sleep 1000";
    let mut request = guest.request("disks", &spec(script, json!({})));
    request.rootfs.as_mut().unwrap().upper_serial = "disk1".into();
    guest.create(request.clone()).await;
    guest.start("disks").await.unwrap();
    let mut stdout = guest.open(Kind::Stdout, "disks", "", 0).await;
    let text = stdout.read_until("0::/\n1\n").await;
    for line in ["pod-host\n2033\n0\n/new\noverlay\n", "/dev/vda: No such file"] {
        assert!(text.contains(line), "{line:?} is not in {text:?}");
    }
    let stats = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let own = stats.containers.iter().find(|each| each.container_id == "disks").unwrap();
    let layer = own.writable_layer.unwrap();
    assert!(layer.used_bytes > 20 << 20 && layer.used_bytes < 100 << 20, "{layer:?}");
    assert!(own.pids >= 1 && own.memory.unwrap().usage > 0 && own.cpu.unwrap().usage_ns > 0);
    let error = guest.client.release_device(release_of("disk1")).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    guest.remove("disks").await.unwrap();
}

fn release_of(serial: &str) -> v1::ReleaseDeviceRequest {
    v1::ReleaseDeviceRequest { disk_serial: serial.into(), ..Default::default() }
}

/// A container without a limit cannot take the agent's memory.
async fn memory_reserve(guest: &mut Guest) {
    guest.client.hello(v1::HelloRequest { protocol: 1 }).await.unwrap();
    let pod = "/proc/1/root/sys/fs/cgroup/pod/memory.max";
    let script = format!(
        "while grep -q max {pod}; do sleep 0.1; done; cat {pod}; \
         awk '/^MemTotal/ {{ print $2 * 1024 }}' /proc/meminfo"
    );
    let own = ["CAP_SYS_PTRACE"];
    let sets = json!({"bounding": own, "effective": own, "permitted": own});
    let caps = json!({"process": {"capabilities": sets}});
    let mut request = guest.request("reserve", &spec(&script, caps));
    request.pid_mode = v1::PidMode::Node as i32;
    let (output, _) = guest.run(request).await;
    let numbers: Vec<u64> = output.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 2, "{output}");
    let reserve = numbers[1] - numbers[0];
    assert!((8 << 20..=32 << 20).contains(&reserve), "{output}");
    guest.remove("reserve").await.unwrap();
}

async fn memory_limit(guest: &mut Guest) {
    let limit = json!({"linux": {"resources": {"memory": {"limit": 32 << 20}}}});
    // A child is killed first; init continues and must not get an exit event.
    let script = "tail /dev/zero; echo child $?; exec tail /dev/zero";
    let request = guest.request("oom", &spec(script, limit));
    guest.create(request).await;
    guest.start("oom").await.unwrap();
    let events = guest.events_until("oom", "").await;
    let kinds: Vec<_> = events
        .iter()
        .filter_map(|event| match event.event.as_ref()? {
            v1::event::Event::Oom(oom) => (oom.container_id == "oom").then_some("oom"),
            v1::event::Event::Exit(exit) => (exit.container_id == "oom").then_some("exit"),
        })
        .collect();
    assert_eq!(kinds.last(), Some(&"exit"));
    assert!(kinds.len() >= 2 && kinds[..kinds.len() - 1].iter().all(|kind| *kind == "oom"));
    let exit = guest.exit("oom", "").await;
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, 9, true));
    let output = guest.open(Kind::Stdout, "oom", "", 0).await.read_all().await;
    assert_eq!(String::from_utf8(output).unwrap(), "child 137\n");
    guest.remove("oom").await.unwrap();
}

async fn process_limit(guest: &mut Guest) {
    let limit = json!({"linux": {"resources": {"pids": {"limit": 6}}}});
    let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; echo started; wait";
    let request = guest.request("pids", &spec(script, limit));
    guest.create(request).await;
    guest.start("pids").await.unwrap();
    let mut stderr = guest.open(Kind::Stderr, "pids", "", 0).await;
    stderr.read_until("fork").await;
    let stats = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let own = stats.containers.iter().find(|each| each.container_id == "pids").unwrap();
    assert!(own.pids <= 6, "{}", own.pids);
    guest.remove("pids").await.unwrap();
}

async fn cpu_limit(guest: &mut Guest) {
    let limit = json!({"linux": {"resources": {"cpu": {"quota": 10_000, "period": 100_000}}}});
    let script = "cat /sys/fs/cgroup/cpu.max; while :; do :; done";
    let request = guest.request("cpu", &spec(script, limit));
    guest.create(request).await;
    guest.start("cpu").await.unwrap();
    let mut stdout = guest.open(Kind::Stdout, "cpu", "", 0).await;
    assert_eq!(stdout.read_until("\n").await, "10000 100000\n");
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let stats = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let own = stats.containers.iter().find(|each| each.container_id == "cpu").unwrap();
    let cpu = own.cpu.unwrap();
    assert!(cpu.throttled_periods > 0, "{cpu:?}");
    let update = v1::UpdateContainerRequest {
        container_id: "cpu".into(),
        linux_resources: br#"{"cpu":{"quota":20000,"period":100000}}"#.to_vec(),
    };
    guest.client.update_container(update).await.unwrap();
    guest.exec("cpu", "see", json!({"args": ["cat", "/sys/fs/cgroup/cpu.max"]})).await.unwrap();
    let seen = guest.open(Kind::Stdout, "cpu", "see", 0).await.read_all().await;
    assert_eq!(seen, b"20000 100000\n");
    guest.remove("cpu").await.unwrap();
}

async fn device_rules(guest: &mut Guest) {
    let rules = json!({
        "process": {"capabilities": {
            "bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"],
        }},
        "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}},
    });
    let script = "mknod /tmp/disk b 254 0 && echo made; dd if=/tmp/disk count=1 2>&1; \
                  echo x > /dev/null && echo null";
    let request = guest.request("devices", &spec(script, rules));
    let (output, _) = guest.run(request).await;
    assert!(output.contains("made\n") && output.contains("null\n"), "{output}");
    assert!(output.contains("Operation not permitted"), "{output}");
    guest.remove("devices").await.unwrap();
}

async fn many_execs(guest: &mut Guest) {
    let request = guest.request("execs", &spec("sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("execs").await.unwrap();
    let start = std::time::Instant::now();
    for round in 0..20 {
        let id = format!("e{round}");
        guest.exec("execs", &id, json!({"args": ["echo", "x"]})).await.unwrap();
        assert_eq!(guest.open(Kind::Stdout, "execs", &id, 0).await.read_all().await, b"x\n");
        guest.open(Kind::Stderr, "execs", &id, 0).await.read_all().await;
        let events = guest.events_until("execs", &id).await;
        let sequence = events.last().unwrap().sequence;
        guest.client.ack_events(v1::AckEventsRequest { sequence }).await.unwrap();
    }
    println!("exec round trip: {:?}", start.elapsed() / 20);
    let list = guest.client.list_processes(v1::ListProcessesRequest {}).await.unwrap();
    let left = list.into_inner().processes.len();
    assert_eq!(left, 1, "collected execs are removed");
    guest.remove("execs").await.unwrap();
}

async fn throughput(guest: &mut Guest) {
    const MIB: usize = 16;
    let script = format!("dd if=/dev/zero bs=1M count={MIB} 2>/dev/null");
    let request = guest.request("bulk", &spec(&script, json!({})));
    let start = std::time::Instant::now();
    let (output, _) = guest.run(request).await;
    assert_eq!(output.len(), MIB << 20);
    println!("{MIB} MiB of output: {:?}", start.elapsed());
    guest.remove("bulk").await.unwrap();
}

async fn release(guest: &mut Guest) {
    for serial in ["disk0", "disk1"] {
        guest.client.release_device(release_of(serial)).await.unwrap();
        // Idempotent.
        guest.client.release_device(release_of(serial)).await.unwrap();
    }
    let request = guest.request("none", &spec("true", json!({})));
    let error = guest.client.create_container(request).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound, "{error}");
}
