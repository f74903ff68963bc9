//! Signals to programs that have just been started.
//!
//! Needs root, a static busybox, unshare(1), cgroup v2 in the kernel.

mod common;

use std::time::{Duration, Instant};

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{guest, spec};
use serde_json::json;

#[tokio::test]
async fn a_frozen_container_does_not_run_until_it_is_thawed_and_can_be_killed() {
    let Some(mut guest) = guest().await else { return };
    let script = "while :; do echo tick; sleep 0.05; done";
    let request = guest.request("f", &spec(script, json!({})));
    guest.create(request).await;
    let freeze = |frozen| v1::FreezeContainerRequest { container_id: "f".into(), frozen };
    let refused = guest.client.freeze_container(freeze(true)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "it is not started");
    let mut stdout = guest.open(Kind::Stdout, "f", "", 0).await;
    guest.start("f").await.unwrap();
    stdout.read_until("tick\n").await;

    guest.client.freeze_container(freeze(true)).await.unwrap();
    // Output of before the freeze may still arrive.
    let silent = async {
        loop {
            let next = tokio::time::timeout(Duration::from_millis(500), stdout.read()).await;
            if next.is_err() {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), silent).await.expect("a frozen container runs");
    let refused = guest.exec("f", "e", json!({"args": ["true"]})).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    guest.client.freeze_container(freeze(false)).await.unwrap();
    stdout.read_until("tick\n").await;

    guest.client.freeze_container(freeze(true)).await.unwrap();
    let kill =
        v1::SignalProcessRequest { container_id: "f".into(), signal: 9, ..Default::default() };
    guest.client.signal_process(kill).await.unwrap();
    guest.exit("f", "").await;
    guest.remove("f").await.unwrap();
}

/// SIGKILL comes while the agent waits until the container is frozen, which takes some time with many
/// busy processes. It thaws the container, which will never be frozen then.
#[tokio::test]
async fn a_freeze_ends_when_its_container_ends() {
    let Some(mut guest) = guest().await else { return };
    let script = "for n in $(seq 40); do (while :; do :; done) & done; echo up; wait";
    for id in ["a", "b", "c"] {
        let request = guest.request(id, &spec(script, json!({})));
        guest.create(request).await;
        let mut stdout = guest.open(Kind::Stdout, id, "", 0).await;
        guest.start(id).await.unwrap();
        stdout.read_until("up\n").await;
        let mut client = guest.client.clone();
        let freeze = v1::FreezeContainerRequest { container_id: id.into(), frozen: true };
        let freezing = tokio::spawn(async move { client.freeze_container(freeze).await });
        tokio::time::sleep(Duration::from_millis(10)).await;
        let kill =
            v1::SignalProcessRequest { container_id: id.into(), signal: 9, ..Default::default() };
        guest.client.signal_process(kill).await.unwrap();
        let frozen = freezing.await.unwrap();
        // It was frozen before the signal came, or never. The deadline is not reached.
        if let Err(refused) = frozen {
            assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        }
        guest.exit(id, "").await;
        guest.remove(id).await.unwrap();
    }
}

/// A helper that was frozen after it joined the cgroup would not answer before the thaw.
#[tokio::test]
async fn an_exec_beside_a_freeze_starts_or_is_refused_at_once() {
    let Some(mut guest) = guest().await else { return };
    let request = guest.request("f", &spec("exec sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("f").await.unwrap();
    let freeze = |frozen| v1::FreezeContainerRequest { container_id: "f".into(), frozen };
    for round in 0..20 {
        let mut other = guest.client.clone();
        let pause = async {
            // At different points of the exec's start.
            tokio::time::sleep(Duration::from_millis(3 * round)).await;
            other.freeze_container(freeze(true)).await.unwrap();
        };
        let name = format!("e{round}");
        let exec = guest.exec("f", &name, json!({"args": ["true"]}));
        let both = async { tokio::join!(exec, pause) };
        let (started, ()) = tokio::time::timeout(Duration::from_secs(10), both)
            .await
            .unwrap_or_else(|_| panic!("round {round}: no answer"));
        if let Err(refused) = &started {
            assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
            assert!(refused.message().contains("paused"), "{refused}");
        }
        guest.client.freeze_container(freeze(false)).await.unwrap();
        if started.is_ok() {
            assert_eq!(guest.exit("f", &name).await.code, 0);
        }
    }
    // Nothing runs that was refused.
    let list = guest.client.list_processes(v1::ListProcessesRequest {}).await.unwrap();
    let running = |process: &&v1::Process| process.state == v1::ProcessState::Running as i32;
    assert_eq!(list.into_inner().processes.iter().filter(running).count(), 1);
}

/// The program counts SIGTERMs and sets its handler after a delay.
#[tokio::test]
async fn a_program_that_sets_its_handler_late_gets_one_signal() {
    let Some(mut guest) = guest().await else { return };
    let script = "sleep 0.7; trap 'echo term' TERM; echo up; \
                  while :; do sleep 0.1; done";
    let request = guest.request("c", &spec(script, json!({})));
    guest.create(request).await;
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    guest.start("c").await.unwrap();
    let mut request = v1::SignalProcessRequest {
        container_id: "c".into(),
        signal: 15,
        await_handler: true,
        ..Default::default()
    };
    guest.client.signal_process(request.clone()).await.unwrap();
    assert_eq!(stdout.read_until("term\n").await.matches("term").count(), 1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    (request.signal, request.await_handler) = (9, false);
    guest.client.signal_process(request).await.unwrap();
    assert_eq!(stdout.read_all().await, b"", "a second signal");

    // Without a handler the wait ends after a few seconds.
    let request =
        guest.request("d", &spec("sleep 1000", json!({"process": {"args": ["sleep", "1000"]}})));
    guest.create(request).await;
    guest.start("d").await.unwrap();
    let start = Instant::now();
    let request = v1::SignalProcessRequest {
        container_id: "d".into(),
        signal: 15,
        await_handler: true,
        ..Default::default()
    };
    guest.client.signal_process(request).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    guest.remove("c").await.unwrap();
    guest.remove("d").await.unwrap();
}
