//! Life cycle of pods and containers without failures.

use std::time::Duration;

use super::agent::Process;
use super::test_node::{eventually, run_test};
use crate::model::{
    Access, ContainerState, ExecSpec, Filter, PodState, Propagation, Volume, VolumeSource,
};
use crate::{Config, Error};

pub(super) fn exec(args: &[&str]) -> ExecSpec {
    ExecSpec {
        command: args.iter().map(|a| (*a).to_owned()).collect(),
        tty: false,
        stdin: false,
        env: Vec::new(),
        user: String::new(),
        cwd: String::new(),
        tty_size: None,
    }
}

#[test]
fn a_pod_runs_a_container_and_leaves_nothing_after_its_removal() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("web")).await.unwrap();
        let view = daemon.pod(&pod[..12]).unwrap();
        assert_eq!((view.state, view.kernel_release.as_str()), (PodState::Ready, "6.1.0-fake"));
        assert_eq!(view.addresses.len(), 1);
        let phases: Vec<_> = daemon.trace(&pod).unwrap().into_iter().map(|p| p.name).collect();
        for phase in ["network", "launch", "boot", "configure"] {
            assert!(phases.contains(&phase.to_owned()), "{phases:?}");
        }

        let spec = node.container_spec("app", &["print", "one\ntwo\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Created);
        daemon.start_container(&id).await.unwrap();
        eventually("exit", || daemon.container(&id).unwrap().state == ContainerState::Exited).await;
        let exit = daemon.container(&id).unwrap().exit.unwrap();
        assert_eq!((exit.code, exit.reason.as_str()), (0, "Completed"));
        assert_eq!(node.log("app.log"), ["one", "two"]);

        daemon.remove_container(&id).await.unwrap();
        daemon.remove_container(&id).await.unwrap();
        assert!(daemon.containers(&Filter::default()).is_empty());
        assert!(node.inner.devices.lock().unwrap().is_empty(), "disks are still plugged");

        // The next attempt of the container in the same pod.
        let mut spec = node.container_spec("app", &["fail", "3"]);
        spec.meta.attempt = 1;
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        eventually("exit", || daemon.container(&id).unwrap().exit.is_some()).await;
        assert_eq!(daemon.container(&id).unwrap().exit.unwrap().code, 3);

        daemon.stop_pod(&pod).await.unwrap();
        daemon.stop_pod(&pod).await.unwrap();
        assert_eq!(daemon.pod(&pod).unwrap().state, PodState::NotReady);
        assert_eq!(daemon.container(&id).unwrap().exit.unwrap().code, 3);
        daemon.remove_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        assert!(daemon.pods(&Filter::default()).is_empty());
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn stop_sends_the_stop_signal_and_kills_after_the_grace_period() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        for (name, args, code) in [("soft", "forever", 143), ("hard", "ignore-term", 137)] {
            let spec = node.container_spec(name, &[args]);
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            daemon.stop_container(&id, Duration::from_millis(200)).await.unwrap();
            daemon.stop_container(&id, Duration::from_millis(200)).await.unwrap();
            assert_eq!(daemon.container(&id).unwrap().exit.unwrap().code, code, "{name}");
        }
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

/// Longer than the delay after which an earlier release repeated the stop signal for a new
/// container.
#[test]
fn the_stop_signal_is_sent_once_to_a_new_container() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["ignore-term"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        daemon.stop_container(&id, Duration::from_millis(2500)).await.unwrap();
        let guest = node.guest(&pod);
        let signals = guest.lock().processes[&(id.clone(), String::new())].signals.clone();
        assert_eq!(signals, [15, 9]);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn output_is_complete_after_a_broken_connection() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        for program in ["print-broken", "print-unframed"] {
            let spec = node.container_spec(program, &[program, "first\nlast\n"]);
            let id = daemon.create_container(&pod, spec).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            let log = || node.log(&format!("{program}.log"));
            eventually("the log is whole", || log().len() == 2).await;
            assert!(log()[0].ends_with("first") && log()[1].ends_with("last"), "{:?}", log());
        }
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        for program in ["print-broken", "print-unframed"] {
            let command = exec(&[program, "hello, world"]);
            let output = daemon.exec_sync(&id, command, None, 100).await.unwrap();
            assert_eq!((output.stdout.as_slice(), output.code), (&b"hello, world"[..], 0));
        }
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn exec_sync_enforces_its_timeout_and_output_limit() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let early = daemon.exec_sync(&id, exec(&["print", "x"]), None, 100).await;
        assert!(matches!(early, Err(Error::FailedPrecondition { .. })), "{early:?}");
        daemon.start_container(&id).await.unwrap();
        let output = daemon.exec_sync(&id, exec(&["print", "hello"]), None, 4).await.unwrap();
        assert_eq!((output.stdout.as_slice(), output.code), (&b"hell"[..], 0));
        let output = daemon.exec_sync(&id, exec(&["fail", "7"]), None, 100).await.unwrap();
        assert_eq!(output.code, 7);
        let limit = Some(Duration::from_millis(200));
        let late = daemon.exec_sync(&id, exec(&["forever"]), limit, 100).await;
        assert!(matches!(late, Err(Error::ExecTimeout { .. })), "{late:?}");
        let guest = node.guest(&pod);
        let killed =
            |((_, exec), p): (&(String, String), &Process)| exec.is_empty() || p.exit.is_some();
        assert!(
            guest.lock().processes.iter().all(killed),
            "the timeout was reported before the kill"
        );
        // A command that the guest starts after the timeout is killed.
        let limit = Some(Duration::from_millis(50));
        let late = daemon.exec_sync(&id, exec(&["slow"]), limit, 100).await;
        assert!(matches!(late, Err(Error::ExecTimeout { .. })), "{late:?}");
        let execs = || guest.lock().processes.keys().filter(|(_, exec)| !exec.is_empty()).count();
        let before = execs();
        eventually("it was started", || execs() > before).await;
        eventually("it was killed", || guest.lock().processes.iter().all(killed)).await;
        let stats = daemon.container_stats(&id).await.unwrap();
        assert_eq!(stats.pids, 3);
        daemon.stop_container(&id, Duration::from_secs(1)).await.unwrap();
        let late = daemon.exec_sync(&id, exec(&["print", "x"]), None, 100).await.unwrap_err();
        assert!(late.to_string().contains("is not running: it has exited"), "{late}");
        let late = daemon.attach(&id, false).await.err().unwrap();
        assert!(late.to_string().contains("is not running: it has exited"), "{late}");
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn copied_volumes_and_etc_files_are_mounted_in_the_guest() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        std::fs::create_dir(node.path("config")).unwrap();
        std::fs::write(node.path("config/key"), "value").unwrap();
        let mut spec = node.container_spec("app", &["forever"]);
        let copy = |host: &str, inside: &str| Volume {
            container_path: inside.into(),
            source: VolumeSource::Copied { host_path: node.path(host) },
            access: Access::ReadOnlyRecursive,
            propagation: Propagation::Private,
        };
        spec.volumes = vec![copy("config", "/config"), copy("config/key", "/etc/hosts")];
        daemon.create_container(&pod, spec).await.unwrap();
        let guest = node.guest(&pod);
        let request = guest.lock().create.clone().unwrap();
        let mounts: Vec<_> = request
            .volumes
            .iter()
            .map(|v| (v.destination.as_str(), v.sub_path.as_str(), v.read_only))
            .collect();
        assert_eq!(
            mounts,
            [
                ("/config", "", true),
                ("/etc/hosts", "file", true),
                ("/etc/hostname", "hostname", false),
                ("/etc/resolv.conf", "resolv.conf", false)
            ]
        );
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn attach_streams_new_output_and_log_rotation_loses_none() {
    use tokio::io::AsyncReadExt;
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["print-forever", "begin\n"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let mut attached = daemon.attach(&id, false).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        let mut out = attached.stdout.take().unwrap();
        let mut text = [0; 6];
        out.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"begin\n");
        eventually("log", || node.log("app.log") == ["begin"]).await;
        std::fs::rename(node.path("logs/app.log"), node.path("logs/app.log.1")).unwrap();
        daemon.reopen_log(&id).await.unwrap();
        node.guest(&pod).print(&id, "more\n");
        eventually("new log", || node.log("app.log") == ["more"]).await;
        assert_eq!(node.log("app.log.1"), ["begin"]);
        daemon.stop_container(&id, Duration::from_secs(1)).await.unwrap();
        assert_eq!(attached.process.wait().await.unwrap().code, 143);
        let mut rest = String::new();
        out.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "more\n");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn all_attached_clients_get_the_output_and_only_one_has_stdin() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut spec = node.container_spec("app", &["forever"]);
        spec.stdin = true;
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();
        let mut writer = daemon.attach(&id, true).await.unwrap();
        let mut reader = daemon.attach(&id, false).await.unwrap();
        assert!(writer.stdin.is_some() && reader.stdin.is_none());
        let guest = node.guest(&pod);
        let key = (id.clone(), String::new());
        writer.stdin.as_mut().unwrap().write_all(b"input").await.unwrap();
        eventually("input", || guest.lock().processes[&key].stdin == b"input").await;
        assert_eq!(guest.lock().processes[&key].stdin_connections, 1);
        guest.print(&id, "to all\n");
        for session in [&mut writer, &mut reader] {
            let mut text = [0; 7];
            session.stdout.as_mut().unwrap().read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"to all\n");
        }
        // A detached client does not affect the other.
        drop(writer);
        guest.print(&id, "to one\n");
        let mut text = [0; 7];
        reader.stdout.as_mut().unwrap().read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"to one\n");
        daemon.stop_container(&id, Duration::from_secs(1)).await.unwrap();
        assert_eq!(reader.process.wait().await.unwrap().code, 143);
        assert_eq!(reader.stdout.take().unwrap().read(&mut text).await.unwrap(), 0);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn reading_statistics_triggers_a_measurement_and_does_not_wait_for_the_guest() {
    run_test(|node| async move {
        let config = Config { stats_interval_ms: 3_600_000, ..node.config() };
        let daemon = node.daemon_with(config).await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let first = daemon.pod_stats(&pod).await.unwrap().at;
        tokio::time::sleep(Duration::from_secs(2)).await;
        node.guest(&pod).lock().unresponsive = true;
        let second = daemon.all_stats()[&pod].at;
        assert!(second > first);
        // From the cache while the guest does not answer.
        assert_eq!(daemon.pod_stats(&pod).await.unwrap().at, second);
        node.guest(&pod).lock().unresponsive = false;
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn the_vm_boots_during_the_network_attachment_and_gets_its_interfaces_afterwards() {
    run_test(|node| async move {
        *node.inner.attach_after_launch.lock().unwrap() = true;
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        assert_eq!(*node.inner.nics.lock().unwrap(), ["eth0"]);
        let configured = node.guest(&pod).lock().configure.clone().unwrap();
        assert_eq!(configured.interfaces[0].mac, "02:00:00:00:00:01");
        let phases = daemon.trace(&pod).unwrap();
        assert!(phases.is_sorted_by_key(|phase| phase.start_us), "{phases:?}");
        let phase = |name: &str| phases.iter().find(|phase| phase.name == name).unwrap();
        let (network, launch) = (phase("network"), phase("launch"));
        assert!(launch.start_us < network.start_us + network.duration_us, "{phases:?}");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_running_container_is_paused_and_resumed() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let spec = node.container_spec("app", &["forever"]);
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let refused = daemon.pause_container(&id).await.unwrap_err();
        assert!(matches!(refused, Error::FailedPrecondition { .. }), "{refused}");
        daemon.start_container(&id).await.unwrap();
        daemon.pause_container(&id).await.unwrap();
        daemon.resume_container(&id).await.unwrap();
        let asked: Vec<(String, bool)> = {
            let guest = node.guest(&pod);
            let guest = guest.lock();
            guest.freezes.iter().map(|r| (r.container_id.clone(), r.frozen)).collect()
        };
        assert_eq!(asked, [(id.clone(), true), (id, false)]);
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}
