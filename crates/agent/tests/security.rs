//! Users and privileges of processes: groups, user namespaces, privileged containers.
//!
//! Needs the same as `containers.rs`, and user namespaces in the kernel.

mod common;

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{Guest, guest, spec};
use serde_json::{Value, json};

const ALL: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
];

fn powerful(script: &str, extra: Value) -> Value {
    let sets = json!({"bounding": ALL, "effective": ALL, "permitted": ALL});
    let mut spec = spec(script, json!({"process": {"capabilities": sets}}));
    common::merge(&mut spec, extra);
    spec
}

async fn exec(guest: &mut Guest, id: &str, exec_id: &str, script: &str) -> String {
    guest.exec(id, exec_id, json!({"args": ["sh", "-c", script]})).await.unwrap();
    let output = guest.open(Kind::Stdout, id, exec_id, 0).await.read_all().await;
    String::from_utf8(output).unwrap()
}

#[tokio::test]
async fn groups_of_the_image_are_merged_unless_strict() {
    let Some(mut guest) = guest().await else { return };
    for (id, user, strict, expected) in [
        ("merged", "101", false, vec![102, 200, 1234]),
        ("strict", "101", true, vec![102, 1234]),
        ("named", "web", false, vec![102, 200, 1234]),
        ("grouped", "101:5", false, vec![5, 102, 200, 1234]),
        ("root", "0", false, vec![0, 10, 1234]),
        ("unknown", "4242", false, vec![0, 1234]),
    ] {
        let extra = json!({"process": {"user": {"uid": 0, "gid": 0, "additionalGids": [1234]}}});
        let mut request = guest.request(id, &spec("id -G; exec sleep 1000", extra));
        (request.user, request.strict_groups) = (user.into(), strict);
        let reply = guest.client.create_container(request).await.unwrap().into_inner();
        guest.start(id).await.unwrap();
        let output = guest.open(Kind::Stdout, id, "", 0).await.read_until("\n").await;
        let mut groups: Vec<u32> =
            output.split_whitespace().map(|group| group.parse().unwrap()).collect();
        groups.sort_unstable();
        assert_eq!(groups, expected, "{id}");
        assert_eq!(reply.groups[0], reply.gid, "{id}");
        let mut reported = reply.groups.clone();
        reported.sort_unstable();
        assert_eq!(reported, expected, "{id}");
        // An exec has the same groups.
        assert_eq!(exec(&mut guest, id, "e", "id -G").await, output, "{id}");
        guest.remove(id).await.unwrap();
    }
}

#[tokio::test]
async fn a_terminal_is_owned_by_its_user() {
    let Some(mut guest) = guest().await else { return };
    let script = "stat -c %u:%a $(tty); echo again > $(tty) && exec sleep 1000";
    let mut request = guest.request("c", &spec(script, json!({})));
    (request.user, request.tty) = ("web".into(), true);
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let text = guest.open(Kind::Stdout, "c", "", 0).await.read_until("again").await;
    assert!(text.starts_with("101:620"), "{text}");
}

fn userns(script: &str, extra: Value) -> Value {
    let maps = json!([{"containerID": 0, "hostID": 1000, "size": 100_000}]);
    let mut spec = powerful(
        script,
        json!({"linux": {
            "namespaces": [{"type": "user"}, {"type": "mount"}],
            "uidMappings": maps,
            "gidMappings": maps,
        }}),
    );
    common::merge(&mut spec, extra);
    spec
}

/// PID 1 of the shared PID namespace is a process of the agent, whose root is the guest's.
#[tokio::test]
async fn a_user_namespace_cannot_reach_the_guest_through_pid_1() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let script = "for file in root cwd fd/0; do ls /proc/1/$file/ >/dev/null 2>&1 && echo $file; done; \
        grep -c . /proc/1/maps; tr '\\0' ' ' </proc/1/environ; echo end";
    let mut request = guest.request("c", &userns(script, json!({})));
    request.pid_mode = v1::PidMode::Pod as i32;
    let (output, _) = guest.run(request).await;
    assert_eq!(output, "end\n");
}

#[tokio::test]
async fn containers_share_the_pods_user_namespace() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let shares = guest.dir.path().join("shares");
    std::fs::create_dir_all(shares.join("dir")).unwrap();
    let file = |path: &str, uid, mode| v1::VolumeFile {
        path: path.into(),
        mode,
        uid,
        gid: uid,
        content: b"content\n".to_vec(),
        ..Default::default()
    };
    let early = v1::WriteVolumeRequest {
        volume_id: "cfg".into(),
        files: vec![file("early", 101, 0o100_600)],
        ..Default::default()
    };
    guest.client.write_volume(early.clone()).await.unwrap();
    let script = "cat /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u:%g /bin/sh /proc/1; \
        touch /new; stat -c %u /new / /data /made /etc/cfg/early /dev/shm; \
        touch /data/new; chown 101:102 /data/new; touch /dev/shm/x; echo shm; \
        mkdir /dev/mqueue/x 2>/dev/null; ls /sys/kernel > /dev/null && echo sys; \
        mount -t tmpfs none /mnt && echo mounted; touch /sys/x 2>&1 | grep -c -i read-only; \
        echo > /dev/null; cat /etc/passwd | wc -l; hostname; ulimit -n; \
        timeout 1 nc -l -p 80; echo $?; echo end; exec sleep 1000";
    let extra = json!({"process": {
        "noNewPrivileges": true, "cwd": "/made/here", "oomScoreAdj": 500,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 8192}],
    }});
    std::fs::create_dir(guest.dir.path().join("root/mnt")).unwrap();
    let mut request = guest.request("c", &userns(script, extra.clone()));
    let share = v1::VolumeMount {
        volume_id: "dir".into(),
        destination: "/data".into(),
        source: v1::VolumeSource::Share as i32,
        ..Default::default()
    };
    let written = v1::VolumeMount {
        volume_id: "cfg".into(),
        destination: "/etc/cfg".into(),
        ..Default::default()
    };
    request.volumes = vec![share, written.clone()];
    let mut bad = request.clone();
    bad.volumes[0].propagation = v1::Propagation::Shared as i32;
    let error = guest.client.create_container(bad).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let text = guest.open(Kind::Stdout, "c", "", 0).await.read_until("end").await;
    let map = "         0       1000     100000\n";
    let rest = text.strip_prefix(&format!("{map}{map}")).unwrap_or_else(|| panic!("{text}"));
    let expected =
        "0\n0:0\n0:0\n0\n0\n0\n0\n101\n0\nshm\nsys\nmounted\n1\n2\npod-host\n4096\n143\nend\n";
    assert_eq!(rest, expected);
    // In the share the file has the container's ids.
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(shares.join("dir/new")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (101, 102));
    let output = exec(&mut guest, "c", "e", "cat /proc/self/uid_map; id; pwd").await;
    assert!(output.starts_with(map), "{output}");
    assert!(output.contains("uid=0(root) gid=0(root)") && output.ends_with("/made/here\n"));
    // Another container with another user, a terminal, a volume that was written later, and the
    // pod's PID namespace.
    let mut late = early;
    late.files = vec![file("late", 101, 0o100_400)];
    guest.client.write_volume(late).await.unwrap();
    let script = "cat /etc/cfg/late /etc/cfg/early; id; stat -c %u $(tty); cat /proc/self/uid_map; \
                  echo x > $(tty); ls -l /proc/1/root 2>&1 | wc -l; echo end; exec sleep 1000";
    let mut request = guest.request("d", &userns(script, json!({})));
    (request.user, request.tty) = ("web".into(), true);
    request.pid_mode = v1::PidMode::Pod as i32;
    request.volumes = vec![written];
    guest.create(request).await;
    guest.start("d").await.unwrap();
    let text = guest.open(Kind::Stdout, "d", "", 0).await.read_until("end").await;
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(&lines[..2], ["content", "content"], "{text}");
    assert!(lines[2].starts_with("uid=101(web) gid=102(web) groups=102(web),200(log)"), "{text}");
    assert_eq!(lines[3], "101", "{text}");
    assert!(lines[4].ends_with("100000") && lines[5] == "x", "{text}");
    // A container in the PID namespace of another one.
    let mut request = guest.request("t", &userns("ps | grep -c 'sleep [1]000'", json!({})));
    (request.pid_mode, request.pid_target) = (v1::PidMode::Target as i32, "c".into());
    assert_eq!(guest.run(request).await.0, "1\n");
    // A pod has one mapping.
    let other = json!([{"containerID": 0, "hostID": 5000, "size": 1000}]);
    let extra = json!({"linux": {"uidMappings": other}});
    let request = guest.request("o", &userns("true", extra));
    let error = guest.client.create_container(request).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    for id in ["c", "d", "t"] {
        guest.remove(id).await.unwrap();
    }
}

#[tokio::test]
async fn a_user_that_is_not_mapped_is_refused() {
    let Some(mut guest) = guest().await else { return };
    let mut request = guest.request("c", &userns("true", json!({})));
    request.user = "200000".into();
    let error = guest.client.create_container(request).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    assert!(error.message().contains("200000"), "{error}");
}

#[tokio::test]
async fn a_privileged_container_has_the_guests_devices_and_a_writable_sys() {
    let Some(mut guest) = guest().await else { return };
    let access = ["nosuid", "noexec", "nodev", "rw"];
    let extra = json!({
        "mounts": [
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": access},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": access},
        ],
        "linux": {
            "maskedPaths": [], "readonlyPaths": [],
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
        },
    });
    let script = "test -c /dev/loop-control && echo loop; test -c /dev/null && echo null; \
                  mkdir /sys/fs/cgroup/below && echo cgroup; rmdir /sys/fs/cgroup/below; \
                  cat /proc/sys/kernel/hostname > /dev/null; \
                  echo 0 > /proc/sys/vm/oom_dump_tasks && echo sysctl; \
                  mount -o bind /bin /tmp && echo mount; tty; ls /dev/pts";
    let request = guest.request("c", &powerful(script, extra));
    let (output, _) = guest.run(request).await;
    assert_eq!(output, "loop\nnull\ncgroup\nsysctl\nmount\nnot a tty\nptmx\n");
    // Not so an unprivileged one.
    let script = "ls -d /dev/loop-control /proc/asound 2>/dev/null; mkdir /sys/fs/cgroup/x 2>&1; \
                  echo 1 > /proc/sys/vm/oom_dump_tasks";
    let request = guest.request("d", &powerful(script, json!({})));
    let (output, _) = guest.run(request).await;
    assert!(output.contains("Read-only file system") && !output.contains("loop"), "{output}");
}

#[tokio::test]
async fn labels_of_unsupported_security_modules_are_refused() {
    let Some(mut guest) = guest().await else { return };
    for (extra, words) in [
        (json!({"process": {"selinuxLabel": "system_u:system_r:x:s0"}}), "support SELinux"),
        (json!({"linux": {"mountLabel": "system_u:object_r:x:s0"}}), "support SELinux"),
        (json!({"process": {"apparmorProfile": "nosuch"}}), "AppArmor"),
    ] {
        let request = guest.request("c", &spec("true", extra));
        let error = guest.client.create_container(request).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    let request = guest
        .request("c", &spec("echo ran", json!({"process": {"apparmorProfile": "unconfined"}})));
    assert_eq!(guest.run(request).await.0, "ran\n");
}
