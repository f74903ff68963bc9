//! Exec and attach with every protocol.

use std::time::Duration;

use futures_util::SinkExt;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use super::host::BREAKS;
use super::{attach, exec, is_alive, noise, server, wait_for_exit};
use crate::client::{Received, Spdy, Websocket};
use crate::spdy::frame::Frame;

const SPDY: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];
const WEBSOCKET: [&str; 6] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
];

fn has_status(protocol: &str) -> bool {
    protocol.starts_with("v4") || protocol.starts_with("v5")
}

fn assert_exit_code(protocol: &str, received: &Received, error: u32, code: i32) {
    if !has_status(protocol) {
        let message = received.text(error);
        match code {
            0 => assert_eq!(message, ""),
            _ => assert!(message.ends_with(&format!("exit code {code}")), "{protocol}: {message}"),
        }
        return;
    }
    let status = received.status(error);
    if code == 0 {
        assert_eq!(status["status"], "Success", "{protocol}");
    } else {
        assert_eq!(status["reason"], "NonZeroExitCode", "{protocol}");
        let causes = json!([{"reason": "ExitCode", "message": code.to_string()}]);
        assert_eq!(status["details"]["causes"], causes, "{protocol}");
    }
}

#[tokio::test]
async fn every_spdy_protocol_carries_output_and_exit_code() {
    let server = server();
    for protocol in SPDY {
        for code in [0, 7] {
            let url = exec(&server, "oe", &format!("echo out; echo err >&2; exit {code}"));
            let mut client = Spdy::connect(&url, protocol).await;
            let ids = client.open_all(&["error", "stdout", "stderr"]).await;
            let received = client.rest().await;
            assert_eq!(received.text(ids["stdout"]), "out\n", "{protocol}");
            assert_eq!(received.text(ids["stderr"]), "err\n", "{protocol}");
            assert_exit_code(protocol, &received, ids["error"], code);
            // The output ends before the status.
            assert_eq!(received.ended, [ids["stdout"], ids["stderr"], ids["error"]]);
        }
    }
}

#[tokio::test]
async fn every_websocket_protocol_carries_output_and_exit_code() {
    let server = server();
    for protocol in WEBSOCKET {
        for code in [0, 7] {
            let url = exec(&server, "oe", &format!("echo out; echo err >&2; exit {code}"));
            let mut client = Websocket::connect(&url, protocol).await;
            let received = client.rest().await;
            assert_eq!(received.text(1), "out\n", "{protocol}");
            assert_eq!(received.text(2), "err\n", "{protocol}");
            assert_exit_code(protocol, &received, 3, code);
        }
    }
}

#[tokio::test]
async fn large_binary_data_flows_both_ways_over_spdy_until_the_end_of_input() {
    let server = server();
    for protocol in ["v5.channel.k8s.io", "v2.channel.k8s.io"] {
        let mut client = Spdy::connect(&exec(&server, "ioe", "cat; exit 3"), protocol).await;
        let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
        let input = noise(20 << 20);
        let received = client.rest_while_sending(ids["stdin"], input.clone()).await;
        assert!(received.of(ids["stdout"]) == input, "{protocol}: the same bytes come back");
        assert_exit_code(protocol, &received, ids["error"], 3);
    }
}

#[tokio::test]
async fn large_binary_data_flows_both_ways_over_websocket_until_the_end_of_input() {
    let server = server();
    let url = exec(&server, "ioe", "cat; exit 3");
    let client = Websocket::connect(&url, "v5.channel.k8s.io").await;
    let input = noise(20 << 20);
    let received = client.rest_while_sending(input.clone()).await;
    assert!(received.of(1) == input, "the same bytes come back");
    assert_exit_code("v5", &received, 3, 3);
}

#[tokio::test]
async fn base64_input_is_decoded_across_any_message_boundaries() {
    let server = server();
    let url = exec(&server, "io", "head -c 11");
    let mut client = Websocket::connect(&url, "v4.base64.channel.k8s.io").await;
    for message in ["0aGVsbG8=", "0", "0IHdv", "0!!!", "7aGVsbG8=", "0cmxk"] {
        client.0.send(Message::text(message)).await.unwrap();
    }
    assert_eq!(client.rest().await.text(1), "hello world");
}

#[tokio::test]
async fn a_terminal_has_the_first_size_of_the_client_and_follows_changes() {
    let server = server();
    let script = "stty size; while ! stty size | grep -q '22 77'; do sleep 0.05; done; stty size";
    for protocol in ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"] {
        let mut client = Spdy::connect(&exec(&server, "tio", script), protocol).await;
        let ids = client.open_all(&["error", "stdin", "stdout", "resize"]).await;
        client.send(ids["resize"], b"{\"Width\":101,\"Height\":33}\n", false).await;
        let first = client.data_of(ids["stdout"]).await.unwrap();
        assert!(first.starts_with(b"33 101"), "{protocol}: {first:?}");
        client.send(ids["resize"], b"{\"Width\":1,\"Height\":1}{\"Width\":77,", false).await;
        client.send(ids["resize"], b"\"Height\":22}", false).await;
        let received = client.rest().await;
        assert!(received.text(ids["stdout"]).contains("22 77"), "{received:?}");
        assert_exit_code(protocol, &received, ids["error"], 0);
    }
    let mut client = Websocket::connect(&exec(&server, "tio", script), "v4.channel.k8s.io").await;
    client.send(4, b"{\"Width\":101,\"Height\":33}").await;
    client.send(4, b"{\"Width\":77,\"Height\":22}").await;
    let received = client.rest().await;
    assert!(received.text(1).ends_with("22 77\r\n"), "{received:?}");
}

#[tokio::test]
async fn a_terminal_works_without_a_size_from_the_client() {
    let server = server();
    let url = exec(&server, "tio", "test -t 0 && echo terminal");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "resize"]).await;
    assert_eq!(client.rest().await.text(ids["stdout"]), "terminal\r\n");
}

#[tokio::test]
async fn a_command_that_does_not_start_is_an_internal_error() {
    let server = server();
    let missing = || {
        let params = crate::ExecParams {
            container: "host".into(),
            command: vec!["/no/such/command".into()],
            tty: false,
            stdin: false,
            stdout: true,
            stderr: true,
        };
        server.exec_url(params).unwrap()
    };
    let mut client = Spdy::connect(&missing(), "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout", "stderr"]).await;
    let status = client.rest().await.status(ids["error"]);
    assert_eq!(status["reason"], "InternalError");
    assert_eq!(status["code"], 500);
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("error executing command in container: No such file"), "{message}");

    let received = Websocket::connect(&missing(), "channel.k8s.io").await.rest().await;
    assert!(received.text(3).starts_with("Internal error occurred"), "{received:?}");
}

#[tokio::test]
async fn output_that_breaks_off_is_a_failure_whatever_the_exit_code() {
    let server = server();
    let url = exec(&server, "oe", &format!("echo part; exit 0 {BREAKS}"));
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout", "stderr"]).await;
    let received = client.rest().await;
    assert_eq!(received.text(ids["stdout"]), "part\n");
    let status = received.status(ids["error"]);
    assert_eq!(status["reason"], "InternalError");
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("output of the process is lost"), "{message}");
}

#[tokio::test]
async fn a_command_that_reads_no_input_can_exit() {
    let server = server();
    let url = exec(&server, "io", "exec <&-; echo done; exit 4");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout"]).await;
    let received = client.rest_while_sending(ids["stdin"], noise(5 << 20)).await;
    assert_eq!(received.text(ids["stdout"]), "done\n");
    assert_exit_code("v4", &received, ids["error"], 4);
}

#[tokio::test]
async fn a_slow_reader_blocks_its_own_session_only() {
    let server = server();
    let mut slow = Vec::new();
    for _ in 0..4 {
        let url = exec(&server, "oe", "exec cat /dev/zero");
        let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
        client.open_all(&["error", "stdout", "stderr"]).await;
        slow.push(client);
    }
    // Their pipes and sockets are full now.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..10 {
        let url = exec(&server, "oe", "echo quick");
        let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
        let ids = client.open_all(&["error", "stdout", "stderr"]).await;
        let received = tokio::time::timeout(Duration::from_secs(5), client.rest()).await.unwrap();
        assert_eq!(received.text(ids["stdout"]), "quick\n");
    }
}

async fn read_pid(client: &mut Spdy, stdout: u32) -> u32 {
    let line = client.data_of(stdout).await.unwrap();
    String::from_utf8(line.to_vec()).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_disconnect_of_the_client_ends_its_command() {
    let server = server();
    let url = exec(&server, "ioe", "echo $$; exec sleep 1000");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    let pid = read_pid(&mut client, ids["stdout"]).await;
    assert!(is_alive(pid));
    drop(client);
    wait_for_exit(pid).await;

    let url = exec(&server, "ioe", "echo $$; exec sleep 1000");
    let mut client = Websocket::connect(&url, "v5.channel.k8s.io").await;
    let pid = loop {
        match client.next().await.unwrap() {
            Message::Binary(bytes) if bytes.len() > 1 => {
                break std::str::from_utf8(&bytes[1..]).unwrap().trim().parse().unwrap();
            }
            _ => {}
        }
    };
    assert!(is_alive(pid));
    client.0.close(None).await.unwrap();
    wait_for_exit(pid).await;
}

#[tokio::test]
async fn a_disconnect_is_noticed_while_input_is_blocked() {
    let server = server();
    let url = exec(&server, "ioe", "echo $$; exec sleep 1000");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    let pid = read_pid(&mut client, ids["stdout"]).await;
    // Until all buffers are full.
    let flood = async {
        loop {
            client.send(ids["stdin"], &[0; 8 << 10], false).await;
        }
    };
    tokio::time::timeout(Duration::from_millis(500), flood).await.unwrap_err();
    assert!(is_alive(pid));
    drop(client);
    wait_for_exit(pid).await;
}

#[tokio::test]
async fn attach_ends_with_its_process_and_closes_or_keeps_its_stdin() {
    let server = server();
    // The exit code of an attached process is not reported.
    let url = attach(&server, "ioe", "cat; echo over; exit 9");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    client.send(ids["stdin"], b"hello\n", true).await;
    let received = client.rest().await;
    assert_eq!(received.text(ids["stdout"]), "hello\nover\n");
    assert_eq!(received.status(ids["error"])["status"], "Success");

    // With stdin that stays open, the end of input ends the session.
    let url = attach(&server, "ioe", "cat; echo over&");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    client.send(ids["stdin"], b"hello\n", false).await;
    assert_eq!(client.data_of(ids["stdout"]).await.unwrap(), "hello\n");
    client.send(ids["stdin"], b"", true).await;
    let received = client.rest().await;
    assert_eq!(received.status(ids["error"])["status"], "Success");

    // Without output the session lasts as long as the process.
    let url = attach(&server, "i", "read line; exec >&- 2>&-; sleep 0.2");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin"]).await;
    client.send(ids["stdin"], b"line\n", false).await;
    assert_eq!(client.rest().await.status(ids["error"])["status"], "Success");
}

#[tokio::test]
async fn pings_are_answered_on_both_transports() {
    let server = server();
    let mut client = Spdy::connect(&exec(&server, "io", "cat"), "v4.channel.k8s.io").await;
    client.control(crate::spdy::frame::kind::PING, &[0, 0, 0, 2]).await;
    client.control(crate::spdy::frame::kind::PING, &[0, 0, 0, 41]).await;
    assert_eq!(client.next().await, Some(Frame::Ping { id: 41 }));

    let url = exec(&server, "io", "cat");
    let mut client = Websocket::connect(&url, "v5.channel.k8s.io").await;
    client.0.send(Message::Ping("beat".into())).await.unwrap();
    loop {
        match client.next().await.unwrap() {
            Message::Pong(payload) => break assert_eq!(payload, "beat"),
            Message::Binary(empty) => assert_eq!(empty.len(), 1),
            other => panic!("{other:?}"),
        }
    }
}
