//! Tests of the server over loopback TCP with real processes and terminals. Need `sh`, `setsid` and
//! `stty`; no privileges, no KVM.

mod command;
mod forward;
mod host;
mod http;
mod limits;

use std::sync::Arc;
use std::time::Duration;

use crate::client::{noise, within};
use crate::{AttachParams, Config, ExecParams, PortForwardParams, Server};
use host::Host;

fn server() -> Server {
    server_with(Config::default())
}

fn server_with(config: Config) -> Server {
    Server::bind(config, Arc::new(Host)).unwrap()
}

/// Letters of `streams`: i, o, e for stdin, stdout, stderr; t for a terminal.
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

/// Whether a process exists and is not a zombie.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

async fn wait_for_exit(pid: u32) {
    within(async {
        while is_alive(pid) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
