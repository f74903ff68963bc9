//! `nacelled`: reads its configuration, opens what pods need, serves until told to stop.

mod debug;
mod health;
mod images;
mod logging;
mod network;
mod notify;
mod serve;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::settings::{Overrides, Settings, TEMPLATE};

pub(crate) use health::probe;

#[derive(Debug, Parser)]
#[command(name = "nacelled", version, about = "Runs each Kubernetes pod in its own microVM")]
struct Arguments {
    /// Configuration file [default: /etc/nacelle/config.toml, if it is there]
    #[arg(long, env = "NACELLE_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Durable state
    #[arg(long, env = "NACELLE_ROOT", global = true)]
    root: Option<PathBuf>,
    /// Sockets of running pods
    #[arg(long, env = "NACELLE_STATE", global = true)]
    state: Option<PathBuf>,
    /// The CRI socket
    #[arg(long, env = "NACELLE_SOCKET", global = true)]
    socket: Option<PathBuf>,
    /// Folder of CNI configurations
    #[arg(long, env = "NACELLE_CNI_CONF_DIR", global = true)]
    cni_conf_dir: Option<PathBuf>,
    /// Log level, as in the configuration
    #[arg(long, env = "NACELLE_LOG", global = true)]
    log_level: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print or check configurations
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The process that spawns VMMs; nacelled starts it by itself
    #[command(hide = true)]
    Launcher,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Every setting with its default
    Default,
    /// Read the configuration and say what is wrong with it
    Check,
    /// A CNI configuration for a single node: a bridge, masquerading, published ports
    Cni {
        /// IPv4 addresses of pods; "none" for no IPv4
        #[arg(long, default_value = ::network::DEFAULT_IPV4)]
        ipv4: String,
        /// IPv6 addresses of pods; "none" for no IPv6
        #[arg(long, default_value = ::network::DEFAULT_IPV6)]
        ipv6: String,
    },
}

pub fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacelled: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let overrides = Overrides {
        root: arguments.root,
        state: arguments.state,
        socket: arguments.socket,
        cni_conf_dir: arguments.cni_conf_dir,
        log_level: arguments.log_level,
    };
    let load = || Settings::load(arguments.config.as_deref(), &overrides);
    match arguments.command {
        None => serve::serve(load()?),
        Some(Command::Launcher) => {
            let socket = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .context("the launcher's socket is its standard input")?;
            sandbox::launcher::main(socket).context("launcher")
        }
        Some(Command::Config(ConfigCommand::Default)) => {
            print!("{TEMPLATE}");
            Ok(())
        }
        Some(Command::Config(ConfigCommand::Check)) => check(&load()?),
        Some(Command::Config(ConfigCommand::Cni { ipv4, ipv6 })) => {
            let given = |text: &str| (text != "none").then(|| text.to_string());
            let (ipv4, ipv6) = (given(&ipv4), given(&ipv6));
            println!("{}", ::network::default_conflist(ipv4.as_deref(), ipv6.as_deref())?);
            Ok(())
        }
    }
}

fn check(settings: &Settings) -> Result<()> {
    logging::filter(&settings.log.level)?;
    if let Some(trouble) = settings.missing_files() {
        anyhow::bail!("{trouble}");
    }
    println!("The configuration is sound; the socket will be {}.", settings.socket.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        let given = Arguments::parse_from(["nacelled", "config", "check", "--config", "/x"]);
        assert_eq!(given.config.unwrap(), PathBuf::from("/x"));
    }
}
