//! Volumes of all kinds, and block devices.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use agent_api::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::test_node::{TestNode, eventually, run_test};
use crate::Error;
use crate::model::{
    Access, BlockDevice, ContainerState, Identity, Propagation, Volume, VolumeSource,
};

pub(super) fn volume(source: VolumeSource, access: Access) -> Volume {
    let propagation = Propagation::Private;
    Volume { container_path: "/v".into(), source, access, propagation }
}

/// As the kubelet's atomic writer does.
pub(super) fn publish(directory: &Path, name: &str, files: &[(&str, &str)]) {
    fs::create_dir_all(directory.join(name)).unwrap();
    for (file, text) in files {
        fs::write(directory.join(name).join(file), text).unwrap();
        let _ = symlink(Path::new("..data").join(file), directory.join(file));
    }
    symlink(name, directory.join("..data_tmp")).unwrap();
    let old = fs::read_link(directory.join("..data"));
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    if let Ok(old) = old {
        fs::remove_dir_all(directory.join(old)).unwrap();
    }
}

/// Files of a container's first volume in the guest.
fn in_guest(node: &TestNode, pod: &str, container: &str) -> Vec<(String, String)> {
    let guest = node.guest(pod);
    let state = guest.lock();
    let files = state.volumes.get(&format!("{container}.0")).map(|v| &v.files);
    let text = |bytes: &Vec<u8>| String::from_utf8(bytes.clone()).unwrap();
    files.into_iter().flatten().map(|(path, bytes)| (path.clone(), text(bytes))).collect()
}

fn pairs(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn a_synced_volume_is_updated_until_the_container_exits_also_after_a_restart() {
    run_test(|node| async move {
        let directory = node.path("config");
        publish(&directory, "..1", &[("a", "1")]);
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut ids = Vec::new();
        for name in ["one", "two"] {
            let mut spec = node.container_spec(name, &["forever"]);
            let source = VolumeSource::Synced { host_path: directory.clone() };
            spec.volumes = vec![volume(source, Access::ReadOnly)];
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            assert_eq!(in_guest(&node, &pod, &id), pairs(&[("a", "1")]));
            ids.push(id);
        }
        publish(&directory, "..2", &[("a", "2"), ("b", "2")]);
        let second = pairs(&[("a", "2"), ("b", "2")]);
        for id in &ids {
            eventually("second", || in_guest(&node, &pod, id) == second).await;
        }

        // A write that fails is retried.
        node.guest(&pod).lock().refuse_writes = true;
        publish(&directory, "..3", &[("a", "3")]);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert_eq!(in_guest(&node, &pod, &ids[0]), second);
        node.guest(&pod).lock().refuse_writes = false;
        for id in &ids {
            eventually("third", || in_guest(&node, &pod, id) == pairs(&[("a", "3")])).await;
        }

        daemon.stop_container(&ids[0], std::time::Duration::from_secs(1)).await.unwrap();
        daemon.shutdown().await;
        drop(daemon);
        publish(&directory, "..4", &[("a", "4")]);
        let daemon = node.daemon().await;
        eventually("fourth", || in_guest(&node, &pod, &ids[1]) == pairs(&[("a", "4")])).await;
        publish(&directory, "..5", &[("a", "5")]);
        eventually("fifth", || in_guest(&node, &pod, &ids[1]) == pairs(&[("a", "5")])).await;
        assert_eq!(in_guest(&node, &pod, &ids[0]), pairs(&[("a", "3")]));

        // A volume that the kubelet tears down is kept for a running container.
        fs::remove_dir_all(&directory).unwrap();
        fs::create_dir(&directory).unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert_eq!(in_guest(&node, &pod, &ids[1]), pairs(&[("a", "5")]));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_large_synced_volume_is_sent_in_batches_and_replaced_atomically() {
    run_test(|node| async move {
        let directory = node.path("large");
        let text = "x".repeat(5 << 20);
        publish(&directory, "..1", &[("a", &text), ("b", "small")]);
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut spec = node.container_spec("app", &["forever"]);
        let source = VolumeSource::Synced { host_path: directory.clone() };
        spec.volumes = vec![volume(source, Access::ReadOnly)];
        let id = daemon.create_container(&pod, spec).await.unwrap();
        assert!(in_guest(&node, &pod, &id) == pairs(&[("a", &text), ("b", "small")]));
        daemon.remove_pod(&pod).await.unwrap();
    });
}

/// Writes the file of a container's only volume in the guest.
fn write(node: &TestNode, pod: &str, container: &str, text: Vec<u8>) {
    let guest = node.guest(pod);
    let mut state = guest.lock();
    let volume = state.volumes.get_mut(&format!("{container}.0")).unwrap();
    volume.files.insert("file".into(), text);
}

#[test]
fn written_back_files_are_on_the_host_before_the_exit_is_reported() {
    run_test(|node| async move {
        let (path, other, kept) = (node.path("message"), node.path("other"), node.path("kept"));
        fs::write(&other, "untouched").unwrap();
        let mut daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        // (daemon is restarted, a link stands at the path when the container ends)
        for (n, (restart, link)) in [(false, true), (true, true), (true, false)].iter().enumerate()
        {
            let _ = fs::remove_file(&path);
            fs::write(&path, "before").unwrap();
            let mut spec = node.container_spec(&format!("c{n}"), &["forever"]);
            let source = VolumeSource::WrittenBack { host_path: path.clone() };
            spec.volumes = vec![volume(source, Access::ReadWrite)];
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            write(&node, &pod, &id, vec![b'x'; 100 << 10]);
            if *restart {
                daemon.shutdown().await;
                drop(daemon);
                daemon = node.daemon().await;
            }
            if *link {
                fs::rename(&path, &kept).unwrap();
                symlink(&other, &path).unwrap();
            }
            daemon.stop_container(&id, std::time::Duration::from_secs(1)).await.unwrap();
            assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited);
            let written = fs::read(if *link { &kept } else { &path }).unwrap();
            // A new daemon has only the path, and does not follow a symlink there.
            let expected =
                if *restart && *link { b"before".to_vec() } else { vec![b'x'; 64 << 10] };
            assert!(written == expected, "{restart} {link}: {} bytes", written.len());
            assert_eq!(fs::read_to_string(&other).unwrap(), "untouched");
        }
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn images_and_devices_are_plugged_once_and_unplugged_with_their_last_user() {
    run_test(|node| async move {
        fs::write(node.path("data"), "erofs").unwrap();
        let device = Path::new("/dev/loop0");
        let device = fs::File::open(device).is_ok().then(|| device.to_owned());
        if device.is_none() {
            eprintln!("SKIP: /dev/loop0 cannot be opened: no block device to try");
        }
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let plugged = || node.inner.devices.lock().unwrap().len();
        let mut ids = Vec::new();
        for name in ["one", "two"] {
            let mut spec = node.container_spec(name, &["forever"]);
            let source = VolumeSource::Image { image: node.path("data"), sub_path: "etc".into() };
            spec.volumes = vec![volume(source, Access::ReadWrite)];
            spec.devices = device
                .iter()
                .map(|path| BlockDevice {
                    host_path: path.clone(),
                    container_path: "/dev/data".into(),
                    permissions: "rm".into(),
                })
                .collect();
            ids.push(daemon.create_container(&pod, spec).await.unwrap());
            let request = node.guest(&pod).lock().create.clone().unwrap();
            let mount = &request.volumes[0];
            assert_eq!(mount.source(), v1::VolumeSource::Image);
            assert_eq!((mount.sub_path.as_str(), mount.read_only), ("etc", true));
            let disks = node.inner.devices.lock().unwrap().clone();
            assert!(disks.contains(&mount.volume_id), "{disks:?}");
            for device in &request.block_devices {
                assert!(disks.contains(&device.disk_serial), "{disks:?}");
                assert_eq!(
                    (device.path.as_str(), device.permissions.as_str()),
                    ("/dev/data", "rm")
                );
            }
            assert_eq!(request.block_devices.len(), usize::from(device.is_some()));
        }
        // Each image and the device are plugged once; writable layers are on the scratch disk.
        let shared = 2 + usize::from(device.is_some());
        assert_eq!(plugged(), shared);
        daemon.remove_container(&ids[0]).await.unwrap();
        assert_eq!(plugged(), shared);
        daemon.remove_container(&ids[1]).await.unwrap();
        assert_eq!(plugged(), 0);

        let mut spec = node.container_spec("file", &["forever"]);
        let (host_path, container_path) = (node.path("data"), "/dev/x".into());
        spec.devices = vec![BlockDevice { host_path, container_path, permissions: "rw".into() }];
        let refused = daemon.create_container(&pod, spec).await.unwrap_err();
        assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
        assert_eq!(plugged(), 0);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

fn shared(node: &TestNode, access: Access, propagation: Propagation) -> Volume {
    let source = VolumeSource::Shared { host_path: node.path("shared") };
    Volume { propagation, ..volume(source, access) }
}

#[test]
fn one_file_server_serves_a_pods_shares_and_survives_the_daemon() {
    run_test(|node| async move {
        fs::create_dir(node.path("shared")).unwrap();
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut spec = node.container_spec("one", &["forever"]);
        spec.volumes = vec![
            shared(&node, Access::ReadWrite, Propagation::HostToContainer),
            shared(&node, Access::ReadOnlyRecursive, Propagation::Private),
        ];
        let one = daemon.create_container(&pod, spec).await.unwrap();
        let request = node.guest(&pod).lock().create.clone().unwrap();
        let names = || node.inner.shares.lock().unwrap().clone();
        let mounts = &request.volumes[..2];
        assert!(mounts.iter().all(|m| m.source() == v1::VolumeSource::Share));
        assert!(mounts.iter().all(|m| names().contains_key(&m.volume_id)));
        assert_eq!(mounts[0].propagation(), v1::Propagation::Slave);
        assert!(!mounts[0].read_only && mounts[1].read_only && mounts[1].recursive_read_only);
        assert_eq!(names().len(), 2);

        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        let mut spec = node.container_spec("two", &["forever"]);
        spec.volumes = vec![shared(&node, Access::ReadWrite, Propagation::Private)];
        let two = daemon.create_container(&pod, spec.clone()).await.unwrap();
        assert_eq!((names().len(), node.inner.file_servers.lock().unwrap().len()), (2, 1));
        daemon.remove_container(&one).await.unwrap();
        assert_eq!(names().len(), 1);

        // After the server's exit new shares fail; the pod continues.
        let server = node.inner.file_servers.lock().unwrap()[0];
        kill(Pid::from_raw(server as i32), Signal::SIGKILL).unwrap();
        let gone = || !Path::new(&format!("/proc/{server}")).exists();
        eventually("file server ends", gone).await;
        spec.meta.name = "three".into();
        let refused = daemon.create_container(&pod, spec).await.unwrap_err();
        assert!(refused.to_string().contains("file server has ended"), "{refused}");
        daemon.remove_container(&two).await.unwrap();
        let plain = daemon.create_container(&pod, node.container_spec("four", &["forever"])).await;
        daemon.start_container(&plain.unwrap()).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn containers_with_one_directory_use_one_share() {
    use vmm_api::shares::Access as ShareAccess;
    run_test(|node| async move {
        fs::create_dir_all(node.path("shared/sub")).unwrap();
        let mut daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let shares = || node.inner.shares.lock().unwrap().clone();
        let access = || shares().into_values().collect::<Vec<_>>();
        let mut ids = Vec::new();
        let users = [
            ("outer", "shared", Access::ReadOnly, ShareAccess::ReadOnly),
            ("inner", "shared/sub", Access::ReadWrite, ShareAccess::ReadWrite),
            ("again", "shared", Access::ReadOnlyRecursive, ShareAccess::ReadWrite),
        ];
        for (name, path, wanted, got) in users {
            let mut spec = node.container_spec(name, &["forever"]);
            let source = VolumeSource::Shared { host_path: node.path(path) };
            spec.volumes = vec![volume(source, wanted)];
            ids.push(daemon.create_container(&pod, spec).await.unwrap());
            let mount = node.guest(&pod).lock().create.clone().unwrap().volumes[0].clone();
            assert!(shares().contains_key(&mount.volume_id), "{name}");
            assert_eq!(mount.sub_path, path.trim_start_matches("shared").trim_start_matches('/'));
            assert_eq!(mount.read_only, wanted != Access::ReadWrite);
            assert_eq!(access(), [got], "{name}");
            // The next daemon knows the users of a share.
            daemon.shutdown().await;
            drop(daemon);
            daemon = node.daemon().await;
        }
        let mut refused = node.container_spec("bad", &["forever"]);
        let source = VolumeSource::Shared { host_path: node.path("nowhere") };
        refused.volumes = vec![volume(source, Access::ReadWrite)];
        daemon.create_container(&pod, refused).await.unwrap_err();
        for (gone, left) in [(1, ShareAccess::ReadOnly), (0, ShareAccess::ReadOnlyRecursive)] {
            daemon.remove_container(&ids[gone]).await.unwrap();
            assert_eq!(access(), [left]);
        }
        daemon.remove_container(&ids[2]).await.unwrap();
        assert!(shares().is_empty());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn the_resolved_user_is_reported_also_after_a_restart() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let id = daemon.create_container(&pod, node.container_spec("app", &["forever"])).await;
        let id = id.unwrap();
        let user = Some(Identity { uid: 5, gid: 6, groups: vec![6, 7] });
        assert_eq!(daemon.container(&id).unwrap().user, user);
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        assert_eq!(daemon.container(&id).unwrap().user, user);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_rootfs_can_be_a_host_directory_and_ids_can_be_given_by_the_caller() {
    run_test(|node| async move {
        fs::create_dir_all(node.path("shared")).unwrap();
        let config = crate::Config { caller_reads_output: true, ..node.config() };
        let daemon = node.daemon_with(config).await;
        let refused = daemon.run_pod_with_id("../p".into(), node.pod_spec("p")).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused}");
        let pod = daemon.run_pod_with_id("pod1".into(), node.pod_spec("p")).await.unwrap();
        assert_eq!(pod, "pod1");
        let twice = daemon.run_pod_with_id("pod1".into(), node.pod_spec("q")).await.unwrap_err();
        assert!(matches!(twice, Error::Exists { .. }), "{twice}");

        let mut spec = node.container_spec("one", &["forever"]);
        spec.rootfs.image = Default::default();
        let lower = shared(&node, Access::ReadOnly, Propagation::Private);
        spec.volumes = vec![Volume { container_path: "/".into(), ..lower }];
        let made = daemon.create_container_with_id(&pod, "c1".into(), spec.clone()).await.unwrap();
        assert_eq!(made, "c1");
        let request = node.guest(&pod).lock().create.clone().unwrap();
        let rootfs = request.rootfs.unwrap();
        assert!(node.inner.shares.lock().unwrap().contains_key(&rootfs.lower_share));
        assert_eq!(rootfs.lower_serial, "");
        assert!(request.volumes.iter().all(|volume| volume.destination != "/"));
        spec.meta.name = "two".into();
        let twice = daemon.create_container_with_id(&pod, "c1".into(), spec).await.unwrap_err();
        assert!(matches!(twice, Error::Exists { .. }), "{twice}");
        assert!(daemon.streams("c1").await.is_ok());
        assert!(!node.path("logs/one.log").exists());

        daemon.remove_container("c1").await.unwrap();
        assert!(node.inner.shares.lock().unwrap().is_empty());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}
