//! What goes wrong, and that it leaves nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::exec;
use super::volumes::volume;
use super::world::{eventually, story};
use crate::failpoint::{Failpoints, Hook, Verdict, When};
use crate::model::{Access, ContainerState, Filter, PodState, VolumeSource};
use crate::observe::Unobserved;
use crate::{Error, Sandboxes};

#[test]
fn of_twenty_pods_with_one_name_one_is_made() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let tries = (0..20).map(|_| daemon.run_pod(world.pod_spec("same")));
        let results = futures_util::future::join_all(tries).await;
        let made: Vec<_> = results.iter().filter_map(|r| r.as_ref().ok()).collect();
        assert_eq!(made.len(), 1);
        assert!(results.iter().all(|r| matches!(r, Ok(_) | Err(Error::Exists { .. }))));
        daemon.remove_pod(made[0]).await.unwrap();
        let again = daemon.run_pod(world.pod_spec("same")).await.unwrap();
        daemon.remove_pod(&again).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_stop_during_the_boot_does_not_wait_for_it() {
    story(|world| async move {
        *world.inner.mute.lock().unwrap() = true;
        let daemon = world.daemon().await;
        let starting = tokio::spawn({
            let (daemon, spec) = (daemon.clone(), world.pod_spec("slow"));
            async move { daemon.run_pod(spec).await }
        });
        eventually("launch", || !world.inner.guests.lock().unwrap().is_empty()).await;
        assert!(daemon.pods(&Filter::default()).is_empty(), "a pod that starts is not listed");
        let pod = world.inner.guests.lock().unwrap().keys().next().unwrap().clone();
        let began = Instant::now();
        daemon.stop_pod(&pod).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(matches!(starting.await.unwrap(), Err(Error::Cancelled { .. })));
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_caller_that_goes_away_has_its_pod_unwound() {
    story(|world| async move {
        *world.inner.mute.lock().unwrap() = true;
        let daemon = world.daemon().await;
        let start = daemon.run_pod(world.pod_spec("gone"));
        assert!(tokio::time::timeout(Duration::from_millis(300), start).await.is_err());
        eventually("unwound", || world.leftovers().is_empty()).await;
    });
}

#[test]
fn a_network_that_fails_and_a_vmm_that_dies_fail_the_start_with_the_reason() {
    story(|world| async move {
        let daemon = world.daemon().await;
        *world.inner.fail_network.lock().unwrap() = true;
        let error = daemon.run_pod(world.pod_spec("a")).await.unwrap_err().to_string();
        assert!(error.contains("no more addresses"), "{error}");
        // The guest would never come up, and is not waited for.
        world.inner.guests.lock().unwrap().clear();
        *world.inner.mute.lock().unwrap() = true;
        *world.inner.attach_beside_boot.lock().unwrap() = true;
        let error = daemon.run_pod(world.pod_spec("c")).await.unwrap_err().to_string();
        assert!(error.contains("no more addresses"), "{error}");
        assert_eq!(world.leftovers(), Vec::<String>::new());
        *world.inner.fail_network.lock().unwrap() = false;
        *world.inner.attach_beside_boot.lock().unwrap() = false;
        world.inner.guests.lock().unwrap().clear();
        let start = tokio::spawn({
            let (daemon, spec) = (daemon.clone(), world.pod_spec("b"));
            async move { daemon.run_pod(spec).await }
        });
        eventually("launch", || !world.inner.guests.lock().unwrap().is_empty()).await;
        let pid = world.inner.guests.lock().unwrap().values().next().unwrap().0;
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        let error = start.await.unwrap().unwrap_err().to_string();
        assert!(error.contains("the pod ended while it started"), "{error}");
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_start_that_waits_for_the_network_ends_with_its_vmm_or_by_a_stop() {
    story(|world| async move {
        let daemon = world.daemon().await;
        *world.inner.attach_queued.lock().unwrap() = true;
        let start = |name: &str| {
            world.inner.guests.lock().unwrap().clear();
            let (daemon, spec) = (daemon.clone(), world.pod_spec(name));
            tokio::spawn(async move { daemon.run_pod(spec).await })
        };
        let launched = || world.inner.guests.lock().unwrap().clone().into_iter().next();

        *world.inner.mute.lock().unwrap() = true;
        let starting = start("a");
        eventually("launch", || launched().is_some()).await;
        kill(Pid::from_raw(launched().unwrap().1.0 as i32), Signal::SIGKILL).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), starting).await.unwrap();
        let error = ended.unwrap().unwrap_err().to_string();
        assert!(error.contains("the pod ended while it started"), "{error}");

        *world.inner.mute.lock().unwrap() = false;
        let starting = start("b");
        eventually("launch", || launched().is_some()).await;
        daemon.stop_pod(&launched().unwrap().0).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), starting).await.unwrap();
        assert!(matches!(ended.unwrap(), Err(Error::Cancelled { .. })));
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_killed_vmm_turns_the_pod_not_ready_with_a_reason() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["print-forever", "last words\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("log", || world.log("app.log").len() == 1).await;
        kill(Pid::from_raw(world.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("killed"));
        let container = daemon.container(&id).unwrap();
        assert_eq!(container.state, ContainerState::Exited);
        assert_eq!(container.exit.unwrap().reason, "VmDied");
        let refused = daemon.create_container(&pod, world.container_spec("b", &["forever"])).await;
        assert!(matches!(refused, Err(Error::FailedPrecondition { .. })));
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn nobody_asks_anything_of_a_vm_that_has_died() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        kill(Pid::from_raw(world.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        let door = world.path("s/pods").join(&pod).join("vsock.sock");
        std::fs::remove_file(&door).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&door).unwrap();
        listener.set_nonblocking(true).unwrap();
        // Pings and statistics come every 100 ms.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let asked = listener.accept().map(drop);
        assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_log_that_cannot_be_opened_after_a_restart_holds_up_nothing_else() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let spec = world.container_spec(name, &["print-forever", "one\n"]);
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            ids.push(id);
        }
        let [a, b] = <[String; 2]>::try_from(ids).unwrap();
        eventually("logs", || ["a.log", "b.log"].iter().all(|log| world.log(log) == ["one"])).await;
        daemon.shutdown().await;
        drop(daemon);
        let log = world.path("logs/a.log");
        std::fs::remove_file(&log).unwrap();
        std::fs::create_dir(&log).unwrap();
        let daemon = world.daemon().await;
        for id in [&a, &b] {
            world.guest(&pod).print(id, "two\n");
            let limit = Some(Duration::from_secs(5));
            let output = daemon.exec_sync(id, exec(&["print", "hi"]), limit, 100).await.unwrap();
            assert_eq!(output.stdout, b"hi");
        }
        eventually("the other log", || world.log("b.log") == ["one", "two"]).await;
        let reopened = daemon.reopen_log(&a).await;
        let refused = reopened.unwrap_err().to_string();
        assert!(refused.contains("reopen the container's log"), "{refused}");
        for id in [&a, &b] {
            daemon.stop_container(id, Duration::from_secs(1)).await.unwrap();
            assert_eq!(daemon.container(id).unwrap().exit.unwrap().code, 143);
        }
        std::fs::remove_dir(&log).unwrap();
        eventually("the rest of the output", || world.log("a.log") == ["two"]).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_log_that_cannot_be_opened_again_is_written_where_it_was() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["print-forever", "one\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("log", || world.log("app.log") == ["one"]).await;
        let (log, rotated) = (world.path("logs/app.log"), world.path("logs/app.log.1"));
        std::fs::rename(&log, &rotated).unwrap();
        std::fs::create_dir(&log).unwrap();
        let reopened = daemon.reopen_log(&id).await;
        let refused = reopened.unwrap_err().to_string();
        assert!(refused.contains("reopen the container's log"), "{refused}");
        world.guest(&pod).print(&id, "two\n");
        eventually("the old log", || world.log("app.log.1") == ["one", "two"]).await;
        std::fs::remove_dir(&log).unwrap();
        daemon.reopen_log(&id).await.unwrap();
        world.guest(&pod).print(&id, "three\n");
        eventually("the new log", || world.log("app.log") == ["three"]).await;
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn an_end_is_shown_while_a_child_holds_the_output_open_and_the_rest_is_logged() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["leave", "first\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let began = Instant::now();
        daemon.start_container(&id).await.unwrap();
        let exited = || daemon.container(&id).unwrap().state == ContainerState::Exited;
        eventually("exit", exited).await;
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(world.log("app.log"), ["first"], "shown before its output was logged");
        let guest = world.guest(&pod);
        guest.print(&id, "late\n");
        eventually("late output", || world.log("app.log") == ["first", "late"]).await;
        guest.print(&id, "last");
        guest.let_go(&id);
        eventually("last output", || world.log("app.log") == ["first", "late", "last"]).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_pods_processes_have_the_oom_score_of_its_class_and_then_of_its_containers() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        spec.cgroup_parent += "/kubepods/burstable/podx";
        let pod = daemon.run_pod(spec).await.unwrap();
        let pid = world.vmm_pid(&pod);
        let score = |pid: u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        assert_eq!(score(pid), 500);
        let mut spec = world.container_spec("app", &["forever"]);
        spec.oci.process_mut().as_mut().unwrap().set_oom_score_adj(Some(300));
        spec.volumes =
            vec![volume(VolumeSource::Shared { host_path: world.path("") }, Access::ReadWrite)];
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let server = world.inner.file_servers.lock().unwrap()[0];
        assert_eq!((score(pid), score(server)), (300, 300));
        daemon.shutdown().await;
        drop(daemon);
        // As a former release has left it.
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), "200").unwrap();
        let daemon = world.daemon().await;
        eventually("set again", || score(pid) == 300).await;
        daemon.remove_container(&id).await.unwrap();
        assert_eq!((score(pid), score(server)), (500, 500));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_guest_that_falls_silent_is_killed_and_listing_does_not_wait_for_it() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        world.guest(&pod).lock().silent = true;
        let began = Instant::now();
        assert_eq!(daemon.pods(&Filter::default()).len(), 1);
        assert!(began.elapsed() < Duration::from_millis(50));
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        assert!(daemon.pod(&pod).unwrap().reason.contains("stopped answering"));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_guest_that_answers_with_errors_or_speaks_another_protocol_is_not_killed() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let (interval, misses) = (world.config().ping_interval(), world.config().ping_misses);
        let long = interval * (2 * misses + 4);
        world.guest(&pod).lock().refuse_hello = true;
        tokio::time::sleep(long).await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
        {
            let guest = world.guest(&pod);
            let mut guest = guest.lock();
            (guest.refuse_hello, guest.protocol) = (false, agent_api::PROTOCOL + 1);
        }
        tokio::time::sleep(long).await;
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
        world.guest(&pod).lock().silent = true;
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_container_that_cannot_be_made_leaves_its_name_and_its_disks_free() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        world.guest(&pod).lock().refuse_create = true;
        let spec = world.container_spec("app", &["forever"]);
        let error = daemon.create_container(&pod, spec.clone()).await.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
        assert!(world.inner.devices.lock().unwrap().is_empty());
        world.guest(&pod).lock().refuse_create = false;
        let id = daemon.create_container(&pod, spec.clone()).await.unwrap();
        let twice = daemon.create_container(&pod, spec).await;
        assert!(matches!(twice, Err(Error::Exists { .. })));
        let mut spec = world.container_spec("bad", &["missing"]);
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
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_container_that_the_guest_does_not_let_go_of_is_removed_later() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let refuse = |create, remove| {
            let guest = world.guest(&pod);
            let mut state = guest.lock();
            (state.refuse_create, state.refuse_remove) = (create, remove);
        };
        let spec = world.container_spec("app", &["forever"]);
        refuse(true, true);
        assert!(daemon.create_container(&pod, spec.clone()).await.is_err());
        // The VM has its disks still, so its name is not free.
        assert!(!world.inner.devices.lock().unwrap().is_empty());
        let taken = daemon.create_container(&pod, spec.clone()).await;
        assert!(matches!(taken, Err(Error::Exists { .. })), "{taken:?}");
        refuse(false, false);
        eventually("disks are pulled", || world.inner.devices.lock().unwrap().is_empty()).await;
        let mut again = daemon.create_container(&pod, spec.clone()).await;
        while let Err(Error::Exists { .. }) = again {
            tokio::time::sleep(Duration::from_millis(20)).await;
            again = daemon.create_container(&pod, spec.clone()).await;
        }

        // A removal that nobody will ask for again: no listing shows it.
        refuse(false, true);
        daemon.remove_container(&again.unwrap()).await.unwrap_err();
        assert!(daemon.containers(&Filter::default()).is_empty());
        refuse(false, false);
        eventually("disks are pulled", || world.inner.devices.lock().unwrap().is_empty()).await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

/// A disk that is full while it is set.
#[derive(Default)]
struct Full(AtomicBool);

impl Hook for Full {
    fn reached(&self, when: When, what: &str) -> Verdict {
        match what.starts_with("journal") && when == When::Before && self.0.load(Ordering::SeqCst) {
            true => Verdict::Fail,
            false => Verdict::Pass,
        }
    }
}

#[test]
fn a_full_disk_keeps_no_pod_alive_and_no_container_unseen() {
    story(|world| async move {
        let (this, full) = (Arc::new(world.clone()), Arc::new(Full::default()));
        let failpoints = Failpoints::new(full.clone());
        let daemon = Sandboxes::open_at(
            world.config(),
            this.clone(),
            this,
            Arc::new(Unobserved),
            failpoints,
        );
        let daemon = daemon.await.unwrap();
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        full.0.store(true, Ordering::SeqCst);
        daemon.start_container(&id).await.unwrap();
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        daemon.stop_pod(&pod).await.unwrap();
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::NotReady);
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited);
        assert!(world.inner.attached.lock().unwrap().is_empty());
        full.0.store(false, Ordering::SeqCst);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn of_two_starts_one_is_refused_and_hurts_nobody() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let starts = futures_util::future::join_all((0..4).map(|_| daemon.start_container(&id)));
        let results = starts.await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_container_whose_start_was_not_confirmed_does_not_run_beside_another() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let id =
            daemon.create_container(&pod, world.container_spec("app", &["late"])).await.unwrap();
        let failed = daemon.start_container(&id).await;
        assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
        eventually("it was killed", || daemon.container(&id).unwrap().exit.is_some()).await;
        assert_eq!(daemon.container(&id).unwrap().exit.unwrap().code, 137);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_daemon_that_ends_under_a_request_does_not_say_that_it_is_done() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let spec = world.container_spec("app", &["stubborn"]);
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
        let daemon = world.daemon().await;
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_profile_of_apparmor_that_the_host_does_not_have_makes_no_container() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("confined")).await.unwrap();
        let mut spec = world.container_spec("c", &["true"]);
        let process = spec.oci.process_mut().as_mut().unwrap();
        process.set_apparmor_profile(Some("nacelle-no-such-profile".into()));
        let error = daemon.create_container(&pod, spec).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }), "{error:?}");
        assert!(error.to_string().contains("AppArmor"), "{error}");
        assert!(daemon.containers(&Filter::default()).is_empty());
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_collection_of_networks_that_hangs_delays_no_start() {
    story(|world| async move {
        *world.inner.hang_collect.lock().unwrap() = true;
        let opening = tokio::time::timeout(Duration::from_secs(10), world.daemon());
        let daemon = opening.await.expect("the daemon waits for the collection");
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        let ending = tokio::time::timeout(Duration::from_secs(10), daemon.shutdown());
        ending.await.expect("the end waits for the collection");
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_create_that_is_given_up_while_its_disk_is_plugged_leaves_nothing_and_frees_its_name() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let before = world.inner.devices.lock().unwrap().clone();
        *world.inner.slow_disks.lock().unwrap() = Duration::from_millis(1_000);
        let spec = world.container_spec("app", &["forever"]);
        let create = daemon.create_container(&pod, spec.clone());
        assert!(tokio::time::timeout(Duration::from_millis(500), create).await.is_err());
        *world.inner.slow_disks.lock().unwrap() = Duration::ZERO;
        // The name is free while the first is still being undone.
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        daemon.remove_container(&id).await.unwrap();
        eventually("the slot", || *world.inner.devices.lock().unwrap() == before).await;
        let files = || {
            let entries = std::fs::read_dir(world.path("r/pods").join(&pod)).unwrap();
            let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.starts_with("log-") || name.starts_with("scratch-")).count()
        };
        eventually("the files", || files() == 0).await;
        assert_eq!(daemon.containers(&Filter::default()).len(), 0);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}
