//! The programs without pods: exit codes, output to a closed pipe, the start of the daemon.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NACELLE: &str = env!("CARGO_BIN_EXE_nacelle");
const NACELLED: &str = env!("CARGO_BIN_EXE_nacelled");

/// Runs with a standard output whose reader has closed it.
fn with_closed_stdout(program: &str, words: &[&str]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_failure() {
    for (program, words) in [
        (NACELLED, &["config", "default"][..]),
        (NACELLED, &["config", "cni"]),
        (NACELLED, &["--help"]),
        (NACELLE, &["completions", "bash"]),
        (NACELLE, &["--help"]),
    ] {
        let output = with_closed_stdout(program, words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{words:?}: {}: {said}", output.status);
    }
}

#[test]
fn exit_codes_without_a_daemon_are_dockers() {
    for (code, words) in [
        (0, &["--version"][..]),
        (125, &["run", "--no-such-option", "image"]),
        (125, &["no-such-verb"]),
        (125, &["exec", "c", "true"]),
        (125, &["run", "image"]),
        (1, &["pods"]),
    ] {
        let output = Command::new(NACELLE)
            .args(["--socket", "/no/such/socket"])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
    }
}

/// Any process of the host can have the port.
#[test]
fn nacelled_starts_without_metrics_if_their_address_is_in_use() {
    if !nix::unistd::getuid().is_root() {
        println!("SKIP: not root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("cni")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let log = File::create(path("log")).unwrap();
    let logged = || std::fs::read_to_string(path("log")).unwrap();
    let mut daemon = Command::new(NACELLED)
        .args(["--metrics-listen", &address])
        .arg("--root")
        .arg(path("root"))
        .arg("--state")
        .arg(path("state"))
        .arg("--cni-conf-dir")
        .arg(path("cni"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(path("state").join("nacelled.sock")).is_err()
        || !logged().contains("nacelled is ready")
    {
        let exited = daemon.try_wait().unwrap();
        if exited.is_some() || Instant::now() > end {
            let _ = daemon.kill();
            panic!("nacelled is not ready ({exited:?}): {}", logged());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    let status = daemon.wait().unwrap();
    let logged = logged();
    assert!(status.success(), "{status}: {logged}");
    let error = logged.lines().find(|line| line.contains("metrics are not served")).unwrap();
    assert!(error.contains(&address) && error.contains("Address already in use"), "{error}");
}
