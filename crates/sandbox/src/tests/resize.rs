//! Pods and containers that are given more, or less.

use oci_spec::runtime::LinuxResources;

use super::world::story;
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
fn a_pod_gets_parked_cpus_gives_them_back_and_keeps_what_it_was_given_over_a_restart() {
    story(|world| async move {
        if std::thread::available_parallelism().unwrap().get() < 2 {
            eprintln!("SKIP: this host has no second CPU to be given to a pod");
            return;
        }
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        spec.vcpus = Some(1);
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let guest = world.guest(&pod);
        let cpus = || guest.lock().cpus;
        assert_eq!(cpus(), 1);
        daemon.update_pod(&pod, vcpus(2)).await.unwrap();
        assert_eq!((cpus(), daemon.pod(&pod).unwrap().spec.vcpus), (2, Some(2)));
        let refused = daemon.update_pod(&pod, vcpus(200)).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert_eq!((cpus(), daemon.pod(&pod).unwrap().spec.vcpus), (2, Some(2)));

        daemon.shutdown().await;
        drop(daemon);
        let daemon = world.daemon().await;
        let view = daemon.pod(&pod).unwrap();
        assert_eq!(view.spec.vcpus, Some(2));
        daemon.update_pod(&pod, vcpus(1)).await.unwrap();
        assert_eq!(cpus(), 1);
        daemon.stop_pod(&pod).await.unwrap();
        let stopped = daemon.update_pod(&pod, vcpus(2)).await.unwrap_err();
        assert!(matches!(stopped, Error::FailedPrecondition { .. }), "{stopped}");
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_pods_memory_grows_and_shrinks_and_what_a_guest_does_not_do_is_told_and_kept() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let memory = |mib| PodResources { memory_mib: Some(mib), ..PodResources::default() };
        let stubborn = |least, most| *world.inner.stubborn.lock().unwrap() = (least, most);
        let journaled = |daemon: &crate::Sandboxes| daemon.pod(&pod).unwrap().spec.memory_mib;

        for mib in [512, 300, 128, 256] {
            daemon.update_pod(&pod, memory(mib)).await.unwrap();
            assert_eq!(journaled(&daemon), Some(mib));
        }
        let refused = daemon.update_pod(&pod, memory(513)).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        let refused = refused.to_string();
        assert!(refused.contains("513 MiB") && refused.contains("512 MiB"), "{refused}");

        // The guest takes a part and stops: the rest is not left for it to take.
        stubborn(0, 300);
        let failed = daemon.update_pod(&pod, memory(400)).await.unwrap_err();
        assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
        assert!(failed.to_string().contains("300 of the 400 MiB"), "{failed}");
        assert_eq!(journaled(&daemon), Some(256));
        stubborn(0, u32::MAX);
        daemon.update_pod(&pod, memory(400)).await.unwrap();

        // A block that the guest's kernel sits on is not worth a failure.
        stubborn(258, u32::MAX);
        daemon.update_pod(&pod, memory(256)).await.unwrap();
        assert_eq!(journaled(&daemon), Some(256));
        daemon.update_pod(&pod, memory(400)).await.unwrap();

        // The guest keeps more than it should: that is what the pod has, over a restart too.
        stubborn(350, u32::MAX);
        let kept = daemon.update_pod(&pod, memory(256)).await.unwrap_err();
        assert!(matches!(kept, Error::FailedPrecondition { .. }), "{kept}");
        assert_eq!(journaled(&daemon), Some(350));
        daemon.shutdown().await;
        drop(daemon);
        let daemon = world.daemon().await;
        assert_eq!(journaled(&daemon), Some(350));
        stubborn(0, u32::MAX);
        daemon.update_pod(&pod, memory(256)).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn memory_that_came_with_cpus_that_did_not_goes_back() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let both =
            PodResources { vcpus: Some(200), memory_mib: Some(512), ..PodResources::default() };
        let refused = daemon.update_pod(&pod, both).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert_eq!(*world.inner.vm_memory.lock().unwrap(), 256);
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(256));
        daemon.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn the_pods_cgroup_is_capped_once_the_guest_is_ready_and_the_cap_can_be_changed() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        let cap = |quota| CpuLimits { quota_us: quota, period_us: None, shares: Some(2048) };
        spec.cpu = cap(Some(150_000));
        let pod = daemon.run_pod(spec).await.unwrap();
        let Ok(max) = std::fs::read_to_string(world.cgroup_file(&pod, "cpu.max")) else {
            eprintln!("SKIP: no cpu controller in this host's cgroup v2");
            return daemon.remove_pod(&pod).await.unwrap();
        };
        assert_eq!(max.trim(), "150000 100000");
        for (quota, text) in [(Some(50_000), "50000 100000"), (None, "max 100000")] {
            let change = PodResources { cpu: Some(cap(quota)), ..PodResources::default() };
            daemon.update_pod(&pod, change).await.unwrap();
            let max = std::fs::read_to_string(world.cgroup_file(&pod, "cpu.max")).unwrap();
            assert_eq!(max.trim(), text);
        }
        daemon.remove_pod(&pod).await.unwrap();
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_pod_runs_on_the_hosts_cpus_that_its_containers_have_and_no_guest_is_told_their_numbers() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
        let cpus = || std::fs::read_to_string(world.cgroup_file(&pod, "cpuset.cpus"));
        let mut spec = world.container_spec("app", &["forever"]);
        let mut linux = oci_spec::runtime::Linux::default();
        linux.set_resources(Some(limits(r#"{"cpu":{"cpus":"0","mems":"0","shares":77}}"#)));
        spec.oci.set_linux(Some(linux));
        let id = daemon.create_container(&pod, spec).await.unwrap();
        let told = world.guest(&pod).lock().create.take().unwrap().oci_spec;
        let told: oci_spec::runtime::Spec = serde_json::from_slice(&told).unwrap();
        let told = told.linux().as_ref().unwrap().resources().clone().unwrap();
        assert_eq!(told, limits(r#"{"cpu":{"shares":77}}"#));
        let has = |id: &str| daemon.container(id).unwrap().resources.cpu().clone().unwrap();
        assert_eq!(has(&id).cpus().as_deref(), Some("0"));
        let Ok(pinned) = cpus() else {
            eprintln!("SKIP: no cpuset controller in this host's cgroup v2");
            return daemon.remove_pod(&pod).await.unwrap();
        };
        assert_eq!(pinned.trim(), "0");

        // Beside it, one that may run anywhere: the pod may, until it is gone.
        let other = world.container_spec("other", &["forever"]);
        let other = daemon.create_container(&pod, other).await.unwrap();
        let parent = world.cgroup_file(&pod, "../cpuset.cpus.effective");
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
        assert_eq!(world.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn a_containers_new_limits_bring_cpus_and_memory_and_are_refused_beyond_what_can_be_had() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut spec = world.pod_spec("p");
        spec.vcpus = Some(1);
        spec.memory_mib = Some(256);
        let pod = daemon.run_pod(spec).await.unwrap();
        let mut spec = world.container_spec("app", &["forever"]);
        let mut linux = oci_spec::runtime::Linux::default();
        let small = format!(r#"{{"memory":{{"limit":{}}},"cpu":{{"quota":50000}}}}"#, 64 * MIB);
        linux.set_resources(Some(limits(&small)));
        spec.oci.set_linux(Some(linux));
        let id = daemon.create_container(&pod, spec).await.unwrap();
        daemon.start_container(&id).await.unwrap();

        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 513 * MIB));
        let refused = daemon.update_container(&id, more).await.unwrap_err();
        assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
        assert!(world.guest(&pod).lock().update.is_none(), "the guest was asked all the same");
        let memory = |id: &str| daemon.container(id).unwrap().resources.memory().unwrap().limit();
        assert_eq!(memory(&id), Some(64 * MIB));

        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 200 * MIB));
        daemon.update_container(&id, more).await.unwrap();
        assert_eq!(memory(&id), Some(200 * MIB));
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(256));
        let more = limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, 300 * MIB));
        daemon.update_container(&id, more).await.unwrap();
        assert_eq!(daemon.pod(&pod).unwrap().spec.memory_mib, Some(300));
        assert_eq!(*world.inner.vm_memory.lock().unwrap(), 300);
        daemon.update_container(&id, limits(r#"{"cpu":{"quota":170000}}"#)).await.unwrap();
        let host = std::thread::available_parallelism().unwrap().get().min(2) as u32;
        assert_eq!(world.guest(&pod).lock().cpus, host);
        assert_eq!(daemon.pod(&pod).unwrap().spec.vcpus, Some(host as u8));
        // CPUs stay when a container wants less: another may have been promised them.
        daemon.update_container(&id, limits(r#"{"cpu":{"quota":20000}}"#)).await.unwrap();
        assert_eq!(world.guest(&pod).lock().cpus, host);
        daemon.remove_pod(&pod).await.unwrap();
    });
}
