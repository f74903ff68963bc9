//! Pods with an unreadable record: they remain until they are removed.

use std::fs;
use std::path::Path;

use super::test_node::{TestNode, eventually, run_test};
use crate::Error;
use crate::model::{Filter, PodState};

const RECORD: &str = "record.json";
const HEADER: &str = "header.json";

fn other_version(directory: &Path) {
    let path = directory.join(RECORD);
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["version"] = 99.into();
    fs::write(path, record.to_string()).unwrap();
}

fn emptied(directory: &Path) {
    fs::write(directory.join(RECORD), "").unwrap();
}

fn garbage(directory: &Path) {
    fs::write(directory.join(RECORD), [0xa5; 4096]).unwrap();
}

fn missing(directory: &Path) {
    fs::remove_file(directory.join(RECORD)).unwrap();
}

fn a_directory(directory: &Path) {
    missing(directory);
    fs::create_dir(directory.join(RECORD)).unwrap();
}

fn other_version_without_header(directory: &Path) {
    other_version(directory);
    fs::remove_file(directory.join(HEADER)).unwrap();
}

fn jail_uid(node: &TestNode, pod: &str) -> u64 {
    let header = fs::read(node.path("r/pods").join(pod).join(HEADER)).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&header).unwrap();
    header["jail_uid"].as_u64().unwrap()
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains("(sleep) S")
}

#[test]
fn a_pod_with_an_unreadable_record_keeps_its_resources_until_it_is_removed() {
    let damages =
        [other_version, emptied, garbage, missing, a_directory, other_version_without_header];
    run_test(|node| async move {
        for damage in damages {
            let daemon = node.daemon().await;
            let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
            let (uid, pid) = (jail_uid(&node, &pod), node.vmm_pid(&pod));
            daemon.shutdown().await;
            drop(daemon);
            damage(&node.path("r/pods").join(&pod));

            let daemon = node.daemon().await;
            let view = daemon.pod(&pod).unwrap();
            assert_eq!((view.state, view.unreadable), (PodState::NotReady, true));
            assert_eq!((view.spec.meta.name.as_str(), view.addresses.len()), ("p", 1));
            assert!(view.reason.contains("unreadable"), "{}", view.reason);
            assert_eq!(daemon.pods(&Filter::default()), [view]);
            // Its name and uid are not reused, and it is not killed.
            let again = daemon.run_pod(node.pod_spec("p")).await;
            assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
            let other = daemon.run_pod(node.pod_spec("other")).await.unwrap();
            assert_ne!(jail_uid(&node, &other), uid);
            daemon.remove_pod(&other).await.unwrap();
            let create = daemon.create_container(&pod, node.container_spec("c", &["x"])).await;
            assert!(matches!(create, Err(Error::FailedPrecondition { .. })), "{create:?}");
            assert!(alive(pid) && node.inner.attached.lock().unwrap().contains(&pod));

            daemon.stop_pod(&pod).await.unwrap();
            eventually("the VMM's end", || !alive(pid)).await;
            assert!(node.inner.attached.lock().unwrap().is_empty());
            assert_eq!(daemon.pod(&pod).unwrap().state, PodState::NotReady);
            daemon.stop_pod(&pod).await.unwrap();
            daemon.shutdown().await;
            drop(daemon);
            let daemon = node.daemon().await;
            assert_eq!(daemon.pods(&Filter::default()).len(), 1);
            daemon.remove_pod(&pod).await.unwrap();
            assert!(daemon.pods(&Filter::default()).is_empty());
            // The ownership of the parent cgroups is not known.
            let left = node.leftovers();
            assert!(left.iter().all(|path| path.contains("/sys/fs/cgroup")), "{left:?}");
            daemon.shutdown().await;
        }
    });
}

#[test]
fn a_pod_with_an_unreadable_record_and_header_is_removed_with_its_vmm() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let pid = node.vmm_pid(&pod);
        daemon.shutdown().await;
        drop(daemon);
        let directory = node.path("r/pods").join(&pod);
        emptied(&directory);
        fs::write(directory.join(HEADER), "").unwrap();

        let daemon = node.daemon().await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!((view.state, view.spec.meta.name.as_str()), (PodState::NotReady, ""));
        assert!(view.created_at.elapsed().unwrap().as_secs() < 60);
        assert!(alive(pid));
        // Remove without stop.
        daemon.remove_pod(&pod).await.unwrap();
        assert!(!alive(pid) && !directory.exists());
        assert!(!node.cgroup_file(&pod, "cgroup.procs").exists());
        assert!(node.inner.attached.lock().unwrap().is_empty());
        let _ = fs::remove_dir(node.cgroup_file(&pod, "").parent().unwrap());
    });
}

#[test]
fn a_pod_is_ready_again_once_its_record_is_readable() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        daemon.shutdown().await;
        drop(daemon);
        let path = node.path("r/pods").join(&pod).join(RECORD);
        let good = fs::read(&path).unwrap();
        other_version(path.parent().unwrap());
        let daemon = node.daemon().await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::NotReady);
        daemon.shutdown().await;
        drop(daemon);
        // As with the release that wrote it.
        fs::write(&path, good).unwrap();
        let daemon = node.daemon().await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}
