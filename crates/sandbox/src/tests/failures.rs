//! Failures, and that they leave nothing behind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lifecycle::exec;
use super::test_node::{eventually, run_test};
use super::volumes::volume;
use super::warnings::Warnings;
use crate::failpoint::{Action, Failpoints, Hook, When};
use crate::model::{Access, ContainerState, Filter, PodState, VolumeSource};
use crate::observe::Unobserved;
use crate::{Error, Sandboxes};

#[test]
fn of_twenty_pods_with_one_name_one_is_started() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let tries = (0..20).map(|_| daemon.run_pod(node.pod_spec("same")));
        let results = futures_util::future::join_all(tries).await;
        let made: Vec<_> = results.iter().filter_map(|r| r.as_ref().ok()).collect();
        assert_eq!(made.len(), 1);
        assert!(results.iter().all(|r| matches!(r, Ok(_) | Err(Error::Exists { .. }))));
        daemon.remove_pod(made[0]).await.unwrap();
        let again = daemon.run_pod(node.pod_spec("same")).await.unwrap();
        daemon.remove_pod(&again).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_stop_during_the_boot_does_not_wait_for_it() {
    run_test(|node| async move {
        *node.inner.guest_never_answers.lock().unwrap() = true;
        let daemon = node.daemon().await;
        let starting = tokio::spawn({
            let (daemon, spec) = (daemon.clone(), node.pod_spec("slow"));
            async move { daemon.run_pod(spec).await }
        });
        eventually("launch", || !node.inner.guests.lock().unwrap().is_empty()).await;
        assert!(daemon.pods(&Filter::default()).is_empty(), "a pod that starts is not listed");
        let pod = node.inner.guests.lock().unwrap().keys().next().unwrap().clone();
        let began = Instant::now();
        daemon.stop_pod(&pod).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(matches!(starting.await.unwrap(), Err(Error::Cancelled { .. })));
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_start_is_undone_when_its_caller_goes_away() {
    run_test(|node| async move {
        *node.inner.guest_never_answers.lock().unwrap() = true;
        let daemon = node.daemon().await;
        let start = daemon.run_pod(node.pod_spec("gone"));
        assert!(tokio::time::timeout(Duration::from_millis(300), start).await.is_err());
        eventually("unwound", || node.leftovers().is_empty()).await;
    });
}

#[test]
fn a_failed_network_or_vmm_fails_the_start_with_the_reason() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        *node.inner.fail_network.lock().unwrap() = true;
        let error = daemon.run_pod(node.pod_spec("a")).await.unwrap_err().to_string();
        assert!(error.contains("no more addresses"), "{error}");
        // The agent never answers, and the start does not wait for it.
        node.inner.guests.lock().unwrap().clear();
        *node.inner.guest_never_answers.lock().unwrap() = true;
        *node.inner.attach_after_launch.lock().unwrap() = true;
        let error = daemon.run_pod(node.pod_spec("c")).await.unwrap_err().to_string();
        assert!(error.contains("no more addresses"), "{error}");
        assert_eq!(node.leftovers(), Vec::<String>::new());
        *node.inner.fail_network.lock().unwrap() = false;
        *node.inner.attach_after_launch.lock().unwrap() = false;
        node.inner.guests.lock().unwrap().clear();
        let start = tokio::spawn({
            let (daemon, spec) = (daemon.clone(), node.pod_spec("b"));
            async move { daemon.run_pod(spec).await }
        });
        eventually("launch", || !node.inner.guests.lock().unwrap().is_empty()).await;
        let pid = node.inner.guests.lock().unwrap().values().next().unwrap().0;
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        let error = start.await.unwrap().unwrap_err().to_string();
        assert!(error.contains("the pod ended while it started"), "{error}");
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_start_waiting_for_the_network_ends_on_vmm_exit_or_stop() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        *node.inner.attach_queued.lock().unwrap() = true;
        let start = |name: &str| {
            node.inner.guests.lock().unwrap().clear();
            let (daemon, spec) = (daemon.clone(), node.pod_spec(name));
            tokio::spawn(async move { daemon.run_pod(spec).await })
        };
        let launched = || node.inner.guests.lock().unwrap().clone().into_iter().next();

        *node.inner.guest_never_answers.lock().unwrap() = true;
        let starting = start("a");
        eventually("launch", || launched().is_some()).await;
        kill(Pid::from_raw(launched().unwrap().1.0 as i32), Signal::SIGKILL).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), starting).await.unwrap();
        let error = ended.unwrap().unwrap_err().to_string();
        assert!(error.contains("the pod ended while it started"), "{error}");

        *node.inner.guest_never_answers.lock().unwrap() = false;
        let starting = start("b");
        eventually("launch", || launched().is_some()).await;
        daemon.stop_pod(&launched().unwrap().0).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), starting).await.unwrap();
        assert!(matches!(ended.unwrap(), Err(Error::Cancelled { .. })));
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

/// The failure of the boot ends the wait for the network; that is not a failure of the network.
#[test]
fn only_a_network_that_failed_by_itself_is_logged_beside_a_failed_boot() {
    let warnings = Warnings::collect();
    run_test(|node| async move {
        let daemon = node.daemon().await;
        *node.inner.attach_queued.lock().unwrap() = true;
        *node.inner.guest_never_answers.lock().unwrap() = true;
        for network_fails in [false, true] {
            *node.inner.fail_network.lock().unwrap() = network_fails;
            node.inner.guests.lock().unwrap().clear();
            let (starter, spec) = (daemon.clone(), node.pod_spec("p"));
            let starting = tokio::spawn(async move { starter.run_pod(spec).await });
            eventually("launch", || !node.inner.guests.lock().unwrap().is_empty()).await;
            let guests = node.inner.guests.lock().unwrap().clone();
            let (pod, (pid, ..)) = guests.into_iter().next().unwrap();
            kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
            let error = starting.await.unwrap().unwrap_err().to_string();
            assert!(error.contains("the pod ended while it started"), "{error}");
            let logged = warnings.with(&pod);
            let network = logged.iter().filter(|line| line.contains("network"));
            assert_eq!(network.count(), usize::from(network_fails), "{logged:?}");
        }
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_pod_with_a_killed_vmm_is_not_ready_with_a_reason() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["print-forever", "last line\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("log", || node.log("app.log").len() == 1).await;
        kill(Pid::from_raw(node.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("killed"));
        let container = daemon.container(&id).unwrap();
        assert_eq!(container.state, ContainerState::Exited);
        assert_eq!(container.exit.unwrap().reason, "VmDied");
        let refused = daemon.create_container(&pod, node.container_spec("b", &["forever"])).await;
        assert!(matches!(refused, Err(Error::FailedPrecondition { .. })));
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn the_guest_is_not_called_after_the_vm_exited() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        kill(Pid::from_raw(node.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        let address = node.path("s/pods").join(&pod).join("vsock.sock");
        std::fs::remove_file(&address).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        // Pings and statistics have an interval of 100 ms.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let connection = listener.accept().map(drop);
        assert_eq!(connection.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_log_that_cannot_be_opened_after_a_restart_blocks_nothing_else() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let spec = node.container_spec(name, &["print-forever", "one\n"]);
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            ids.push(id);
        }
        let [a, b] = <[String; 2]>::try_from(ids).unwrap();
        eventually("logs", || ["a.log", "b.log"].iter().all(|log| node.log(log) == ["one"])).await;
        daemon.shutdown().await;
        drop(daemon);
        let log = node.path("logs/a.log");
        std::fs::remove_file(&log).unwrap();
        std::fs::create_dir(&log).unwrap();
        let daemon = node.daemon().await;
        for id in [&a, &b] {
            node.guest(&pod).print(id, "two\n");
            let limit = Some(Duration::from_secs(5));
            let output = daemon.exec_sync(id, exec(&["print", "hi"]), limit, 100).await.unwrap();
            assert_eq!(output.stdout, b"hi");
        }
        eventually("the other log", || node.log("b.log") == ["one", "two"]).await;
        let reopened = daemon.reopen_log(&a).await;
        let refused = reopened.unwrap_err().to_string();
        assert!(refused.contains("reopen the container's log"), "{refused}");
        for id in [&a, &b] {
            daemon.stop_container(id, Duration::from_secs(1)).await.unwrap();
            assert_eq!(daemon.container(id).unwrap().exit.unwrap().code, 143);
        }
        std::fs::remove_dir(&log).unwrap();
        eventually("the rest of the output", || node.log("a.log") == ["two"]).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_log_that_cannot_be_reopened_continues_in_the_old_file() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["print-forever", "one\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("log", || node.log("app.log") == ["one"]).await;
        let (log, rotated) = (node.path("logs/app.log"), node.path("logs/app.log.1"));
        std::fs::rename(&log, &rotated).unwrap();
        std::fs::create_dir(&log).unwrap();
        let reopened = daemon.reopen_log(&id).await;
        let refused = reopened.unwrap_err().to_string();
        assert!(refused.contains("reopen the container's log"), "{refused}");
        node.guest(&pod).print(&id, "two\n");
        eventually("the old log", || node.log("app.log.1") == ["one", "two"]).await;
        std::fs::remove_dir(&log).unwrap();
        daemon.reopen_log(&id).await.unwrap();
        node.guest(&pod).print(&id, "three\n");
        eventually("the new log", || node.log("app.log") == ["three"]).await;
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn an_exit_is_reported_while_a_child_holds_the_output_open_and_later_output_is_logged() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["leave", "first\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let began = Instant::now();
        daemon.start_container(&id).await.unwrap();
        let exited = || daemon.container(&id).unwrap().state == ContainerState::Exited;
        eventually("exit", exited).await;
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(node.log("app.log"), ["first"], "reported before its output was logged");
        let guest = node.guest(&pod);
        guest.print(&id, "late\n");
        eventually("late output", || node.log("app.log") == ["first", "late"]).await;
        guest.print(&id, "last");
        guest.release_output(&id);
        eventually("last output", || node.log("app.log") == ["first", "late", "last"]).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_pods_processes_have_the_oom_score_of_its_qos_class_and_then_of_its_containers() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        spec.cgroup_parent += "/kubepods/burstable/podx";
        let pod = daemon.run_pod(spec).await.unwrap();
        let pid = node.vmm_pid(&pod);
        let score = |pid: u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        assert_eq!(score(pid), 500);
        let mut spec = node.container_spec("app", &["forever"]);
        spec.oci.process_mut().as_mut().unwrap().set_oom_score_adj(Some(300));
        spec.volumes =
            vec![volume(VolumeSource::Shared { host_path: node.path("") }, Access::ReadWrite)];
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let server = node.inner.file_servers.lock().unwrap()[0];
        assert_eq!((score(pid), score(server)), (300, 300));
        daemon.shutdown().await;
        drop(daemon);
        // As set by an earlier release.
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), "200").unwrap();
        let daemon = node.daemon().await;
        eventually("set again", || score(pid) == 300).await;
        daemon.remove_container(&id).await.unwrap();
        assert_eq!((score(pid), score(server)), (500, 500));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn an_unresponsive_guest_is_killed_and_listing_does_not_wait_for_it() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        node.guest(&pod).lock().unresponsive = true;
        let began = Instant::now();
        assert_eq!(daemon.pods(&Filter::default()).len(), 1);
        assert!(began.elapsed() < Duration::from_millis(50));
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("stopped answering"));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_guest_that_replies_with_errors_or_another_protocol_is_not_killed() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let (interval, misses) = (node.config().ping_interval(), node.config().ping_misses);
        let long = interval * (2 * misses + 4);
        node.guest(&pod).lock().refuse_hello = true;
        tokio::time::sleep(long).await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
        {
            let guest = node.guest(&pod);
            let mut guest = guest.lock();
            (guest.refuse_hello, guest.protocol) = (false, agent_api::PROTOCOL + 1);
        }
        tokio::time::sleep(long).await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
        node.guest(&pod).lock().unresponsive = true;
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_failed_creation_releases_name_and_disks() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        node.guest(&pod).lock().refuse_create = true;
        let spec = node.container_spec("app", &["forever"]);
        let error = daemon.create_container(&pod, spec.clone()).await.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
        assert!(node.inner.devices.lock().unwrap().is_empty());
        node.guest(&pod).lock().refuse_create = false;
        let id = daemon.create_container(&pod, spec.clone()).await.unwrap();
        let twice = daemon.create_container(&pod, spec).await;
        assert!(matches!(twice, Err(Error::Exists { .. })));
        let mut spec = node.container_spec("bad", &["missing"]);
        spec.log_path = String::new();
        let bad = daemon.create_container(&pod, spec).await.unwrap();
        let error = daemon.start_container(&bad).await.unwrap_err().to_string();
        assert!(error.contains("no such program"), "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let exit = daemon.container(&bad).unwrap().exit.unwrap();
        assert_eq!((exit.code, exit.reason.as_str()), (128, "StartError"));
        assert!(exit.message.contains("no such program"), "{}", exit.message);
        daemon.start_container(&id).await.unwrap();
        let twice = daemon.start_container(&id).await;
        assert!(matches!(twice, Err(Error::FailedPrecondition { .. })));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_container_that_the_guest_cannot_remove_is_removed_later() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let refuse = |create, remove| {
            let guest = node.guest(&pod);
            let mut state = guest.lock();
            (state.refuse_create, state.refuse_remove) = (create, remove);
        };
        let spec = node.container_spec("app", &["forever"]);
        refuse(true, true);
        assert!(daemon.create_container(&pod, spec.clone()).await.is_err());
        // The VM still has its disks, so its name is not free.
        assert!(!node.inner.devices.lock().unwrap().is_empty());
        let taken = daemon.create_container(&pod, spec.clone()).await;
        assert!(matches!(taken, Err(Error::Exists { .. })), "{taken:?}");
        refuse(false, false);
        eventually("disks are unplugged", || node.inner.devices.lock().unwrap().is_empty()).await;
        let mut again = daemon.create_container(&pod, spec.clone()).await;
        while let Err(Error::Exists { .. }) = again {
            tokio::time::sleep(Duration::from_millis(20)).await;
            again = daemon.create_container(&pod, spec.clone()).await;
        }

        // A failed removal that no caller will retry: no listing shows the container.
        refuse(false, true);
        daemon.remove_container(&again.unwrap()).await.unwrap_err();
        assert!(daemon.containers(&Filter::default()).is_empty());
        refuse(false, false);
        eventually("disks are unplugged", || node.inner.devices.lock().unwrap().is_empty()).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

/// A disk that is full while the flag is set.
#[derive(Default)]
struct FullDisk(AtomicBool);

impl Hook for FullDisk {
    fn reached(&self, when: When, what: &str) -> Action {
        match what.starts_with("journal") && when == When::Before && self.0.load(Ordering::SeqCst) {
            true => Action::Fail,
            false => Action::Continue,
        }
    }
}

#[test]
fn a_full_disk_prevents_neither_stop_nor_state_changes() {
    run_test(|node| async move {
        let (this, full) = (Arc::new(node.clone()), Arc::new(FullDisk::default()));
        let failpoints = Failpoints::new(full.clone());
        let unobserved = Arc::new(Unobserved);
        let daemon = Sandboxes::open_at(node.config(), this.clone(), this, unobserved, failpoints);
        let daemon = daemon.await.unwrap();
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        full.0.store(true, Ordering::SeqCst);
        daemon.start_container(&id).await.unwrap();
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        daemon.stop_pod(&pod).await.unwrap();
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::NotReady);
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited);
        assert!(node.inner.attached.lock().unwrap().is_empty());
        full.0.store(false, Ordering::SeqCst);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn only_one_of_several_concurrent_starts_succeeds() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let starts = futures_util::future::join_all((0..4).map(|_| daemon.start_container(&id)));
        let results = starts.await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_container_whose_start_was_not_confirmed_is_killed() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let id =
            daemon.create_container(&pod, node.container_spec("app", &["late"])).await.unwrap();
        let failed = daemon.start_container(&id).await;
        assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
        eventually("it was killed", || daemon.container(&id).unwrap().exit.is_some()).await;
        assert_eq!(daemon.container(&id).unwrap().exit.unwrap().code, 137);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_request_fails_when_the_daemon_shuts_down() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["ignore-term"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        let stop = daemon.stop_container(&id, Duration::from_secs(30));
        let end = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            daemon.shutdown().await;
        };
        let (stopped, ()) = tokio::join!(stop, end);
        assert!(matches!(stopped, Err(Error::Unavailable { .. })), "{stopped:?}");
        let removed = daemon.remove_pod(&pod).await;
        assert!(matches!(removed, Err(Error::Unavailable { .. })), "{removed:?}");
        drop(daemon);
        let daemon = node.daemon().await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_missing_apparmor_profile_fails_the_creation() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("confined")).await.unwrap();
        let mut spec = node.container_spec("c", &["true"]);
        let process = spec.oci.process_mut().as_mut().unwrap();
        process.set_apparmor_profile(Some("nacelle-no-such-profile".into()));
        let error = daemon.create_container(&pod, spec).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }), "{error:?}");
        assert!(error.to_string().contains("AppArmor"), "{error}");
        assert!(daemon.containers(&Filter::default()).is_empty());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn hanging_network_garbage_collection_does_not_delay_the_daemon() {
    run_test(|node| async move {
        *node.inner.hang_garbage_collection.lock().unwrap() = true;
        let opening = tokio::time::timeout(Duration::from_secs(10), node.daemon());
        let daemon = opening.await.expect("the start waits for garbage collection");
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        let ending = tokio::time::timeout(Duration::from_secs(10), daemon.shutdown());
        ending.await.expect("the shutdown waits for garbage collection");
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_creation_cancelled_while_its_disk_is_plugged_leaves_nothing_and_releases_its_name() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let before = node.inner.devices.lock().unwrap().clone();
        *node.inner.slow_disks.lock().unwrap() = Duration::from_millis(1_000);
        let spec = node.container_spec("app", &["forever"]);
        let create = daemon.create_container(&pod, spec.clone());
        assert!(tokio::time::timeout(Duration::from_millis(500), create).await.is_err());
        *node.inner.slow_disks.lock().unwrap() = Duration::ZERO;
        // The name is free while the first creation is being undone.
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        daemon.remove_container(&id).await.unwrap();
        eventually("the slot", || *node.inner.devices.lock().unwrap() == before).await;
        let files = || {
            let entries = std::fs::read_dir(node.path("r/pods").join(&pod)).unwrap();
            let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.starts_with("log-") || name.starts_with("scratch-")).count()
        };
        eventually("the files", || files() == 0).await;
        assert_eq!(daemon.containers(&Filter::default()).len(), 0);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}
