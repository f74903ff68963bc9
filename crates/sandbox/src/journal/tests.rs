use std::sync::Arc;

use super::*;
use crate::model::{
    Access, BlockDevice, ExitView, Identity, Propagation, ShareUse, Volume, VolumeSource,
};
use crate::observe::Unobserved;
use crate::policy::{Change, ContainerPhase, Effect, tests as samples};
use crate::ports::Attachment;

fn journal() -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let journal =
        Journal::open(dir.path().join("pods"), Arc::new(Unobserved), Default::default()).unwrap();
    (dir, journal)
}

fn sample() -> Pod {
    let mut pod = samples::pod();
    let effects = vec![
        Effect::StateDir { path: "/run/x".into() },
        Effect::Network,
        Effect::Cgroup { leaf: "/cg/a/b".into(), parents: vec!["/cg/a".into()] },
        Effect::ScratchDisk { path: "/var/x/scratch.img".into() },
    ];
    pod.empty_dirs.in_guest = true;
    let ready = Change::Ready {
        attachment: Default::default(),
        kernel_release: "6.1".into(),
        trace: Vec::new(),
    };
    for change in [
        Change::Planned(effects),
        Change::VmmStarted { pid: 42, started: 99 },
        ready,
        Change::EmptyDirShared { name: "cache".into() },
        Change::ContainerPlanned(Box::new(samples::container("c"))),
    ] {
        pod.apply(change).unwrap();
    }
    pod
}

fn only(journal: &Journal) -> Found {
    let mut found = journal.load().unwrap();
    assert_eq!(found.len(), 1);
    found.remove(0)
}

#[test]
fn a_pod_comes_back_as_it_was_written() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let Found::Pod { pod, boot_id } = only(&journal) else { panic!("not understood") };
    assert_eq!(boot_id, "boot");
    assert_eq!(pod.ledger, sample().ledger);
    assert_eq!(pod.empty_dirs, sample().empty_dirs);
    assert_eq!(pod.view(), sample().view());
    assert_eq!(pod.containers["c"].view(&pod.id), sample().containers["c"].view(&pod.id));
    journal.remove(&pod.id).unwrap();
    journal.remove(&pod.id).unwrap();
    assert!(journal.load().unwrap().is_empty());
}

#[test]
fn shares_of_a_container_come_back_and_a_record_of_the_release_before_has_none() {
    let (_dir, journal) = journal();
    let mut pod = sample();
    let share = ShareUse {
        volume: 2,
        name: "f1".into(),
        source: "/data".into(),
        sub_path: "a/b".into(),
        access: Access::ReadOnly,
        propagation: Propagation::Private,
        ids: String::new(),
        strict: true,
    };
    pod.containers.get_mut("c").unwrap().shares.push(share.clone());
    journal.write(&pod, "boot").unwrap();
    let Found::Pod { pod: read, .. } = only(&journal) else { panic!("not understood") };
    assert_eq!(read.containers["c"].shares, [share]);
    let path = journal.folder("pod").join(RECORD);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let container = value["containers"][0].as_object_mut().unwrap();
    container.remove("shares").unwrap();
    container["spec"].as_object_mut().unwrap().remove("strict_volumes").unwrap();
    fs::write(&path, value.to_string()).unwrap();
    let Found::Pod { pod: read, .. } = only(&journal) else { panic!("not understood") };
    assert!(read.containers["c"].shares.is_empty());
    assert!(read.containers["c"].spec.strict_volumes.is_empty());
}

#[test]
fn a_pod_of_the_former_release_has_its_empty_dirs_shared_and_no_scratch_disk() {
    let (_dir, journal) = journal();
    let mut pod = sample();
    pod.ledger.retain(|effect| !matches!(effect, Effect::ScratchDisk { .. }));
    journal.write(&pod, "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record.as_object_mut().unwrap().remove("empty_dirs").unwrap();
    fs::write(&path, record.to_string()).unwrap();
    let Found::Pod { pod, .. } = only(&journal) else { panic!("not understood") };
    assert!(!pod.empty_dirs.in_guest && !pod.has_scratch_disk());
    assert!(sample().empty_dirs.in_guest && sample().has_scratch_disk());
}

fn unread(journal: &Journal) -> Unread {
    let Found::Unread(unread) = only(journal) else { panic!("understood") };
    *unread
}

#[test]
fn a_record_cut_anywhere_is_not_read_and_its_header_says_whose_it_is() {
    let (_dir, journal) = journal();
    let pod = sample();
    journal.write(&pod, "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    let bytes = fs::read(&path).unwrap();
    for cut in (0..bytes.len()).step_by(97) {
        fs::write(&path, &bytes[..cut]).unwrap();
        let unread = unread(&journal);
        assert_eq!(unread.header, Some(Header::of(&pod)), "cut at {cut}");
        assert!(unread.rescued.ledger.is_empty(), "cut at {cut}");
    }
}

#[test]
fn a_folder_in_the_place_of_a_record_and_a_lost_record_are_told_too() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let folder = journal.folder("pod");
    fs::write(folder.join("vmm.log"), "").unwrap();
    fs::remove_file(folder.join(RECORD)).unwrap();
    assert_eq!(unread(&journal).why, "it is missing");
    fs::create_dir_all(folder.join(RECORD).join("deep")).unwrap();
    let found = unread(&journal);
    assert!(found.why.contains("irectory") && found.header.is_some(), "{}", found.why);
    fs::remove_file(folder.join(HEADER)).unwrap();
    fs::create_dir(folder.join(HEADER)).unwrap();
    assert!(unread(&journal).header.is_none() && unread(&journal).made.is_some());
    // A pod that runs can be written all the same.
    journal.write(&sample(), "boot").unwrap();
    assert!(matches!(only(&journal), Found::Pod { .. }));
    fs::remove_file(folder.join(RECORD)).unwrap();
    fs::create_dir(folder.join(RECORD)).unwrap();
    journal.remove("pod").unwrap();
    assert!(journal.load().unwrap().is_empty());
}

#[test]
fn what_a_later_version_has_in_common_with_this_one_is_rescued() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["version"] = 99.into();
    value["spec"]["hostname"] = 5.into();
    value["ledger"].as_array_mut().unwrap().push(serde_json::json!({ "effect": "portal" }));
    let text = value.to_string();
    fs::write(&path, &text).unwrap();
    let Unread { rescued, why, .. } = unread(&journal);
    assert_eq!(rescued.ledger, sample().ledger);
    assert_eq!(rescued.meta.as_ref(), Some(&sample().spec.meta));
    assert_eq!((rescued.uid, rescued.boot_id.as_deref()), (Some(7), Some("boot")));
    assert!(rescued.spec.is_none() && why.contains("version 99"), "{why}");
    // What another pod's record says would be undone to that pod.
    fs::write(&path, text.replace("\"id\":\"pod\"", "\"id\":\"dop\"")).unwrap();
    assert!(unread(&journal).rescued.ledger.is_empty());
    let header = fs::read_to_string(journal.folder("pod").join(HEADER)).unwrap();
    fs::write(
        journal.folder("pod").join(HEADER),
        header.replace("\"id\":\"pod\"", "\"id\":\"dop\""),
    )
    .unwrap();
    assert!(unread(&journal).header.is_none());
}

#[test]
fn a_record_that_was_not_read_is_not_written_over() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    fs::write(&path, "{").unwrap();
    journal.write(&Pod { unread: true, ..sample() }, "boot").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{");
}

#[test]
fn a_header_takes_up_what_changes_and_headers_of_other_releases_are_read() {
    let (_dir, journal) = journal();
    let mut pod = sample();
    journal.write(&pod, "boot").unwrap();
    let path = journal.folder("pod").join(HEADER);
    pod.attachment =
        Arc::new(Attachment { addresses: vec!["10.0.0.9".parse().unwrap()], ..Default::default() });
    journal.write(&pod, "boot").unwrap();
    let read = || Header::decode(&fs::read(&path).unwrap(), "pod");
    assert_eq!(read().unwrap().addresses, pod.attachment.addresses);
    assert_eq!(read().unwrap().jail_uid, Some(7));
    fs::write(&path, r#"{"version":9,"id":"pod","name":"p","shape":{"round":true}}"#).unwrap();
    let header = read().unwrap();
    assert_eq!((header.name.as_str(), header.jail_uid), ("p", None));
    // Written anew by the next write.
    journal.write(&pod, "boot").unwrap();
    assert_eq!(read(), Some(Header::of(&pod)));
}

/// A pod with something in every field.
fn golden() -> Pod {
    let mut pod = sample();
    let spec = Arc::make_mut(&mut pod.spec);
    spec.meta.labels = [("app".to_owned(), "web".to_owned())].into();
    spec.cpu.shares = Some(512);
    spec.origin = serde_json::json!({ "hostname": "p" });
    pod.created_at = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_123);
    pod.netns = "/run/netns/p".into();
    pod.attachment = Arc::new(Attachment {
        netns: "/run/netns/p".into(),
        interfaces: vec![crate::ports::Interface {
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec!["10.0.0.2/24".into()],
        }],
        routes: vec![crate::ports::Route {
            destination: String::new(),
            gateway: "10.0.0.1".into(),
            interface: "eth0".into(),
        }],
        addresses: vec!["10.0.0.2".parse().unwrap()],
        dns: crate::model::Dns { servers: vec!["10.0.0.10".into()], ..Default::default() },
    });
    pod.trace =
        vec![crate::model::TracePhase { name: "boot".into(), start_us: 10, duration_us: 200 }];
    pod.ledger.push(Effect::FileServer { pid: 43, started: 100 });
    let container = pod.containers.get_mut("c").unwrap();
    let spec = Arc::make_mut(&mut container.spec);
    // Its default holds sets, whose order is another one each time.
    let oci = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
    });
    spec.oci = serde_json::from_value(oci).unwrap();
    spec.rootfs.volumes = vec!["/data".into()];
    spec.strict_volumes = vec!["/shared".into()];
    spec.origin = serde_json::json!({ "image": { "image": "web:1" } });
    spec.volumes = [
        VolumeSource::Copied { host_path: "/h/hosts".into() },
        VolumeSource::Synced { host_path: "/h/config".into() },
        VolumeSource::WrittenBack { host_path: "/h/message".into() },
        VolumeSource::Shared { host_path: "/h/data".into() },
        VolumeSource::Image { image: "/i".into(), sub_path: "a".into() },
        VolumeSource::EmptyDir {
            host_path: "/h/cache".into(),
            folder: "/h/cache".into(),
            sub_path: String::new(),
            size_limit: Some(1 << 20),
        },
        VolumeSource::HugePages { name: "huge".into() },
    ]
    .map(|source| Volume {
        container_path: "/v".into(),
        source,
        access: Access::ReadOnly,
        propagation: Propagation::HostToContainer,
    })
    .into();
    spec.devices = vec![BlockDevice {
        host_path: "/dev/x".into(),
        container_path: "/dev/y".into(),
        permissions: "rw".into(),
    }];
    container.phase = ContainerPhase::Present;
    container.started_at = Some(pod.created_at);
    container.exit = Some(ExitView {
        code: 137,
        oom_killed: true,
        at: pod.created_at,
        reason: "OOMKilled".into(),
        message: "m".into(),
    });
    (container.oom, container.drained) = (true, true);
    container.log_path = "/var/log/pods/p/c/0.log".into();
    container.user = Some(Identity { uid: 1000, gid: 1000, groups: vec![1000, 2000] });
    container.shares = vec![ShareUse {
        volume: 3,
        name: "f1".into(),
        source: "/h/data".into(),
        sub_path: String::new(),
        access: Access::ReadOnly,
        propagation: Propagation::HostToContainer,
        ids: String::new(),
        strict: true,
    }];
    pod
}

/// Version 2 as it is written. A change of it that is not additive is a new version, and this
/// fixture stays with what reads it.
const V2: &str = include_str!("fixtures/v2.json");
/// Version 2 as it was when it was new.
const V2_FIRST: &str = include_str!("fixtures/v2-first.json");

fn view_of_all(pod: &Pod) -> String {
    format!("{pod:#?}")
}

#[test]
fn the_record_is_written_as_the_fixture_has_it() {
    let written: serde_json::Value =
        serde_json::from_slice(&record::encode(&golden(), "boot").unwrap()).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(V2).unwrap();
    assert_eq!(written, fixture, "{written:#}");
}

#[test]
fn the_fixture_is_read_as_it_was_meant() {
    let (pod, boot_id) = record::decode(V2.as_bytes()).unwrap();
    assert_eq!((view_of_all(&pod), boot_id.as_str()), (view_of_all(&golden()), "boot"));
}

/// As [`golden`], with something in every field that it leaves empty, and one of each kind.
fn full() -> Pod {
    use crate::model::*;
    let text = |text: &str| text.to_owned();
    let mut pod = golden();
    pod.reason = text("why");
    let spec = Arc::make_mut(&mut pod.spec);
    let (namespace, uid) = (text("prod"), text("1-2"));
    let annotations = [(text("note"), text("x"))].into();
    spec.meta = Meta { namespace, uid, attempt: 1, annotations, ..spec.meta.clone() };
    (spec.handler, spec.cgroup_parent) = (text("vm"), text("/kubepods/pod1"));
    spec.log_directory = text("/var/log/pods/p");
    spec.sysctls = [(text("net.core.somaxconn"), text("9"))].into();
    let (servers, searches, options) = (vec![text("1.1.1.1")], vec![text("a.b")], vec![text("o")]);
    spec.dns = Dns { servers, searches, options };
    spec.ports = [
        (Protocol::Tcp, None),
        (Protocol::Udp, Some("127.0.0.1".parse().unwrap())),
        (Protocol::Sctp, Some("::1".parse().unwrap())),
    ]
    .map(|(protocol, host_ip)| PortMapping { protocol, container_port: 1, host_port: 2, host_ip })
    .into();
    (spec.vcpus, spec.memory_mib) = (Some(2), Some(512));
    spec.cpu = CpuLimits { quota_us: Some(1), period_us: Some(2), shares: Some(3) };
    spec.host = Some(HostNamespaces { network: true, pid: false, ipc: true });
    let attachment = Arc::make_mut(&mut pod.attachment);
    attachment.routes[0].destination = text("10.0.0.0/8");
    attachment.addresses.push("fd00::2".parse().unwrap());
    let container = pod.containers.get_mut("c").unwrap();
    container.resources = serde_json::from_value(serde_json::json!({
        "memory": { "limit": 1 << 30, "swap": 1 << 31 },
        "cpu": { "shares": 512, "quota": 1000, "period": 2000, "cpus": "0-1" },
        "pids": { "limit": 99 },
        "unified": { "memory.high": "7" },
    }))
    .unwrap();
    let spec = Arc::make_mut(&mut container.spec);
    spec.meta = Meta { name: text("web"), attempt: 2, ..spec.meta.clone() };
    spec.meta.labels = [(text("l"), text("v"))].into();
    spec.oci = serde_json::from_value(serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["sh", "-c", "x"], "env": ["A=1"], "cwd": "/srv", "terminal": true,
            "user": { "uid": 1, "gid": 2, "additionalGids": [3] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 2, "soft": 1 }],
            "noNewPrivileges": true,
        },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "annotations": { "a": "b" },
        "linux": { "namespaces": [{ "type": "mount" }], "maskedPaths": ["/proc/kcore"] },
    }))
    .unwrap();
    (spec.user, spec.pid) = (text("app:web"), PidMode::Target(text("d")));
    (spec.stdin, spec.stdin_once, spec.tty, spec.strict_groups) = (true, true, true, true);
    (spec.log_path, spec.image_name, spec.image_id) = (text("c/0.log"), text("web:1"), text("sha"));
    spec.stop_signal = 3;
    spec.volumes[0].access = Access::ReadWrite;
    spec.volumes[0].propagation = Propagation::Bidirectional;
    spec.volumes[1].access = Access::ReadOnlyRecursive;
    spec.volumes[1].propagation = Propagation::Private;
    container.shares[0].ids = text("0 100000 65536");
    container.shares[0].sub_path = text("a/b");
    let phases =
        [(ContainerPhase::Creating, PidMode::Pod), (ContainerPhase::Removing, PidMode::Node)];
    for (phase, pid) in phases {
        let mut other = samples::container(&format!("{phase:?}"));
        let spec = Arc::make_mut(&mut other.spec);
        spec.oci = serde_json::from_value(serde_json::json!({ "ociVersion": "1.0.2" })).unwrap();
        (spec.pid, spec.rootfs.read_only) = (pid, true);
        other.phase = phase;
        pod.containers.insert(other.id.clone(), other);
    }
    pod
}

/// Bytes that the last release has written whose records were made of its live types.
const V2_FULL: &[u8] = include_bytes!("fixtures/v2-full.json");
/// A header as it is written: of each release's own, readers take what they know.
const HEADER_V1: &[u8] = include_bytes!("fixtures/header-v1.json");

#[test]
fn every_field_is_written_and_read_as_the_release_before_did() {
    assert_eq!(record::encode(&full(), "boot").unwrap(), V2_FULL);
    let (pod, _) = record::decode(V2_FULL).unwrap();
    assert_eq!(view_of_all(&pod), view_of_all(&full()));
    assert_eq!(record::encode(&pod, "boot").unwrap(), V2_FULL);
    let header = Header::of(&full());
    assert_eq!(serde_json::to_vec(&header).unwrap(), HEADER_V1);
    assert_eq!(Header::decode(HEADER_V1, "pod"), Some(header));
}

#[test]
fn every_phase_and_a_pod_with_nothing_come_back() {
    use crate::policy::Phase;
    for phase in [Phase::Starting, Phase::Ready, Phase::Stopping, Phase::NotReady, Phase::Removing]
    {
        for pod in [full(), samples::pod()] {
            let pod = Pod { phase, ..pod };
            let (read, _) = record::decode(&record::encode(&pod, "boot").unwrap()).unwrap();
            assert_eq!(view_of_all(&read), view_of_all(&pod));
        }
    }
}

#[test]
fn a_part_of_the_oci_spec_that_is_not_understood_is_named_and_the_rest_is_rescued() {
    let mut value: serde_json::Value = serde_json::from_slice(V2_FULL).unwrap();
    value["containers"][0]["spec"]["oci"]["process"] = 5.into();
    let error = record::decode(value.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("spec of container"), "{error}");
    assert_eq!(record::rescue(value.to_string().as_bytes(), "pod").ledger, full().ledger);
    value["containers"][0]["spec"]["oci"] = serde_json::json!({ "ociVersion": "1.0.2" });
    value["containers"][0]["resources"] = 5.into();
    let error = record::decode(value.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("resources of container"), "{error}");
    value["containers"][0].as_object_mut().unwrap().remove("resources").unwrap();
    assert!(record::decode(value.to_string().as_bytes()).is_ok());
}

#[test]
fn records_of_the_first_release_with_this_version_are_read_with_defaults() {
    let (pod, _) = record::decode(V2_FIRST.as_bytes()).unwrap();
    let mut expected = golden();
    let spec = Arc::make_mut(&mut expected.spec);
    (spec.cpu, spec.host) = (Default::default(), None);
    expected.empty_dirs = Default::default();
    expected
        .ledger
        .retain(|effect| !matches!(effect, Effect::ScratchDisk { .. } | Effect::FileServer { .. }));
    let container = expected.containers.get_mut("c").unwrap();
    container.shares.clear();
    let spec = Arc::make_mut(&mut container.spec);
    spec.rootfs.volumes.clear();
    spec.strict_volumes.clear();
    spec.volumes.truncate(5);
    assert_eq!(view_of_all(&pod), view_of_all(&expected));
}

#[test]
fn a_field_that_is_missing_has_its_default() {
    let mut record: serde_json::Value = serde_json::from_str(V2).unwrap();
    for name in ["reason", "attachment", "kernel_release", "trace", "empty_dirs"] {
        record.as_object_mut().unwrap().remove(name).unwrap();
    }
    let container = record["containers"][0].as_object_mut().unwrap();
    let names = ["started_at", "exit", "drained", "oom", "log_path", "resources", "user", "shares"];
    for name in names {
        container.remove(name).unwrap();
    }
    let (pod, _) = record::decode(record.to_string().as_bytes()).unwrap();
    assert_eq!(*pod.attachment, Attachment::default());
    assert!(pod.containers["c"].exit.is_none() && !pod.containers["c"].drained);
    // What the pod has cost is never taken for nothing.
    record.as_object_mut().unwrap().remove("ledger").unwrap();
    assert!(record::decode(record.to_string().as_bytes()).is_err());
}

#[test]
fn a_folder_without_a_record_is_empty_and_a_torn_new_one_does_not_count() {
    let (_dir, journal) = journal();
    fs::create_dir(journal.folder("pod")).unwrap();
    fs::write(journal.folder("pod").join("record.new"), "{").unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    fs::create_dir(journal.folder("lost+found")).unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    journal.write_header(&sample()).unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    journal.write(&sample(), "boot").unwrap();
    assert!(matches!(only(&journal), Found::Pod { .. }));
}
