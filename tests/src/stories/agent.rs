//! The agent by itself in a VM, without nacelled.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Story;
use crate::node;

pub const STORIES: &[Story] = &[("the agent's tests as PID 1 of a VM pass", own_tests)];

/// `crates/agent/tests/guest.rs`; `cargo xtask stories` puts it beside this program.
fn own_tests() -> Result<()> {
    let tests = node::bin("nacelle-agent-tests");
    let mut path = tests.parent().context("a program lies in a folder")?.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let output = Command::new(&tests)
        .arg("--ignored")
        .env("PATH", path)
        .env("NACELLE_GUEST", node::guest())
        .output()
        .with_context(|| format!("starting {}", tests.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}\n{text}", output.status);
    ensure!(!text.contains(" 0 passed"), "no test ran: {text}");
    Ok(())
}
