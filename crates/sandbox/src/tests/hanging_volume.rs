//! Volumes and logs on a file system that never answers.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::test_node::{eventually, run_test, run_test_with_threads};
use super::volumes::volume;
use crate::model::{Access, ContainerState, VolumeSource};
use crate::{Config, Error};

/// A FUSE file system whose server never replies. Accesses hang until this is dropped.
struct HangingMount {
    path: PathBuf,
    server: Option<File>,
}

impl HangingMount {
    fn at(path: PathBuf) -> Option<Self> {
        let server = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(server) => server,
            Err(e) => {
                eprintln!("SKIP: needs /dev/fuse: {e}");
                return None;
            }
        };
        fs::create_dir(&path).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let kind = Some("fuse");
        if let Err(e) = mount(Some("nacelle-test"), &path, kind, flags, Some(options.as_str())) {
            eprintln!("SKIP: needs a FUSE mount: {e}");
            return None;
        }
        Some(Self { path, server: Some(server) })
    }
}

impl Drop for HangingMount {
    fn drop(&mut self) {
        // Without its server the file system returns errors to all pending calls.
        drop(self.server.take());
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_hanging_volume_affects_its_own_pod_only() {
    // Fewer threads than hanging calls.
    run_test_with_threads(6, |node| async move {
        let Some(hanging) = HangingMount::at(node.path("hanging")) else { return };
        let config = Config { vmm_call_deadline_ms: 1_500, ..node.config() };
        let daemon = node.daemon_with(config).await;
        let hung = daemon.run_pod(node.pod_spec("hung")).await.unwrap();
        let healthy = daemon.run_pod(node.pod_spec("healthy")).await.unwrap();
        let host_path = hanging.path.join("volume");
        let sources = [
            VolumeSource::Shared { host_path: host_path.clone() },
            VolumeSource::Copied { host_path: host_path.clone() },
            VolumeSource::Synced { host_path: host_path.clone() },
            VolumeSource::WrittenBack { host_path: host_path.clone() },
            VolumeSource::EmptyDir {
                directory: host_path.clone(),
                host_path,
                sub_path: String::new(),
                size_limit: None,
            },
        ];
        let creates = (0..10).map(|n| {
            let mut spec = node.container_spec(&format!("c{n}"), &["forever"]);
            spec.volumes = vec![volume(sources[n % sources.len()].clone(), Access::ReadWrite)];
            daemon.create_container(&hung, spec)
        });
        let limit = Duration::from_secs(30);
        let created = tokio::time::timeout(limit, futures_util::future::join_all(creates)).await;
        for (n, result) in created.expect("creations hang").into_iter().enumerate() {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Deadline { .. }), "{n}: {error}");
            assert!(error.to_string().contains("hanging/volume"), "{n}: {error}");
        }
        // The other pod's journal and logs are not affected.
        let other = async {
            let spec = node.container_spec("app", &["forever"]);
            let id = daemon.create_container(&healthy, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
            daemon.remove_pod(&healthy).await.unwrap();
            // The hung pod can go as healthy.
            daemon.remove_pod(&hung).await.unwrap();
        };
        tokio::time::timeout(limit, other).await.expect("another pod hangs");
        drop(hanging);
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn reopen_and_attach_time_out_if_the_logs_file_system_hangs() {
    run_test(|node| async move {
        let config = Config { vmm_call_deadline_ms: 1_000, ..node.config() };
        let daemon = node.daemon_with(config).await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["print-forever", "one\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("the first line", || node.log("app.log") == ["one"]).await;
        // Blocks all threads that write the pod's logs.
        let writes = daemon.node().registry.find_pod(&pod).unwrap().log_writes.clone();
        let hangs = Arc::new(AtomicBool::new(true));
        for _ in 0..8 {
            let (writes, hangs) = (writes.clone(), hangs.clone());
            tokio::spawn(async move {
                let hang = move || {
                    while hangs.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                };
                writes.run(hang).await;
            });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let limit = Duration::from_secs(10);
        let reopened = tokio::time::timeout(limit, daemon.reopen_log(&id)).await;
        let reopened = reopened.expect("reopening hangs");
        assert!(matches!(reopened, Err(Error::Deadline { .. })), "{reopened:?}");
        let attached = tokio::time::timeout(limit, daemon.attach(&id, false)).await;
        let attached = attached.expect("attaching hangs").err().unwrap();
        assert!(matches!(attached, Error::Deadline { .. }), "{attached:?}");
        hangs.store(false, Ordering::SeqCst);
        node.guest(&pod).print(&id, "two\n");
        eventually("the next line", || node.log("app.log") == ["one", "two"]).await;
        daemon.reopen_log(&id).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
    });
}
