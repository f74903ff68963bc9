//! Resizing of pods and containers.

use oci_spec::runtime::LinuxResources;

use super::test_node::run_test;
use crate::Error;
use crate::model::{CpuLimits, PodResources};

const MIB: i64 = 1 << 20;

fn limits(text: &str) -> LinuxResources {
    serde_json::from_str(text).unwrap()
}

fn vcpus(count: u8) -> PodResources {
    PodResources { vcpus: Some(count), ..PodResources::default() }
}

#[test]
fn cpus_are_brought_online_and_offline_and_kept_across_a_restart() {
    run_test(|node| async move {
        if std::thread::available_parallelism().unwrap().get() < 2 {
            eprintln!("SKIP: this host has no second CPU to be given to a pod");
            return;
        }
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        spec.vcpus = Some(1);
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let guest = node.guest(&pod);
        let cpus = || guest.lock().cpus;
        assert_eq!(cpus(), 1);
        daemon.update_pod(&pod, vcpus(2)).await.unwrap();
        assert_eq!((cpus(), daemon.pod(&pod).unwrap().spec.vcpus), (2, Some(2)));
        let refused = daemon.update_pod(&pod, vcpus(200)).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert_eq!((cpus(), daemon.pod(&pod).unwrap().spec.vcpus), (2, Some(2)));

        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!(view.spec.vcpus, Some(2));
        daemon.update_pod(&pod, vcpus(1)).await.unwrap();
        assert_eq!(cpus(), 1);
        daemon.stop_pod(&pod).await.unwrap();
        let stopped = daemon.update_pod(&pod, vcpus(2)).await.unwrap_err();
        assert!(matches!(stopped, Error::FailedPrecondition { .. }), "{stopped}");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn memory_is_plugged_and_unplugged_and_a_partial_resize_is_reported() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let memory = |mib| PodResources { memory_mib: Some(mib), ..PodResources::default() };
        let set_memory_bounds =
            |least, most| *node.inner.memory_bounds.lock().unwrap() = (least, most);
        let journaled = |daemon: &crate::Sandboxes| daemon.pod(&pod).unwrap().spec.memory_mib;

        for mib in [512, 300, 128, 256] {
            daemon.update_pod(&pod, memory(mib)).await.unwrap();
            assert_eq!(journaled(&daemon), Some(mib));
        }
        let refused = daemon.update_pod(&pod, memory(513)).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        let refused = refused.to_string();
        assert!(refused.contains("513 MiB") && refused.contains("512 MiB"), "{refused}");

        // The guest plugs only a part: the target is reset.
        set_memory_bounds(0, 300);
        let failed = daemon.update_pod(&pod, memory(400)).await.unwrap_err();
        assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
        assert!(failed.to_string().contains("300 of the 400 MiB"), "{failed}");
        assert_eq!(journaled(&daemon), Some(256));
        set_memory_bounds(0, u32::MAX);
        daemon.update_pod(&pod, memory(400)).await.unwrap();

        // A small unmovable rest is not an error.
        set_memory_bounds(258, u32::MAX);
        daemon.update_pod(&pod, memory(256)).await.unwrap();
        assert_eq!(journaled(&daemon), Some(256));
        daemon.update_pod(&pod, memory(400)).await.unwrap();

        // The guest keeps more: that size is recorded, also across a restart.
        set_memory_bounds(350, u32::MAX);
        let kept = daemon.update_pod(&pod, memory(256)).await.unwrap_err();
        assert!(matches!(kept, Error::FailedPrecondition { .. }), "{kept}");
        assert_eq!(journaled(&daemon), Some(350));
        daemon.shutdown().await;
        drop(daemon);
        let daemon = node.daemon().await;
        assert_eq!(journaled(&daemon), Some(350));
        set_memory_bounds(0, u32::MAX);
        daemon.update_pod(&pod, memory(256)).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn memory_is_reset_if_the_cpu_resize_fails() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let both =
            PodResources { vcpus: Some(200), memory_mib: Some(512), ..PodResources::default() };
        let refused = daemon.update_pod(&pod, both).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert_eq!(*node.inner.vm_memory.lock().unwrap(), 256);
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(256));
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn cpu_limits_are_set_after_the_boot_and_can_be_updated() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        let cap = |quota| CpuLimits { quota_us: quota, period_us: None, shares: Some(2048) };
        spec.cpu = cap(Some(150_000));
        let pod = daemon.run_pod(spec).await.unwrap();
        let Ok(max) = std::fs::read_to_string(node.cgroup_file(&pod, "cpu.max")) else {
            eprintln!("SKIP: no cpu controller in this host's cgroup v2");
            return daemon.remove_pod(&pod).await.unwrap();
        };
        assert_eq!(max.trim(), "150000 100000");
        for (quota, text) in [(Some(50_000), "50000 100000"), (None, "max 100000")] {
            let change = PodResources { cpu: Some(cap(quota)), ..PodResources::default() };
            daemon.update_pod(&pod, change).await.unwrap();
            let max = std::fs::read_to_string(node.cgroup_file(&pod, "cpu.max")).unwrap();
            assert_eq!(max.trim(), text);
        }
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn the_pod_gets_the_containers_cpusets_and_the_guest_does_not() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let cpus = || std::fs::read_to_string(node.cgroup_file(&pod, "cpuset.cpus"));
        let mut spec = node.container_spec("app", &["forever"]);
        let mut linux = oci_spec::runtime::Linux::default();
        linux.set_resources(Some(limits(r#"{"cpu":{"cpus":"0","mems":"0","shares":77}}"#)));
        spec.oci.set_linux(Some(linux));
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let guest_spec = node.guest(&pod).lock().create.take().unwrap().oci_spec;
        let guest_spec: oci_spec::runtime::Spec = serde_json::from_slice(&guest_spec).unwrap();
        let guest_spec = guest_spec.linux().as_ref().unwrap().resources().clone().unwrap();
        assert_eq!(guest_spec, limits(r#"{"cpu":{"shares":77}}"#));
        let has = |id: &str| daemon.container(id).unwrap().resources.cpu().clone().unwrap();
        assert_eq!(has(&id).cpus().as_deref(), Some("0"));
        let Ok(pinned) = cpus() else {
            eprintln!("SKIP: no cpuset controller in this host's cgroup v2");
            return daemon.remove_pod(&pod).await.unwrap();
        };
        assert_eq!(pinned.trim(), "0");

        // A second container without a cpuset: the pod may use all CPUs until it is removed.
        let other = node.container_spec("other", &["forever"]);
        let other = daemon.create_container(&pod, other).await.unwrap();
        let parent = node.cgroup_file(&pod, "../cpuset.cpus.effective");
        let all = std::fs::read_to_string(parent).unwrap();
        assert_eq!(cpus().unwrap().trim(), all.trim());
        daemon.remove_container(&other).await.unwrap();
        assert_eq!(cpus().unwrap().trim(), "0");

        let update = limits(&format!(r#"{{"cpu":{{"cpus":"{}"}}}}"#, all.trim()));
        daemon.update_container(&id, update).await.unwrap();
        assert_eq!(cpus().unwrap().trim(), all.trim());
        let refused = daemon.update_container(&id, limits(r#"{"cpu":{"cpus":"9-1"}}"#)).await;
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })), "{refused:?}");
        assert_eq!(has(&id).cpus().as_deref(), Some(all.trim()));
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(node.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn raised_container_limits_grow_the_vm_up_to_its_maximum() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut spec = node.pod_spec("p");
        spec.vcpus = Some(1);
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let mut spec = node.container_spec("app", &["forever"]);
        let mut linux = oci_spec::runtime::Linux::default();
        let small = format!(r#"{{"memory":{{"limit":{}}},"cpu":{{"quota":50000}}}}"#, 64 * MIB);
        linux.set_resources(Some(limits(&small)));
        spec.oci.set_linux(Some(linux));
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();

        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 513 * MIB));
        let refused = daemon.update_container(&id, more).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert!(node.guest(&pod).lock().update.is_none(), "the guest was called anyway");
        let memory = |id: &str| daemon.container(id).unwrap().resources.memory().unwrap().limit();
        assert_eq!(memory(&id), Some(64 * MIB));

        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 200 * MIB));
        daemon.update_container(&id, more).await.unwrap();
        assert_eq!(memory(&id), Some(200 * MIB));
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(256));
        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 300 * MIB));
        daemon.update_container(&id, more).await.unwrap();
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(300));
        assert_eq!(*node.inner.vm_memory.lock().unwrap(), 300);
        daemon.update_container(&id, limits(r#"{"cpu":{"quota":170000}}"#)).await.unwrap();
        let host = std::thread::available_parallelism().unwrap().get().min(2) as u32;
        assert_eq!(node.guest(&pod).lock().cpus, host);
        assert_eq!(daemon.pod(&pod).unwrap().spec.vcpus, Some(host as u8));
        // CPUs remain online when a container's limit is lowered.
        daemon.update_container(&id, limits(r#"{"cpu":{"quota":20000}}"#)).await.unwrap();
        assert_eq!(node.guest(&pod).lock().cpus, host);
        daemon.remove_pod(&pod).await.unwrap();
    });
}
