//! The server over loopback TCP, against real processes and real terminals, with clients that
//! speak the protocols by themselves. They need `sh`, `setsid` and `stty`, no rights and no KVM.

mod client;
mod command;
mod forward;
mod host;
mod http;
mod limits;

use std::sync::Arc;
use std::time::Duration;

use crate::{AttachParams, Config, ExecParams, PortForwardParams, Server};
use host::Host;

/// A test that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(60);

fn server() -> Server {
    server_with(Config::default())
}

fn server_with(config: Config) -> Server {
    Server::bind(config, Arc::new(Host)).unwrap()
}

/// Letters of `streams`: i, o, e for stdin, stdout and stderr, t for a terminal.
fn exec(server: &Server, streams: &str, script: &str) -> String {
    let params = ExecParams {
        container: "host".into(),
        command: ["sh", "-c", script].map(str::to_owned).into(),
        tty: streams.contains('t'),
        stdin: streams.contains('i'),
        stdout: streams.contains('o'),
        stderr: streams.contains('e'),
    };
    server.exec_url(params).unwrap()
}

fn attach(server: &Server, streams: &str, script: &str) -> String {
    let params = AttachParams {
        container: script.into(),
        tty: streams.contains('t'),
        stdin: streams.contains('i'),
        stdout: streams.contains('o'),
        stderr: streams.contains('e'),
    };
    server.attach_url(params).unwrap()
}

fn port_forward(server: &Server, ports: &[u16]) -> String {
    server.port_forward_url(PortForwardParams { pod: "pod".into(), ports: ports.into() }).unwrap()
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("done within the deadline")
}

/// Bytes that do not repeat in a way that hides a lost or doubled chunk.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Whether a process is there and not a zombie.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

async fn dies(pid: u32) {
    within(async {
        while lives(pid) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
