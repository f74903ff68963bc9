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
fn a_written_pod_is_read_back() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let Found::Pod { pod, boot_id } = only(&journal) else { panic!("unreadable") };
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
fn shares_of_a_container_are_read_back_and_default_to_none() {
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
    let Found::Pod { pod: read, .. } = only(&journal) else { panic!("unreadable") };
    assert_eq!(read.containers["c"].shares, [share]);
    let path = journal.directory("pod").join(RECORD);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let container = value["containers"][0].as_object_mut().unwrap();
    container.remove("shares").unwrap();
    container["spec"].as_object_mut().unwrap().remove("strict_volumes").unwrap();
    fs::write(&path, value.to_string()).unwrap();
    let Found::Pod { pod: read, .. } = only(&journal) else { panic!("unreadable") };
    assert!(read.containers["c"].shares.is_empty());
    assert!(read.containers["c"].spec.strict_volumes.is_empty());
}

#[test]
fn a_pod_of_an_earlier_release_has_shared_empty_dirs_and_no_scratch_disk() {
    let (_dir, journal) = journal();
    let mut pod = sample();
    pod.ledger.retain(|effect| !matches!(effect, Effect::ScratchDisk { .. }));
    journal.write(&pod, "boot").unwrap();
    let path = journal.directory("pod").join(RECORD);
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record.as_object_mut().unwrap().remove("empty_dirs").unwrap();
    fs::write(&path, record.to_string()).unwrap();
    let Found::Pod { pod, .. } = only(&journal) else { panic!("unreadable") };
    assert!(!pod.empty_dirs.in_guest && !pod.has_scratch_disk());
    assert!(sample().empty_dirs.in_guest && sample().has_scratch_disk());
}

fn unreadable(journal: &Journal) -> Unreadable {
    let Found::Unreadable(unreadable) = only(journal) else { panic!("readable") };
    *unreadable
}

#[test]
fn a_truncated_record_is_unreadable_and_its_header_is_read() {
    let (_dir, journal) = journal();
    let pod = sample();
    journal.write(&pod, "boot").unwrap();
    let path = journal.directory("pod").join(RECORD);
    let bytes = fs::read(&path).unwrap();
    for cut in (0..bytes.len()).step_by(97) {
        fs::write(&path, &bytes[..cut]).unwrap();
        let unreadable = unreadable(&journal);
        assert_eq!(unreadable.header, Some(Header::of(&pod)), "cut at {cut}");
        assert!(unreadable.partial.ledger.is_empty(), "cut at {cut}");
    }
}

#[test]
fn a_directory_in_place_of_a_record_and_a_missing_record_are_unreadable() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let directory = journal.directory("pod");
    fs::write(directory.join("vmm.log"), "").unwrap();
    fs::remove_file(directory.join(RECORD)).unwrap();
    assert_eq!(unreadable(&journal).why, "it is missing");
    fs::create_dir_all(directory.join(RECORD).join("deep")).unwrap();
    let found = unreadable(&journal);
    assert!(found.why.contains("irectory") && found.header.is_some(), "{}", found.why);
    fs::remove_file(directory.join(HEADER)).unwrap();
    fs::create_dir(directory.join(HEADER)).unwrap();
    assert!(unreadable(&journal).header.is_none() && unreadable(&journal).made.is_some());
    // A running pod can be written anyway.
    journal.write(&sample(), "boot").unwrap();
    assert!(matches!(only(&journal), Found::Pod { .. }));
    fs::remove_file(directory.join(RECORD)).unwrap();
    fs::create_dir(directory.join(RECORD)).unwrap();
    journal.remove("pod").unwrap();
    assert!(journal.load().unwrap().is_empty());
}

#[test]
fn readable_fields_of_a_later_version_are_kept() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.directory("pod").join(RECORD);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["version"] = 99.into();
    value["spec"]["hostname"] = 5.into();
    value["ledger"].as_array_mut().unwrap().push(serde_json::json!({ "effect": "portal" }));
    let text = value.to_string();
    fs::write(&path, &text).unwrap();
    let Unreadable { partial, why, .. } = unreadable(&journal);
    assert_eq!(partial.ledger, sample().ledger);
    assert_eq!(partial.meta.as_ref(), Some(&sample().spec.meta));
    assert_eq!((partial.uid, partial.boot_id.as_deref()), (Some(7), Some("boot")));
    assert!(partial.spec.is_none() && why.contains("version 99"), "{why}");
    // Effects of another pod's record must not be undone.
    fs::write(&path, text.replace("\"id\":\"pod\"", "\"id\":\"dop\"")).unwrap();
    assert!(unreadable(&journal).partial.ledger.is_empty());
    let header = fs::read_to_string(journal.directory("pod").join(HEADER)).unwrap();
    fs::write(
        journal.directory("pod").join(HEADER),
        header.replace("\"id\":\"pod\"", "\"id\":\"dop\""),
    )
    .unwrap();
    assert!(unreadable(&journal).header.is_none());
}

#[test]
fn an_unreadable_record_is_not_overwritten() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.directory("pod").join(RECORD);
    fs::write(&path, "{").unwrap();
    journal.write(&Pod { unreadable: true, ..sample() }, "boot").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{");
}

#[test]
fn a_header_is_updated_and_headers_of_other_releases_are_read() {
    let (_dir, journal) = journal();
    let mut pod = sample();
    journal.write(&pod, "boot").unwrap();
    let path = journal.directory("pod").join(HEADER);
    pod.attachment =
        Arc::new(Attachment { addresses: vec!["10.0.0.9".parse().unwrap()], ..Default::default() });
    journal.write(&pod, "boot").unwrap();
    let read = || Header::decode(&fs::read(&path).unwrap(), "pod");
    assert_eq!(read().unwrap().addresses, pod.attachment.addresses);
    assert_eq!(read().unwrap().jail_uid, Some(7));
    fs::write(&path, r#"{"version":9,"id":"pod","name":"p","shape":{"round":true}}"#).unwrap();
    let header = read().unwrap();
    assert_eq!((header.name.as_str(), header.jail_uid), ("p", None));
    // Updated by the next write.
    journal.write(&pod, "boot").unwrap();
    assert_eq!(read(), Some(Header::of(&pod)));
}

/// A pod with a value in most fields.
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
    // The default has sets, whose order is random.
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
            directory: "/h/cache".into(),
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

/// Version 2 as written now. A change that is not additive needs a new version; then this fixture
/// stays with the code that reads it.
const V2: &str = include_str!("fixtures/v2.json");
/// Version 2 as first released.
const V2_FIRST: &str = include_str!("fixtures/v2-first.json");

fn view_of_all(pod: &Pod) -> String {
    format!("{pod:#?}")
}

#[test]
fn the_written_record_matches_the_fixture() {
    let written: serde_json::Value =
        serde_json::from_slice(&record::encode(&golden(), "boot").unwrap()).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(V2).unwrap();
    assert_eq!(written, fixture, "{written:#}");
}

#[test]
fn the_fixture_is_read_completely() {
    let (pod, boot_id) = record::decode(V2.as_bytes()).unwrap();
    assert_eq!((view_of_all(&pod), boot_id.as_str()), (view_of_all(&golden()), "boot"));
}

/// As [`golden`], with a value in every field and one of each variant.
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

/// A record of the last release whose record types were the in-memory types.
const V2_FULL: &[u8] = include_bytes!("fixtures/v2-full.json");
/// The current header.
const HEADER_V1: &[u8] = include_bytes!("fixtures/header-v1.json");

#[test]
fn every_field_has_the_format_of_the_previous_release() {
    assert_eq!(record::encode(&full(), "boot").unwrap(), V2_FULL);
    let (pod, _) = record::decode(V2_FULL).unwrap();
    assert_eq!(view_of_all(&pod), view_of_all(&full()));
    assert_eq!(record::encode(&pod, "boot").unwrap(), V2_FULL);
    let header = Header::of(&full());
    assert_eq!(serde_json::to_vec(&header).unwrap(), HEADER_V1);
    assert_eq!(Header::decode(HEADER_V1, "pod"), Some(header));
}

#[test]
fn every_phase_and_an_empty_pod_are_read_back() {
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
fn an_invalid_oci_object_is_named_in_the_error_and_other_fields_are_kept() {
    let mut value: serde_json::Value = serde_json::from_slice(V2_FULL).unwrap();
    value["containers"][0]["spec"]["oci"]["process"] = 5.into();
    let error = record::decode(value.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("spec of container"), "{error}");
    assert_eq!(record::decode_partial(value.to_string().as_bytes(), "pod").ledger, full().ledger);
    value["containers"][0]["spec"]["oci"] = serde_json::json!({ "ociVersion": "1.0.2" });
    value["containers"][0]["resources"] = 5.into();
    let error = record::decode(value.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("resources of container"), "{error}");
    value["containers"][0].as_object_mut().unwrap().remove("resources").unwrap();
    assert!(record::decode(value.to_string().as_bytes()).is_ok());
}

#[test]
fn records_of_the_first_release_of_this_version_are_read_with_defaults() {
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
    // A missing ledger is an error: effects must not be lost.
    record.as_object_mut().unwrap().remove("ledger").unwrap();
    assert!(record::decode(record.to_string().as_bytes()).is_err());
}

#[test]
fn a_directory_without_a_record_is_empty_despite_an_unrenamed_one() {
    let (_dir, journal) = journal();
    fs::create_dir(journal.directory("pod")).unwrap();
    fs::write(journal.directory("pod").join("record.new"), "{").unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    fs::create_dir(journal.directory("lost+found")).unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    journal.write_header(&sample()).unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    journal.write(&sample(), "boot").unwrap();
    assert!(matches!(only(&journal), Found::Pod { .. }));
}
