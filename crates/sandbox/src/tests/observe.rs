//! Measurements that an observer receives.

use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::test_node::{TestNode, eventually, run_test};
use crate::model::{ContainerState, PodState};
use crate::observe::{DeathCause, Measured, Observer, Outcome, PodKind};
use crate::{Config, Sandboxes};

/// Measurements as text, without durations.
#[derive(Debug, Default)]
struct Seen(Mutex<Vec<String>>);

impl Observer for Seen {
    fn measured(&self, measured: Measured<'_>) {
        let text = match measured {
            Measured::StartPhase { phase, .. } => format!("phase {phase}"),
            Measured::Start { kind, outcome, .. } => format!("start {kind:?} {outcome:?}"),
            Measured::Boot { from, outcome, .. } => format!("boot from {from:?} {outcome:?}"),
            Measured::TemplateSave { outcome, .. } => format!("template {outcome:?}"),
            Measured::VmmDeath { cause } => format!("death {cause:?}"),
            Measured::OomKill { victim } => format!("oom {victim:?}"),
            Measured::GuestCall { call, outcome, .. } => format!("call {call} {outcome:?}"),
            Measured::JournalWrite { outcome, .. } => format!("write {outcome:?}"),
            Measured::JournalSync { .. } => "sync".to_owned(),
        };
        self.0.lock().unwrap().push(text);
    }
}

impl Seen {
    fn count(&self, text: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|seen| *seen == text).count()
    }
}

async fn daemon(node: &TestNode, config: Config) -> (Sandboxes, Arc<Seen>) {
    let (this, seen) = (Arc::new(node.clone()), Arc::new(Seen::default()));
    let daemon = Sandboxes::open_observed(config, this.clone(), this, seen.clone()).await.unwrap();
    (daemon, seen)
}

#[test]
fn an_observer_receives_starts_and_vmm_deaths() {
    run_test(|node| async move {
        let (daemon, seen) = daemon(&node, node.config()).await;
        let pod = daemon.run_pod(node.pod_spec("a")).await.unwrap();
        for text in [
            "phase network",
            "phase launch",
            "phase boot",
            "phase configure",
            "boot from Kernel Ok",
        ] {
            assert_eq!(seen.count(text), 1, "{text}: {seen:?}");
        }
        assert_eq!(seen.count(&format!("start {:?} {:?}", PodKind::Vm, Outcome::Ok)), 1);
        assert_eq!(seen.count("call configure the pod Ok"), 1);
        assert!(seen.count("write Ok") >= 3, "{seen:?}");
        // Record, header and folder.
        assert!(seen.count("sync") >= 2 * seen.count("write Ok"), "{seen:?}");
        assert_eq!(seen.count("write Failed"), 0);

        // One that is stopped has not died.
        daemon.stop_pod(&pod).await.unwrap();
        let killed = format!("death {:?}", DeathCause::Killed);
        assert_eq!(seen.count(&killed), 0, "{seen:?}");
        let pod = daemon.run_pod(node.pod_spec("b")).await.unwrap();
        kill(Pid::from_raw(node.vmm_pid(&pod) as i32), Signal::SIGKILL).unwrap();
        eventually("not ready", || daemon.pod(&pod).unwrap().state == PodState::NotReady).await;
        assert_eq!(seen.count(&killed), 1, "{seen:?}");
        assert_eq!(seen.count("oom Vmm"), 0);
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn an_observer_is_told_once_of_a_container_that_the_oom_killer_ends() {
    run_test(|node| async move {
        let (daemon, seen) = daemon(&node, node.config()).await;
        let pod = daemon.run_pod(node.pod_spec("a")).await.unwrap();
        for (name, args) in [("hungry", &["eat"][..]), ("sated", &["fail", "137"])] {
            let id = daemon.create_container(&pod, node.container_spec(name, args)).await.unwrap();
            daemon.start_container(&id).await.unwrap();
            let exited = || daemon.container(&id).unwrap().state == ContainerState::Exited;
            eventually("exit", exited).await;
            daemon.remove_container(&id).await.unwrap();
        }
        assert_eq!(seen.count("oom Container"), 1, "{seen:?}");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(seen.count("oom Container") + seen.count("oom Vmm"), 1, "{seen:?}");
    });
}

#[test]
fn an_observer_is_told_of_a_start_that_fails_and_of_one_that_takes_too_long() {
    run_test(|node| async move {
        let config = Config { boot_deadline_ms: 300, ..node.config() };
        let (daemon, seen) = daemon(&node, config).await;
        *node.inner.fail_network.lock().unwrap() = true;
        daemon.run_pod(node.pod_spec("a")).await.unwrap_err();
        assert_eq!(seen.count("start Vm Failed"), 1, "{seen:?}");
        *node.inner.fail_network.lock().unwrap() = false;
        *node.inner.guest_never_answers.lock().unwrap() = true;
        daemon.run_pod(node.pod_spec("b")).await.unwrap_err();
        assert_eq!(seen.count("boot from Kernel TimedOut"), 1, "{seen:?}");
        assert_eq!(seen.count("start Vm Failed"), 2, "{seen:?}");
        assert_eq!(seen.count("start Vm Ok") + seen.count("boot from Kernel Ok"), 0, "{seen:?}");
    });
}
