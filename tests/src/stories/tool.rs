//! The CLI `nacelle`.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Story;
use crate::node::{self, Node};

pub const STORIES: &[Story] = &[
    ("nacelle run prints a container's output and exits with its exit code", run),
    ("nacelle shows pods, containers, logs, phases and console", show),
    ("nacelle check reports what the host supports", check),
    ("errors name what is missing", errors),
    ("exit codes of run and exec are docker's", exit_codes),
    ("without CNI configuration nacelle run has a network and a kubelet's pod has not", no_cni),
];

fn nacelle(node: &Node, words: &[&str]) -> Result<(i32, String, String)> {
    let output = Command::new(node::bin("nacelle"))
        .arg("--socket")
        .arg(node.socket())
        .args(words)
        .stdin(std::process::Stdio::null())
        .output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

fn run() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let (code, out, err) = nacelle(
        &node,
        &["run", "--rm", "-e", "A=b", &image, "sh", "-c", "echo $A; echo e >&2; exit 4"],
    )?;
    ensure!(code == 4 && out == "b\n", "code {code}, output {out:?}, errors {err:?}");
    ensure!(err.contains("e\n"), "{err:?}");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), "from the host\n")?;
    let volume = format!("{}:/in/file:ro", file.path().display());
    let (code, out, err) =
        nacelle(&node, &["run", "--rm", "-v", &volume, &image, "cat", "/in/file"])?;
    ensure!(code == 0 && out == "from the host\n", "{out:?} {err:?}");
    ensure!(node.cri().pods()?.is_empty(), "--rm leaves a pod");
    node.finish()
}

fn show() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let words = ["run", "-d", "--name", "seen", &image, "sh", "-c", "echo hello; sleep 1000"];
    let (code, _, err) = nacelle(&node, &words)?;
    ensure!(code == 0, "{err}");
    let output_of = |words: &[&str]| -> Result<String> {
        let (code, out, err) = nacelle(&node, words)?;
        ensure!(code == 0, "nacelle {words:?}: {err}");
        Ok(out)
    };
    ensure!(output_of(&["pods"])?.contains("seen"), "pods");
    ensure!(output_of(&["ps"])?.contains("seen"), "ps");
    ensure!(output_of(&["images"])?.contains("busybox"), "images");
    ensure!(output_of(&["exec", "seen", "uname", "-s"])? == "Linux\n", "exec");
    let pods: serde_json::Value = serde_json::from_str(&output_of(&["pods", "--output", "json"])?)?;
    ensure!(pods.as_array().context("pods in JSON")?.len() == 1, "{pods}");
    let all: serde_json::Value = serde_json::from_str(&output_of(&["inspect", "seen", &image])?)?;
    ensure!(all[0]["pod"]["id"] == pods[0]["id"] && !all[0]["containers"][0].is_null(), "{all}");
    ensure!(!all[1]["image"].is_null(), "{all}");
    let log = crate::wait::until("the log has a line", std::time::Duration::from_secs(10), || {
        Ok(Some(output_of(&["logs", "seen"])?).filter(|text| !text.is_empty()))
    })?;
    ensure!(log.contains("hello"), "{log}");
    let trace = output_of(&["trace", "seen"])?;
    ensure!(trace.contains("network") && trace.contains("boot"), "{trace}");
    output_of(&["console", "seen"])?;
    output_of(&["stats"])?;
    output_of(&["stop", "seen", "--time", "1"])?;
    // The shell is PID 1 and has no handler, so it is killed.
    ensure!(output_of(&["wait", "seen"])? == "137\n", "wait");
    output_of(&["rm", "seen"])?;
    ensure!(node.cri().pods()?.is_empty(), "rm leaves a pod");
    node.finish()
}

fn check() -> Result<()> {
    let node = Node::start()?;
    let (_, out, err) = nacelle(&node, &["check"])?;
    for word in ["KVM", "cgroup", "CNI"] {
        ensure!(out.contains(word), "no word on {word}: {out}{err}");
    }
    node.finish()
}

fn errors() -> Result<()> {
    let node = Node::start()?;
    let (code, _, err) = nacelle(&node, &["exec", "nobody", "true"])?;
    ensure!(code != 0 && err.contains("nobody"), "{err}");
    let output = Command::new(node::bin("nacelle"))
        .args(["--socket", "/no/such/socket", "pods"])
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && stderr.contains("nacelled"), "{stderr}");
    node.finish()
}

fn exit_codes() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let expect = |expected: i32, words: &[&str]| -> Result<()> {
        let (code, out, err) = nacelle(&node, words)?;
        ensure!(code == expected, "nacelle {words:?}: {code}, not {expected}: {out:?} {err:?}");
        Ok(())
    };
    expect(127, &["run", "--rm", &image, "no-such-program"])?;
    expect(127, &["run", "--rm", &image, "/no/such/program"])?;
    expect(126, &["run", "--rm", &image, "/etc/passwd"])?;
    expect(126, &["run", "--rm", &image, "/etc"])?;
    expect(3, &["run", "--rm", &image, "sh", "-c", "exit 3"])?;
    expect(125, &["run", "--rm", "--cpus", "0", &image, "true"])?;
    expect(125, &["run", "--no-such-option", &image])?;
    expect(0, &["run", "-d", "--name", "codes", &image, "sleep", "1000"])?;
    expect(127, &["exec", "codes", "no-such-program"])?;
    expect(126, &["exec", "codes", "/etc/passwd"])?;
    expect(4, &["exec", "codes", "sh", "-c", "exit 4"])?;
    expect(125, &["exec", "nobody", "true"])?;
    expect(1, &["stop", "nobody"])?;
    expect(0, &["kill", "codes"])?;
    let (_, out, err) = nacelle(&node, &["wait", "codes"])?;
    ensure!(out == "137\n", "{out:?} {err:?}");
    expect(1, &["kill", "codes"])?;
    expect(0, &["rm", "codes"])?;
    node.finish()
}

fn no_cni() -> Result<()> {
    const BRIDGE: &str = "/sys/class/net/nacelle-def0";
    let existed = std::path::Path::new(BRIDGE).exists();
    let node = Node::start_with(|config| config.replace("/cni\"", "/no-cni\""))?;
    let image = node.image("busybox")?;
    let Err(error) = node.pod("plain") else { anyhow::bail!("a pod started without network") };
    let text = format!("{error:#}");
    ensure!(text.contains("no network is configured"), "{text}");
    let (code, out, err) = nacelle(&node, &["run", "--rm", &image, "ip", "addr", "show", "eth0"])?;
    ensure!(code == 0 && out.contains("inet 10.213."), "{code}: {out} {err}");
    let (_, out, _) = nacelle(&node, &["check"])?;
    ensure!(out.contains("built-in network"), "{out}");
    if !existed {
        // The bridge stays for the next pod, as with the bridge plugin.
        ensure!(Command::new("ip").args(["link", "del", "nacelle-def0"]).status()?.success(), "ip");
    }
    node.finish()
}
