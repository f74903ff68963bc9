//! The command line of `nacelle-vmm`.

use std::fs::File;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use vmm::boot::{ConsoleFollower, Options, Seccomp};
use vmm::seccomp::Policy;
use vmm::{assemble, boot, config, exit};
use vmm_api::Request;
use vmm_api::client::Client;

/// Exit code for a refused configuration, as for clap's errors.
const REFUSED: u8 = 2;

/// Runs one virtual machine.
#[derive(Debug, Parser)]
#[command(name = "nacelle-vmm", version, args_conflicts_with_subcommands = true)]
struct Cli {
    /// File descriptor to read the VM's configuration (JSON) from
    #[arg(long, value_name = "N")]
    config_fd: Option<RawFd>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Boot a kernel from files and print its console
    Boot(Box<Options>),
    /// Save a VM that was started with `boot --control`, for `boot --restore`, and end it
    Save {
        /// Path of its control socket
        #[arg(long)]
        control: PathBuf,
        /// Directory for the files `state` and `memory`
        dir: PathBuf,
    },
    /// Measure the speed of KVM on this host and print it as JSON
    Probe,
}

fn main() -> ExitCode {
    let started = Instant::now();
    vmm::jail::reduce_memory_use();
    // `--config-fd N` as the daemon passes it is parsed without clap, which would take a third of
    // the start-up time and stay in memory.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|a| a == "--config-fd")
        && let Some(fd) = arguments.next().and_then(|a| a.to_str()?.parse().ok())
    {
        return run_from_config(fd, started);
    }
    let cli = Cli::parse();
    let outcome = match (cli.config_fd, cli.command) {
        (Some(fd), _) => return run_from_config(fd, started),
        (None, Some(Command::Boot(options))) => run_from_options(&options, started),
        (None, Some(Command::Save { control, dir })) => save(&control, &dir),
        (None, Some(Command::Probe)) => probe(),
        (None, None) => {
            Err(anyhow::anyhow!("--config-fd, `boot`, `save` or `probe` is required; see --help"))
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("nacelle-vmm: {error:#}");
        ExitCode::from(REFUSED)
    })
}

/// A VM from an inherited configuration. Errors are written to the status file, if it can be
/// opened, and to standard error.
fn run_from_config(fd: RawFd, started: Instant) -> ExitCode {
    let config = match config::read(fd) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("nacelle-vmm: {}", vmm::chain(&error));
            return ExitCode::from(REFUSED);
        }
    };
    match config::take(config) {
        Ok(resources) => {
            let (exit, mut status) = assemble::run(resources, Policy::Kill, started);
            if let Err(error) = exit::write_status(&mut status, &exit) {
                eprintln!("nacelle-vmm: cannot write the status file: {error}");
            }
            ExitCode::from(exit::exit_code(exit.reason))
        }
        Err(config::Refused { error, status }) => {
            eprintln!("nacelle-vmm: {}", vmm::chain(&error));
            if let Some(mut status) = status {
                let _ = exit::write_status(&mut status, &assemble::failure(&error));
            }
            ExitCode::from(REFUSED)
        }
    }
}

fn run_from_options(options: &Options, started: Instant) -> Result<ExitCode> {
    let policy = match options.seccomp {
        Seccomp::Kill => Policy::Kill,
        Seccomp::Log => Policy::Log,
        Seccomp::Off => Policy::Off,
    };
    let (config, console) = boot::open(options)?;
    let resources = config::take(config).map_err(|refused| refused.error);
    let resources = resources.context("the VM cannot be started")?;
    // Blocked before the follower's thread starts: a signal delivered to it would kill the process.
    assemble::block_signals()?;
    let follower = ConsoleFollower::start(console).context("cannot follow the console")?;
    let (exit, mut status) = assemble::run(resources, policy, started);
    follower.finish();
    exit::write_status(&mut status, &exit).context("cannot write the status file")?;
    eprintln!("nacelle-vmm: {:?}: {}", exit.reason, exit.message);
    Ok(ExitCode::from(exit::exit_code(exit.reason)))
}

/// Most time for one request to a running VMM; saving takes as long as writing the guest's memory.
const SAVE_LIMIT: Duration = Duration::from_secs(120);

fn save(control: &Path, dir: &Path) -> Result<ExitCode> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("cannot create {}", dir.display()))?;
    // New files: they have the guest's memory, which only their owner may read.
    let create = |name: &str| {
        let path = dir.join(name);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        file.with_context(|| format!("cannot create {}", path.display()))
    };
    let (state, memory) = (create("state")?, create("memory")?);
    let client = Client::connect(control, SAVE_LIMIT)?;
    client.order(&Request::Pause)?;
    let saved = || -> Result<u64> {
        let from = client.snapshot(state.as_fd())?;
        let len = from.metadata()?.len();
        vmm_api::snapshot::copy_memory(&from, &memory, len).context("cannot copy the memory")
    };
    match saved() {
        Ok(bytes) => println!("{bytes} bytes of guest memory"),
        Err(error) => {
            client.order(&Request::Resume).context("cannot resume the VM")?;
            return Err(error);
        }
    }
    client.order(&Request::Kill)?;
    Ok(ExitCode::SUCCESS)
}

fn probe() -> Result<ExitCode> {
    let report = machine::probe::run();
    println!("{}", serde_json::to_string(&report)?);
    Ok(if report.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
