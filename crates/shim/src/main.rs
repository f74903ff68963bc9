//! `containerd-shim-nacelle-v2`: runs pods of containerd in microVMs.
//!
//! containerd runs this binary with a verb (containerd's core/runtime/v2/README.md):
//! ```text
//! start    makes the socket, starts the shim of the pod, prints the address   (bootstrap)
//! delete   cleans up after a shim that has died                               (cleanup)
//! none     is the shim: serves the task API, holds the pod                    (serve)
//! ```
//! A shim is one pod. It holds the sandbox itself; neither nacelled nor a living containerd is needed
//! for the pod to go on.

mod args;
mod bootstrap;
mod cleanup;
mod errors;
mod events;
mod network;
mod place;
mod pod;
mod process;
mod rootfs;
mod serve;
mod service;
mod settings;
mod spec;
mod stats;
mod stdio;

use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result};

use args::{Arguments, Verb};

/// Of the binary's name: `io.containerd.nacelle.v2`.
pub(crate) const RUNTIME: &str = "io.containerd.nacelle.v2";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows it with its own error.
            eprintln!("containerd-shim-nacelle-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "launcher") {
        // Started by the shim itself: spawns the VMM (sandbox::launcher).
        let socket = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        return sandbox::launcher::main(socket).context("launcher");
    }
    let arguments = Arguments::parse(&words)?;
    match arguments.verb {
        Verb::Version => {
            println!("containerd-shim-nacelle-v2:");
            println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
            println!("  Runtime:  {RUNTIME}");
            Ok(())
        }
        Verb::Info => bootstrap::info(),
        Verb::Start => bootstrap::start(&arguments),
        Verb::Delete => cleanup::delete(&arguments),
        Verb::Clean => cleanup::clean(&arguments),
        Verb::Serve => serve::serve(&arguments),
    }
}
