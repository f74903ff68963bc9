//! Signals to programs that have just been started.
//!
//! Needs root, a static busybox, unshare(1), cgroup v2 in the kernel.

mod common;

use std::time::{Duration, Instant};

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{guest, spec};
use serde_json::json;

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
