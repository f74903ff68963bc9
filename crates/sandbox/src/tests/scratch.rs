//! The pod's scratch disk: writable layers and emptyDirs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use agent_api::v1;

use super::test_node::{TestNode, run_test};
use super::volumes::volume;
use crate::model::{Access, ContainerSpec, Propagation, Volume, VolumeSource};
use crate::{Config, EmptyDirLocation, Error};

/// An emptyDir directory as created by a kubelet.
fn directory(node: &TestNode, name: &str) -> PathBuf {
    let directory = node.path("pods/u/volumes/kubernetes.io~empty-dir").join(name);
    fs::create_dir_all(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o2777)).unwrap();
    directory
}

fn empty_dir(directory: &std::path::Path, sub_path: &str, size_limit: Option<u64>) -> Volume {
    let source = VolumeSource::EmptyDir {
        host_path: directory.join(sub_path),
        directory: directory.to_owned(),
        sub_path: sub_path.to_owned(),
        size_limit,
    };
    Volume { propagation: Propagation::Bidirectional, ..volume(source, Access::ReadWrite) }
}

fn with(node: &TestNode, name: &str, volume: Volume) -> ContainerSpec {
    ContainerSpec { volumes: vec![volume], ..node.container_spec(name, &["forever"]) }
}

fn created(node: &TestNode, pod: &str) -> v1::CreateContainerRequest {
    node.guest(pod).lock().create.clone().unwrap()
}

#[test]
fn writable_layers_are_on_the_scratch_disk_which_is_removed_at_stop() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let disk = node.path("r/pods").join(&pod).join("scratch.img");
        assert_eq!(fs::metadata(&disk).unwrap().len(), 32 << 20);
        for (name, read_only) in [("writes", false), ("reads", true)] {
            let mut spec = node.container_spec(name, &["forever"]);
            spec.rootfs.read_only = read_only;
            daemon.create_container(&pod, spec).await.unwrap();
            let rootfs = created(&node, &pod).rootfs.unwrap();
            let limits = v1::ScratchLayer { bytes: 16 << 20, inodes: 1024 };
            assert_eq!(rootfs.scratch, (!read_only).then_some(limits), "{name}");
            assert!(rootfs.upper_serial.is_empty());
        }
        daemon.stop_pod(&pod).await.unwrap();
        assert!(!disk.exists(), "a stopped pod has a scratch disk");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn an_empty_dir_is_created_once_also_across_a_restart() {
    run_test(|node| async move {
        let cache = directory(&node, "cache");
        fs::create_dir_all(cache.join("sub/dir")).unwrap();
        fs::write(cache.join("sub/file"), "before").unwrap();
        fs::set_permissions(cache.join("sub/dir"), fs::Permissions::from_mode(0o2750)).unwrap();
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let made = |name: &str| {
            let guest = node.guest(&pod);
            let state = guest.lock();
            let dir = &state.empty_dirs[name];
            (dir.begun, dir.ready, dir.made.clone(), dir.files.keys().cloned().collect::<Vec<_>>())
        };
        let one = empty_dir(&cache, "", Some(1 << 20));
        daemon.create_container(&pod, with(&node, "one", one)).await.unwrap();
        let mount = created(&node, &pod).volumes[0].clone();
        assert_eq!(
            (mount.source(), mount.volume_id.as_str()),
            (v1::VolumeSource::EmptyDir, "cache")
        );
        assert_eq!(mount.propagation(), v1::Propagation::Shared);
        let (begun, ready, request, files) = made("cache");
        let meta = fs::metadata(&cache).unwrap();
        assert_eq!((begun, ready, request.memory, request.size_limit), (1, true, false, 1 << 20));
        assert_eq!((request.uid, request.gid, request.mode), (meta.uid(), meta.gid(), 0o2777));
        assert_eq!(files, ["sub", "sub/dir", "sub/file"]);

        // Later files on the host are not copied.
        fs::write(cache.join("later"), "x").unwrap();
        let two = empty_dir(&cache, "sub/dir", None);
        daemon.create_container(&pod, with(&node, "two", two)).await.unwrap();
        let mount = created(&node, &pod).volumes[0].clone();
        let sub = fs::metadata(cache.join("sub/dir")).unwrap();
        assert_eq!((mount.sub_path.as_str(), mount.mode), ("sub/dir", 0o2750));
        assert_eq!((mount.uid, mount.gid), (sub.uid(), sub.gid()));
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        let three =
            daemon.create_container(&pod, with(&node, "three", empty_dir(&cache, "", None)));
        three.await.unwrap();
        let (begun, _, _, files) = made("cache");
        assert_eq!((begun, files.len()), (1, 3), "created again by the next daemon");
        assert!(node.inner.shares.lock().unwrap().is_empty());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

fn shared(node: &TestNode, pod: &str) -> bool {
    created(node, pod).volumes[0].source() == v1::VolumeSource::Share
}

#[test]
fn an_empty_dir_that_cannot_be_copied_is_shared_until_the_pod_is_removed() {
    run_test(|node| async move {
        let (odd, large) = (directory(&node, "odd"), directory(&node, "large"));
        nix::unistd::mkfifo(&odd.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(large.join("file"), "more than ten bytes").unwrap();
        let config = Config { volume_bytes: 10, ..node.config() };
        let daemon = node.daemon_with(config).await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let plain =
            |directory, propagation| Volume { propagation, ..empty_dir(directory, "", None) };
        let refused = with(&node, "refused", plain(&odd, Propagation::Bidirectional));
        let refused = daemon.create_container(&pod, refused).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused}");
        for (name, directory) in [("one", &odd), ("two", &large)] {
            let spec = with(&node, name, plain(directory, Propagation::Private));
            daemon.create_container(&pod, spec).await.unwrap();
            assert!(shared(&node, &pod), "{name}");
        }
        daemon.shutdown().await;
        drop(daemon);
        for path in [odd.join("pipe"), large.join("file")] {
            fs::remove_file(path).unwrap();
        }
        let daemon = node.daemon().await;
        let spec = with(&node, "three", plain(&odd, Propagation::Private));
        daemon.create_container(&pod, spec).await.unwrap();
        assert!(shared(&node, &pod), "two containers have different volumes with one name");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn the_location_of_empty_dirs_is_fixed_at_pod_start() {
    run_test(|node| async move {
        let cache = directory(&node, "cache");
        let volume = || Volume { propagation: Propagation::Private, ..empty_dir(&cache, "", None) };
        let share = Config { empty_dir: EmptyDirLocation::Share, ..node.config() };
        let daemon = node.daemon_with(share.clone()).await;
        let first = daemon.run_pod(node.pod_spec("first")).await.unwrap();
        daemon.create_container(&first, with(&node, "one", volume())).await.unwrap();
        assert!(shared(&node, &first));
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        let second = daemon.run_pod(node.pod_spec("second")).await.unwrap();
        for (pod, is_shared) in [(&first, true), (&second, false)] {
            daemon.create_container(pod, with(&node, "two", volume())).await.unwrap();
            assert_eq!(shared(&node, pod), is_shared);
        }
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon_with(share).await;
        daemon.create_container(&second, with(&node, "three", volume())).await.unwrap();
        assert!(!shared(&node, &second), "a pod's emptyDirs changed their location");
        for pod in [first, second] {
            daemon.remove_pod(&pod).await.unwrap();
        }
    });
}

#[test]
fn containers_of_a_pod_of_an_earlier_release_have_their_own_scratch_disks() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("old")).await.unwrap();
        daemon.shutdown().await;
        drop(daemon);
        let path = node.path("r/pods").join(&pod).join("record.json");
        let mut record: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record.as_object_mut().unwrap().remove("empty_dirs").unwrap();
        let ledger = record["ledger"].as_array_mut().unwrap();
        ledger.retain(|effect| effect["effect"] != "scratch_disk");
        fs::write(&path, record.to_string()).unwrap();
        let daemon = node.daemon().await;
        let cache = directory(&node, "cache");
        let volume = Volume { propagation: Propagation::Private, ..empty_dir(&cache, "", None) };
        let id = daemon.create_container(&pod, with(&node, "app", volume)).await.unwrap();
        assert!(shared(&node, &pod));
        let rootfs = created(&node, &pod).rootfs.unwrap();
        assert!(rootfs.scratch.is_none());
        let plugged = || node.inner.devices.lock().unwrap().contains(&rootfs.upper_serial);
        assert!(plugged());
        let disk = node.path("r/pods").join(&pod).join(format!("scratch-{id}.img"));
        assert_eq!(fs::metadata(&disk).unwrap().len(), 16 << 20);
        daemon.remove_container(&id).await.unwrap();
        assert!(!plugged() && !disk.exists());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}
