use proptest::prelude::*;

use super::*;
use crate::model::{Identity, Meta, PidMode, RootfsSpec};

pub(crate) fn pod() -> Pod {
    let spec = PodSpec {
        meta: Meta { name: "p".into(), ..Meta::default() },
        hostname: "p".into(),
        handler: String::new(),
        cgroup_parent: String::new(),
        log_directory: String::new(),
        sysctls: Default::default(),
        dns: Default::default(),
        ports: Vec::new(),
        vcpus: None,
        memory_mib: None,
        cpu: Default::default(),
        host: None,
        origin: serde_json::Value::Null,
    };
    Pod {
        id: "pod".into(),
        spec: Arc::new(spec),
        created_at: SystemTime::UNIX_EPOCH,
        phase: Phase::Starting,
        reason: String::new(),
        uid: 7,
        netns: PathBuf::new(),
        ledger: Vec::new(),
        attachment: Arc::default(),
        kernel_release: String::new(),
        trace: Vec::new(),
        empty_dirs: EmptyDirs::default(),
        containers: BTreeMap::new(),
        unreadable: false,
    }
}

pub(crate) fn container(id: &str) -> Container {
    let spec = ContainerSpec {
        meta: Meta::default(),
        rootfs: RootfsSpec { image: PathBuf::from("/i"), read_only: false, volumes: vec![] },
        oci: oci_spec::runtime::Spec::default(),
        user: String::new(),
        pid: PidMode::Container,
        stdin: false,
        stdin_once: false,
        tty: false,
        log_path: String::new(),
        volumes: Vec::new(),
        devices: Vec::new(),
        strict_groups: false,
        image_name: String::new(),
        image_id: String::new(),
        stop_signal: 15,
        strict_volumes: Vec::new(),
        origin: serde_json::Value::Null,
    };
    Container {
        id: id.into(),
        spec: Arc::new(spec),
        phase: ContainerPhase::Creating,
        created_at: SystemTime::UNIX_EPOCH,
        started_at: None,
        exit: None,
        drained: false,
        oom: false,
        log_path: PathBuf::new(),
        user: None,
        shares: Vec::new(),
        resources: LinuxResources::default(),
    }
}

fn exit(code: i32) -> ExitView {
    ExitView {
        code,
        oom_killed: false,
        at: SystemTime::UNIX_EPOCH,
        reason: "Error".into(),
        message: String::new(),
    }
}

fn ready() -> Change {
    Change::Ready { attachment: Arc::default(), kernel_release: String::new(), trace: Vec::new() }
}

const AT: SystemTime = SystemTime::UNIX_EPOCH;

fn died() -> Change {
    Change::VmDied { reason: "panic".into(), at: AT }
}

fn out_of_memory() -> Change {
    Change::OutOfMemory { reason: "limit".into(), at: AT }
}

fn run(changes: Vec<Change>) -> Pod {
    let mut pod = pod();
    for change in changes {
        pod.apply(change).unwrap();
    }
    pod
}

#[test]
fn phase_transitions_match_the_diagram() {
    use Phase::*;
    let table: [(Phase, Change, Result<Phase, ()>); 14] = [
        (Starting, ready(), Ok(Ready)),
        (Ready, ready(), Err(())),
        (Removing, ready(), Err(())),
        (Starting, Change::Stopping, Err(())),
        (Ready, Change::Stopping, Ok(Stopping)),
        (NotReady, Change::Stopping, Ok(Stopping)),
        (Stopping, Change::Stopped { at: AT }, Ok(NotReady)),
        (Ready, Change::Stopped { at: AT }, Err(())),
        (Ready, died(), Ok(NotReady)),
        (Stopping, died(), Ok(Stopping)),
        (Starting, died(), Ok(Starting)),
        (Ready, out_of_memory(), Ok(NotReady)),
        (Stopping, out_of_memory(), Ok(Stopping)),
        (NotReady, Change::Removing, Ok(Removing)),
    ];
    for (from, change, to) in table {
        let mut pod = Pod { phase: from, ..pod() };
        let text = format!("{from:?} {change:?}");
        let result = pod.apply(change).map(|()| pod.phase).map_err(|_| ());
        assert_eq!(result, to, "{text}");
    }
}

#[test]
fn an_exit_reported_before_the_start_is_kept() {
    let id = || "c".to_owned();
    let pod = run(vec![
        ready(),
        Change::ContainerPlanned(Box::new(container("c"))),
        Change::ContainerCreated { id: id(), user: Identity::default() },
        Change::ContainerEnded { id: id(), exit: exit(4) },
        Change::ContainerStarted { id: id(), at: AT },
        Change::LogsDrained { id: id() },
    ]);
    let view = pod.containers["c"].view(&pod.id);
    assert_eq!(view.state, ContainerState::Exited);
    assert_eq!(view.exit.unwrap().code, 4);
}

#[test]
fn an_exit_is_shown_when_the_log_is_complete() {
    let id = || "c".to_owned();
    let mut pod = run(vec![
        ready(),
        Change::ContainerPlanned(Box::new(container("c"))),
        Change::ContainerCreated { id: id(), user: Identity::default() },
        Change::ContainerStarted { id: id(), at: AT },
        Change::ContainerEnded { id: id(), exit: exit(0) },
    ]);
    let view = pod.containers["c"].view(&pod.id);
    assert_eq!((view.state, view.exit), (ContainerState::Running, None));
    pod.apply(Change::LogsDrained { id: id() }).unwrap();
    assert_eq!(pod.containers["c"].state(), ContainerState::Exited);
}

#[test]
fn an_oom_event_marks_the_following_kill_and_no_other_exit() {
    for (code, reason) in [(137, "OOMKilled"), (1, "Error")] {
        let id = || "c".to_owned();
        let pod = run(vec![
            ready(),
            Change::ContainerPlanned(Box::new(container("c"))),
            Change::ContainerOom { id: id() },
            Change::ContainerEnded { id: id(), exit: exit(code) },
        ]);
        assert_eq!(pod.containers["c"].exit.as_ref().unwrap().reason, reason);
    }
}

#[test]
fn containers_of_a_vm_that_the_oom_killer_ended_are_killed_by_it_too() {
    let planned = |id: &str| Change::ContainerPlanned(Box::new(container(id)));
    let mut pod = run(vec![ready(), planned("a"), planned("b")]);
    pod.apply(Change::ContainerEnded { id: "b".into(), exit: exit(3) }).unwrap();
    pod.apply(out_of_memory()).unwrap();
    assert_eq!(pod.reason, "limit");
    let exit = pod.containers["a"].exit.clone().unwrap();
    assert_eq!((exit.code, exit.oom_killed, exit.reason.as_str()), (137, true, "OOMKilled"));
    assert_eq!(exit.message, "limit");
    assert_eq!(pod.containers["b"].exit.as_ref().unwrap().code, 3, "it had ended before");
}

#[test]
fn effects_are_undone_in_reverse_order_and_files_remain_after_the_vm() {
    let state = Effect::StateDir { path: "/s".into() };
    let mut pod = run(vec![
        Change::Planned(vec![state.clone(), Effect::Network]),
        Change::Planned(vec![Effect::Network]),
        Change::VmmStarted { pid: 1, started: 2 },
        ready(),
        Change::ContainerPlanned(Box::new(container("c"))),
    ]);
    let vmm = Effect::Vmm { pid: 1, started: 2 };
    assert_eq!(pod.to_undo(false), [vmm.clone(), Effect::Network, state]);
    assert_eq!(pod.to_undo(true).len(), 4);
    pod.apply(Change::Undone(vmm)).unwrap();
    assert_eq!(pod.vmm(), None);
    pod.apply(Change::ContainerRemoved { id: "c".into() }).unwrap();
    assert_eq!(pod.to_undo(true).len(), 2);
}

fn any_change() -> impl Strategy<Value = Change> {
    let id = || "c".to_owned();
    prop_oneof![
        Just(ready()),
        Just(Change::Stopping),
        Just(Change::Stopped { at: AT }),
        Just(Change::Removing),
        Just(died()),
        Just(out_of_memory()),
        Just(Change::Planned(vec![Effect::Network])),
        Just(Change::Undone(Effect::Network)),
        Just(Change::VmmStarted { pid: 1, started: 2 }),
        Just(Change::ContainerPlanned(Box::new(container("c")))),
        Just(Change::ContainerCreated { id: id(), user: Identity::default() }),
        Just(Change::ContainerStarted { id: id(), at: AT }),
        (0..3i32).prop_map(move |code| Change::ContainerEnded { id: id(), exit: exit(code) }),
        Just(Change::LogsDrained { id: id() }),
        Just(Change::ContainerRemoving { id: id() }),
        Just(Change::ContainerRemoved { id: id() }),
    ]
}

proptest! {
    #[test]
    fn invariants_hold_for_any_sequence_of_changes(
        changes in proptest::collection::vec(any_change(), 0..40)
    ) {
        let mut pod = pod();
        for change in changes {
            let before = pod.clone();
            if pod.apply(change).is_err() {
                // A refused change has no effect.
                prop_assert_eq!(before.phase, pod.phase);
                prop_assert_eq!(before.containers.len(), pod.containers.len());
                prop_assert_eq!(&before.ledger, &pod.ledger);
            }
            // Removing is final.
            prop_assert!(before.phase != Phase::Removing || pod.phase == Phase::Removing);
            for (id, container) in &pod.containers {
                // The first exit is kept.
                if let Some(old) = before.containers.get(id).and_then(|c| c.exit.as_ref())
                    && before.containers[id].phase != ContainerPhase::Removing
                    && container.phase != ContainerPhase::Creating
                {
                    prop_assert_eq!(Some(old), container.exit.as_ref());
                }
                // The ledger has the files of every container.
                let files = Effect::ContainerFiles { container: id.clone() };
                prop_assert!(pod.ledger.contains(&files));
                // No container runs in a stopped pod.
                if pod.phase == Phase::NotReady && before.phase != Phase::NotReady {
                    prop_assert!(!container.is_running());
                }
            }
        }
    }
}
