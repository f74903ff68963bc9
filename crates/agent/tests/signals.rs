//! Signals to programs that have just started.
//!
//! Assumes: root, a static busybox, unshare(1), cgroup v2 in the kernel.

mod common;

use std::time::{Duration, Instant};

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{guest, spec};
use serde_json::json;

/// A program that counts its SIGTERMs is stopped while it still starts.
#[tokio::test]
async fn a_program_that_sets_up_its_handler_late_gets_one_signal() {
    let Some(mut guest) = guest().await else { return };
    let script = "sleep 0.7; trap 'echo term' TERM; echo up; \
                  while :; do sleep 0.1; done";
    let request = guest.request("c", &spec(script, json!({})));
    guest.create(request).await;
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    guest.start("c").await.unwrap();
    let mut ask = v1::SignalProcessRequest {
        container_id: "c".into(),
        signal: 15,
        await_handler: true,
        ..Default::default()
    };
    guest.client.signal_process(ask.clone()).await.unwrap();
    assert_eq!(stdout.read_until("term\n").await.matches("term").count(), 1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    (ask.signal, ask.await_handler) = (9, false);
    guest.client.signal_process(ask).await.unwrap();
    assert_eq!(stdout.read_all().await, b"", "a second signal");

    // A program that never sets it up is waited for a few seconds, and no longer.
    let request =
        guest.request("d", &spec("sleep 1000", json!({"process": {"args": ["sleep", "1000"]}})));
    guest.create(request).await;
    guest.start("d").await.unwrap();
    let start = Instant::now();
    let ask = v1::SignalProcessRequest {
        container_id: "d".into(),
        signal: 15,
        await_handler: true,
        ..Default::default()
    };
    guest.client.signal_process(ask).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    guest.remove("c").await.unwrap();
    guest.remove("d").await.unwrap();
}
