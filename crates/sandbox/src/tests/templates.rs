//! Pods that start from the saved VM of an earlier one.

use super::test_node::{TestNode, run_test};
use crate::Config;
use crate::model::PodSpec;

fn config(node: &TestNode) -> Config {
    Config { templates: 1, ..node.config() }
}

fn sized(node: &TestNode, name: &str, memory_mib: u32) -> PodSpec {
    PodSpec { memory_mib: Some(memory_mib), ..node.pod_spec(name) }
}

fn restored(node: &TestNode) -> Vec<bool> {
    node.inner.restored.lock().unwrap().clone()
}

#[test]
fn the_second_pod_of_a_size_starts_from_the_saved_vm_of_the_first() {
    run_test(|node| async move {
        let pods = node.daemon_with(config(&node)).await;
        for (name, memory_mib) in [("a", 64), ("b", 64), ("c", 64)] {
            let id = pods.run_pod(sized(&node, name, memory_mib)).await.unwrap();
            let trace = pods.trace(&id).unwrap();
            let has = |phase: &str| trace.iter().any(|found| found.name == phase);
            assert_eq!((has("boot"), has("template")), (name == "a", name == "a"), "{trace:?}");
            assert_eq!(has("restore"), name != "a", "{trace:?}");
        }
        assert_eq!(restored(&node), [false, true, true]);
        // Another size boots; the only template that is kept is in use.
        pods.run_pod(sized(&node, "d", 96)).await.unwrap();
        pods.run_pod(sized(&node, "e", 96)).await.unwrap();
        pods.run_pod(sized(&node, "f", 64)).await.unwrap();
        assert_eq!(restored(&node)[3..], [false, false, true]);
    });
}

#[test]
fn a_pod_whose_template_cannot_be_used_boots() {
    run_test(|node| async move {
        let pods = node.daemon_with(config(&node)).await;
        pods.run_pod(sized(&node, "a", 64)).await.unwrap();
        *node.inner.fail_restores.lock().unwrap() = true;
        let id = pods.run_pod(sized(&node, "b", 64)).await.unwrap();
        assert_eq!(restored(&node), [false, true, false]);
        // Its VM is the second one, and ends with it.
        pods.stop_pod(&id).await.unwrap();
        pods.remove_pod(&id).await.unwrap();
        pods.run_pod(sized(&node, "c", 64)).await.unwrap();
        assert_eq!(restored(&node), [false, true, false, false], "an unusable template was used");
    });
}

#[test]
fn a_vm_that_cannot_be_saved_is_no_failure_of_its_pod() {
    run_test(|node| async move {
        *node.inner.refuse_snapshots.lock().unwrap() = true;
        let pods = node.daemon_with(config(&node)).await;
        for name in ["a", "b"] {
            pods.run_pod(sized(&node, name, 64)).await.unwrap();
        }
        assert_eq!(restored(&node), [false, false]);
    });
}

#[test]
fn a_cancelled_restore_is_not_followed_by_a_boot() {
    run_test(|node| async move {
        let pods = node.daemon_with(config(&node)).await;
        pods.run_pod(sized(&node, "a", 64)).await.unwrap();
        *node.inner.guest_never_answers.lock().unwrap() = true;
        *node.inner.attach_after_launch.lock().unwrap() = true;
        *node.inner.fail_network.lock().unwrap() = true;
        pods.run_pod(sized(&node, "b", 64)).await.unwrap_err();
        assert_eq!(restored(&node)[1..], [true]);
    });
}
