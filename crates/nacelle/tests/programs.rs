//! The programs without a daemon: exit codes, and output to a closed pipe.

use std::process::{Command, Output, Stdio};

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
