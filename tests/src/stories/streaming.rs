//! Exec, attach and port-forward through their URLs, over WebSocket and SPDY.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use streaming::client::{Received, Spdy, Websocket, fetch, noise, spdy_upgrade};
use tokio_tungstenite::tungstenite::Message;

use super::Story;
use crate::client::{Cri, container};
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("exec over WebSocket and SPDY returns both streams and the exit code", exec_result),
    ("exec transfers eight MiB both ways and closes its input", exec_large),
    ("a terminal has its client's size and follows changes", terminal),
    ("concurrent sessions each get their own output", many),
    ("attach connects to a container's streams, also after an earlier client", attach),
    ("port-forward reaches 127.0.0.1 and ::1 in the pod, and reports closed ports", forward),
];

const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
const WIRES: [Wire; 3] = [Wire::Websocket(V5), Wire::Spdy(V5), Wire::Spdy(V4)];

/// A client's protocol and subprotocol.
#[derive(Debug, Clone, Copy)]
enum Wire {
    Websocket(&'static str),
    Spdy(&'static str),
}

/// The result of a session.
#[derive(Debug)]
struct SessionResult {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: Value,
}

impl SessionResult {
    fn of(received: &Received, [stdout, stderr, error]: [u32; 3]) -> Self {
        let [stdout, stderr] = [stdout, stderr].map(|id| received.of(id).to_vec());
        Self { stdout, stderr, status: received.status(error) }
    }

    fn is_success(&self) -> bool {
        self.status["status"] == "Success"
    }

    /// Exit code of a failed session.
    fn code(&self) -> &str {
        self.status["details"]["causes"][0]["message"].as_str().unwrap_or("no code")
    }
}

impl Wire {
    /// Sends the input, if any, and reads until the end of the session.
    async fn run(self, url: &str, input: Option<Vec<u8>>) -> SessionResult {
        match self {
            Self::Websocket(version) => {
                let mut client = Websocket::connect(url, version).await;
                let received = match input {
                    Some(input) => client.rest_while_sending(input).await,
                    None => client.rest().await,
                };
                SessionResult::of(&received, [1, 2, 3])
            }
            Self::Spdy(version) => {
                let mut client = Spdy::connect(url, version).await;
                let mut ids = client.open_all(&["error"]).await;
                if input.is_some() {
                    ids.extend(client.open_all(&["stdin"]).await);
                }
                ids.extend(client.open_all(&["stdout", "stderr"]).await);
                let received = match input {
                    Some(input) => client.rest_while_sending(ids["stdin"], input).await,
                    None => client.rest().await,
                };
                SessionResult::of(&received, ["stdout", "stderr", "error"].map(|kind| ids[kind]))
            }
        }
    }
}

fn with_sleeper(story: impl FnOnce(&Cri, &str) -> Result<()>) -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("streams")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    story(node.cri(), &id)?;
    node.finish()
}

fn exec_result() -> Result<()> {
    with_sleeper(|cri, id| {
        for wire in WIRES {
            let url = cri.exec_url(id, "oe", &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
            let result = cri.block_on(wire.run(&url, None));
            ensure!(result.stdout == b"out\n" && result.stderr == b"err\n", "{wire:?}: {result:?}");
            ensure!(!result.is_success() && result.code() == "7", "{wire:?}: {result:?}");
            let (used, words) =
                cri.block_on(async { fetch(&url, "POST", &spdy_upgrade(V4)).await });
            ensure!(used.status == 404, "{wire:?}: a URL was accepted twice: {used:?} {words}");
            let url = cri.exec_url(id, "oe", &["true"])?;
            let result = cri.block_on(wire.run(&url, None));
            ensure!(result.is_success(), "{wire:?}: {result:?}");
            let url = cri.exec_url(id, "oe", &["no-such-command"])?;
            let result = cri.block_on(wire.run(&url, None));
            let words = result.status["message"].as_str().unwrap_or_default();
            ensure!(words.contains("no-such-command"), "{wire:?}: {result:?}");
        }
        Ok(())
    })
}

fn exec_large() -> Result<()> {
    with_sleeper(|cri, id| {
        let input = noise(8 << 20);
        for wire in WIRES {
            let url = cri.exec_url(id, "ioe", &["sh", "-c", "cat; echo closed >&2; exit 3"])?;
            let result = cri.block_on(wire.run(&url, Some(input.clone())));
            let length = result.stdout.len();
            ensure!(result.stdout == input, "{wire:?}: {length} bytes came back, not the same");
            ensure!(result.stderr == b"closed\n" && result.code() == "3", "{wire:?}");
        }
        Ok(())
    })
}

fn terminal() -> Result<()> {
    let script = "test -t 0 && stty size
        while ! stty size | grep -q '22 77'; do sleep 0.1; done
        stty size; read line; echo output $line";
    with_sleeper(|cri, id| {
        let url = cri.exec_url(id, "iot", &["sh", "-c", script])?;
        let screen = cri.block_on(async {
            let mut client = Websocket::connect(&url, V5).await;
            client.send(4, br#"{"Width":101,"Height":33}"#).await;
            client.send(4, br#"{"Width":77,"Height":22}"#).await;
            client.send(0, b"hello\n").await;
            client.rest().await.text(1).to_owned()
        });
        ensure!(screen.contains("22 77\r\n") && screen.contains("output hello\r\n"), "{screen:?}");
        let url = cri.exec_url(id, "iot", &["sh", "-c", script])?;
        let (first, rest) = cri.block_on(async {
            let mut client = Spdy::connect(&url, V4).await;
            let ids = client.open_all(&["error", "stdin", "stdout", "resize"]).await;
            client.send(ids["resize"], br#"{"Width":101,"Height":33}"#, false).await;
            let first = client.data_of(ids["stdout"]).await.unwrap_or_default();
            client.send(ids["resize"], br#"{"Width":77,"Height":22}"#, false).await;
            client.send(ids["stdin"], b"hello\n", false).await;
            (first, client.rest().await.text(ids["stdout"]).to_owned())
        });
        ensure!(first.starts_with(b"33 101"), "{first:?}");
        ensure!(rest.contains("22 77\r\n") && rest.contains("output hello\r\n"), "{rest:?}");
        Ok(())
    })
}

fn many() -> Result<()> {
    with_sleeper(|cri, id| {
        let line = |n: usize| format!("seq 1 {}; echo end {n}", 1000 + n);
        let urls = (0..24).map(|n| cri.exec_url(id, "oe", &["sh", "-c", &line(n)]));
        let urls = urls.collect::<Result<Vec<_>, _>>()?;
        let result = cri.block_on(async {
            let sessions: Vec<_> = urls
                .into_iter()
                .zip(WIRES.into_iter().cycle())
                .map(|(url, wire)| tokio::spawn(async move { wire.run(&url, None).await }))
                .collect();
            let mut result = Vec::new();
            for session in sessions {
                result.push(session.await);
            }
            result
        });
        for (n, result) in result.into_iter().enumerate() {
            let result = result?;
            let text = String::from_utf8(result.stdout)?;
            ensure!(text.ends_with(&format!("\nend {n}\n")), "session {n}: {text}");
            ensure!(text.lines().count() == 1001 + n, "session {n} lost lines");
        }
        Ok(())
    })
}

/// Reads a stream until it contains `words`; false at its end.
async fn reads_until(client: &mut Spdy, stream: u32, words: &str) -> bool {
    let mut output = String::new();
    while !output.contains(words) {
        let Some(bytes) = client.data_of(stream).await else { return false };
        output.push_str(&String::from_utf8_lossy(&bytes));
    }
    true
}

fn attach() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("attach")?;
    let cri = node.cri();
    let script = "while read line; do echo got $line; done; echo end >&2; exit 6";
    let mut config = container("once", &image, &["sh", "-c", script]);
    (config.stdin, config.stdin_once) = (true, true);
    let once = cri.run(&pod, config)?;
    let url = cri.attach_url(&once, "ioe")?;
    let (output, result) = cri.block_on(async {
        let mut client = Spdy::connect(&url, V4).await;
        let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
        client.send(ids["stdin"], b"one\n", false).await;
        let output = reads_until(&mut client, ids["stdout"], "got one\n").await;
        client.send(ids["stdin"], b"two\n", true).await;
        let received = client.rest().await;
        (output, SessionResult::of(&received, ["stdout", "stderr", "error"].map(|kind| ids[kind])))
    });
    ensure!(output, "no output for the first line");
    ensure!(result.stdout == b"got two\n" && result.stderr == b"end\n", "{result:?}");
    ensure!(cri.exited(&once)?.exit_code == 6, "{:?}", cri.status(&once)?);
    let log: Vec<String> = cri.log(&once)?.into_iter().map(|line| line.text).collect();
    ensure!(log.contains(&"got one".to_owned()) && log.contains(&"end".to_owned()), "{log:?}");
    let status = cri.attach_url(&once, "oe").unwrap_err();
    ensure!(status.message().contains("not running"), "{status}");

    let mut config = container("often", &image, &["cat"]);
    config.stdin = true;
    let often = cri.run(&pod, config)?;
    for line in ["hello", "again"] {
        let url = cri.attach_url(&often, "ioe")?;
        cri.block_on(async {
            let mut client = Websocket::connect(&url, V5).await;
            client.send(0, format!("{line}\n").as_bytes()).await;
            loop {
                match client.next().await {
                    Some(Message::Binary(bytes)) if bytes.ends_with(b"\n") => break Ok(()),
                    Some(_) => {}
                    None => break Err(anyhow::anyhow!("no output for {line}")),
                }
            }
        })?;
    }
    ensure!(cri.exec(&often, &["true"])?.code == 0, "the container exited with its last client");
    node.finish()
}

/// An echo server: sends a greeting, reads until EOF, and sends the data back.
const ECHO: &str = "\
import socket, threading
def serve(listener, greeting):
    def one(connection):
        connection.sendall(greeting)
        data = b''
        while part := connection.recv(65536):
            data += part
        connection.sendall(data)
        connection.close()
    while True:
        threading.Thread(target=one, args=(listener.accept()[0],)).start()
listeners = []
for family, host, port in (socket.AF_INET, '127.0.0.1', 7001), (socket.AF_INET6, '::1', 7002):
    listener = socket.socket(family)
    listener.bind((host, port))
    listener.listen(64)
    listeners.append((listener, host.encode() + b' '))
print('listening', flush=True)
for arguments in listeners:
    threading.Thread(target=serve, args=arguments).start()
";

fn forward() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("forward")?;
    let cri = node.cri();
    let id = cri.run(&pod, container("echo", &image, &["python3", "-c", ECHO]))?;
    cri.logged(&id, "listening")?;
    let url = cri.forward_url(&pod, &[])?;
    cri.block_on(async { forwarded(Spdy::connect(&url, "portforward.k8s.io").await).await })?;
    let url = cri.forward_url(&pod, &[])?;
    let tunnel = "SPDY/3.1+portforward.k8s.io";
    cri.block_on(async { forwarded(Spdy::through_websocket(&url, tunnel).await).await })?;
    let url = cri.forward_url(&pod, &[7001])?;
    let output = cri.block_on(async {
        let mut client = Websocket::connect(&url, V4).await;
        let mut output = Vec::new();
        while let Some(Message::Binary(bytes)) = client.next().await {
            if bytes.first() == Some(&0) {
                output.extend_from_slice(&bytes[1..]);
            }
            if output.len() >= 12 {
                break;
            }
        }
        output
    });
    let greeting = [&7001u16.to_le_bytes()[..], b"127.0.0.1 "].concat();
    ensure!(output == greeting, "the old WebSocket form: {output:?}");
    node.finish()
}

/// Many port-forward connections over one session, one with much data, one to a closed port.
async fn forwarded(mut client: Spdy) -> Result<()> {
    let ports = [7001u16; 10].into_iter().chain([7002, 7003]);
    let mut pairs = Vec::new();
    for (request, port) in (0u32..).zip(ports) {
        pairs.push(client.open_pair(port, request).await);
    }
    let payload = |n: usize| noise(if n == 0 { 1 << 20 } else { 1000 * n });
    for (n, pair) in pairs.iter().enumerate() {
        for part in payload(n).chunks(32 << 10) {
            client.send(pair.data, part, false).await;
        }
        client.send(pair.data, b"", true).await;
    }
    let received =
        tokio::time::timeout(Duration::from_secs(60), client.until_ended(&pairs)).await?;
    let closed = pairs.pop().map_or(0, |pair| pair.error);
    let words = received.text(closed);
    ensure!(words.contains("7003"), "a closed port: {words:?}");
    for (n, pair) in pairs.iter().enumerate() {
        let host: &[u8] = if n == 10 { b"::1 " } else { b"127.0.0.1 " };
        ensure!(received.of(pair.data) == [host, &payload(n)].concat(), "connection {n}");
        ensure!(
            received.of(pair.error).is_empty(),
            "connection {n}: {}",
            received.text(pair.error)
        );
    }
    Ok(())
}
