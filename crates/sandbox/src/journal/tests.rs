use super::*;
use crate::model::{Access, Propagation, ShareUse};
use crate::policy::{Change, tests as samples};

fn journal() -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path().join("pods"), None).unwrap();
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

#[test]
fn a_record_cut_anywhere_is_quarantined_and_never_guessed_at() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    let bytes = fs::read(&path).unwrap();
    for cut in (0..bytes.len()).step_by(97) {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(matches!(only(&journal), Found::Quarantined { .. }), "cut at {cut}");
    }
}

#[test]
fn the_ledger_of_a_later_version_can_be_undone() {
    let (_dir, journal) = journal();
    journal.write(&sample(), "boot").unwrap();
    let path = journal.folder("pod").join(RECORD);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["version"] = 99.into();
    value["ledger"].as_array_mut().unwrap().push(serde_json::json!({ "effect": "portal" }));
    fs::write(&path, value.to_string()).unwrap();
    let Found::Quarantined { effects, why, .. } = only(&journal) else { panic!("understood") };
    assert_eq!(effects, sample().ledger);
    assert!(why.contains("version 99"), "{why}");
}

#[test]
fn a_folder_without_a_record_is_empty_and_a_torn_new_one_does_not_count() {
    let (_dir, journal) = journal();
    fs::create_dir(journal.folder("pod")).unwrap();
    fs::write(journal.folder("pod").join("record.new"), "{").unwrap();
    assert!(matches!(only(&journal), Found::Empty { .. }));
    journal.write(&sample(), "boot").unwrap();
    assert!(matches!(only(&journal), Found::Pod { .. }));
}
