//! `containerd-shim-nacelle-v2`: runs pods of containerd in microVMs.
//!
//! containerd runs this binary with an action (containerd's core/runtime/v2/README.md):
//! ```text
//! start    creates the socket, starts the pod's shim, prints the address   (bootstrap)
//! delete   cleans up after a dead shim                                     (cleanup)
//! none     serves the task API, owns the pod                               (serve)
//! ```
//! One shim serves one pod and owns its sandbox. The pod keeps running without nacelled, and while
//! containerd is down.

mod args;
mod bootstrap;
mod cleanup;
mod create;
mod errors;
mod events;
mod info;
mod network;
mod paths;
mod pod;
mod pod_config;
mod process;
mod rootfs;
mod runtime;
mod sandbox_service;
mod sandbox_state;
mod serve;
mod service;
mod settings;
mod spec;
mod stats;
mod stdio;

use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result};

use args::{Action, Arguments};
use runtime::RUNTIME;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd includes it in its own error.
            eprintln!("containerd-shim-nacelle-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "launcher") {
        // Started by the shim itself: spawns the VMM (sandbox::launcher).
        let socket = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        return sandbox::launcher::main(socket).context("launcher");
    }
    let arguments = Arguments::parse(&args)?;
    match arguments.action {
        Action::Version => {
            print!("{}", version());
            Ok(())
        }
        Action::Info => info::info(),
        Action::Start => bootstrap::start(&arguments),
        Action::Delete => cleanup::delete(&arguments),
        Action::Cleanup => cleanup::cleanup(&arguments),
        Action::Serve => serve::serve(&arguments),
    }
}

/// `-v`, in the form of containerd's shims. Without the revision: releases are named by their version.
fn version() -> String {
    format!(
        "containerd-shim-nacelle-v2:\n  Version:  {}\n  Runtime:  {RUNTIME}\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_printed_as_by_other_shims() {
        let text = version();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "containerd-shim-nacelle-v2:");
        assert_eq!(lines[1], format!("  Version:  {}", env!("CARGO_PKG_VERSION")));
        assert_eq!(lines[2], "  Runtime:  io.containerd.nacelle.v2");
    }
}
