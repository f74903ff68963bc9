//! After a reboot of the host: no processes, no state directory, no cgroups; the records of the
//! previous boot, and persistent files of plugins.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::test_node::{TestNode, eventually, run_test};
use crate::host::process::start_time;
use crate::model::{ContainerState, Filter, PodState};
use crate::{Error, Sandboxes};

/// Simulates a reboot: removes volatile state, and changes the boot id in the records.
async fn reboot(node: &TestNode, daemon: Sandboxes, edit: impl Fn(&mut Value)) {
    daemon.shutdown().await;
    drop(daemon);
    for pid in node.pids() {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
    let leaf = |pod: &str| node.cgroup_file(pod, "");
    for entry in fs::read_dir(node.path("r/pods")).unwrap() {
        let directory = entry.unwrap().path();
        let leaf = leaf(directory.file_name().unwrap().to_str().unwrap());
        eventually("the cgroup is empty", || !leaf.exists() || fs::remove_dir(&leaf).is_ok()).await;
        let _ = fs::remove_dir(leaf.parent().unwrap());
        edit_record(&directory, |record| {
            record["boot_id"] = "00000000-0000-0000-0000-000000000000".into();
            edit(record);
        });
    }
    fs::remove_dir_all(node.path("s")).unwrap();
}

fn edit_record(directory: &Path, edit: impl FnOnce(&mut Value)) {
    let path = directory.join("record.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

/// An unrelated process of the new boot with a recorded pid.
struct UnrelatedProcess(Child);

impl UnrelatedProcess {
    fn new() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }

    /// Records the process as the pod's VMM and file server.
    fn write_to(&self, record: &mut Value) {
        let (pid, started) = (self.0.id(), start_time(self.0.id()).unwrap());
        let ledger = record["ledger"].as_array_mut().unwrap();
        ledger.retain(|effect| effect["effect"] != "vmm" && effect["effect"] != "file_server");
        for effect in ["vmm", "file_server"] {
            ledger.push(json!({ "effect": effect, "pid": pid, "started": started }));
        }
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for UnrelatedProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn after_a_reboot_a_pod_is_not_ready_and_can_be_removed() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let create = |name, args| {
            let (daemon, spec) = (daemon.clone(), node.container_spec(name, args));
            let pod = pod.clone();
            async move { daemon.create_container(&pod, spec).await.unwrap() }
        };
        let done = create("done", &["print", "done\n"]).await;
        let going = create("going", &["print-forever", "one\ntwo\n"]).await;
        let fresh = create("fresh", &["forever"]).await;
        for id in [&done, &going] {
            daemon.start_container(id).await.unwrap();
        }
        let exited = |id: &str| daemon.container(id).unwrap().state == ContainerState::Exited;
        eventually("exit", || exited(&done)).await;
        eventually("log", || node.log("going.log").len() == 2).await;
        let before = daemon.container(&done).unwrap();

        let mut unrelated = UnrelatedProcess::new();
        reboot(&node, daemon, |record| unrelated.write_to(record)).await;
        let rebooted = SystemTime::now();
        let daemon = node.daemon().await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!((view.state, view.vmm_pid), (PodState::NotReady, None));
        assert!(view.reason.contains("rebooted"), "{}", view.reason);
        assert_eq!(daemon.container(&done).unwrap(), before);
        for id in [&going, &fresh] {
            let container = daemon.container(id).unwrap();
            assert_eq!(container.state, ContainerState::Exited);
            let exit = container.exit.unwrap();
            assert_eq!((exit.code, exit.reason.as_str()), (-1, "VmDied"));
            assert!(exit.message.contains("rebooted") && exit.at >= rebooted, "{exit:?}");
        }
        assert_eq!(
            (node.log("going.log"), node.log("done.log")),
            (vec!["one".into(), "two".into()], vec!["done".into()],)
        );
        let refused = daemon.start_container(&fresh).await;
        assert!(matches!(refused, Err(Error::FailedPrecondition { .. })), "{refused:?}");

        // A kubelet creates a new pod meanwhile. The old one keeps its resources.
        let mut spec = node.pod_spec("p");
        spec.meta.attempt = 1;
        let next = daemon.run_pod(spec).await.unwrap();
        assert!(node.inner.attached.lock().unwrap().contains(&pod));
        daemon.remove_pod(&next).await.unwrap();

        // The next start of the daemon has the same result.
        let first = (daemon.pods(&Filter::default()), daemon.containers(&Filter::default()));
        daemon.shutdown().await;
        drop(daemon);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let daemon = node.daemon().await;
        let second = (daemon.pods(&Filter::default()), daemon.containers(&Filter::default()));
        assert_eq!(second, first);

        daemon.remove_container(&done).await.unwrap();
        daemon.stop_pod(&pod).await.unwrap();
        assert!(node.inner.attached.lock().unwrap().is_empty());
        assert_eq!(daemon.container(&going).unwrap().exit.unwrap().reason, "VmDied");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
        assert!(unrelated.is_alive(), "a process of the new boot was killed");
    });
}

#[test]
fn a_reboot_in_any_phase_kills_no_unrelated_process() {
    run_test(|node| async move {
        for (phase, listed) in
            [("starting", false), ("stopping", true), ("not_ready", true), ("removing", false)]
        {
            let daemon = node.daemon().await;
            let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
            let spec = node.container_spec("app", &["forever"]);
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            let mut unrelated = UnrelatedProcess::new();
            let edit = |record: &mut Value| {
                record["phase"] = phase.into();
                unrelated.write_to(record);
            };
            reboot(&node, daemon, edit).await;
            let daemon = node.daemon().await;
            if listed {
                let state = || daemon.pod(&pod).unwrap().state;
                assert_eq!(state(), PodState::NotReady, "{phase}");
                daemon.stop_pod(&pod).await.unwrap();
                assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited, "{phase}");
                daemon.remove_pod(&pod).await.unwrap();
            }
            eventually("nothing is left", || node.leftovers().is_empty()).await;
            assert!(unrelated.is_alive(), "{phase}: a process of the new boot was killed");
            daemon.shutdown().await;
        }
    });
}

#[test]
fn an_unreadable_record_of_the_previous_boot_kills_no_unrelated_process() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut unrelated = UnrelatedProcess::new();
        let edit = |record: &mut Value| {
            record["version"] = 99.into();
            unrelated.write_to(record);
        };
        reboot(&node, daemon, edit).await;
        let daemon = node.daemon().await;
        assert!(daemon.pod(&pod).unwrap().unreadable);
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
        assert!(unrelated.is_alive());
    });
}
