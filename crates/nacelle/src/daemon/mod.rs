//! `nacelled`: reads its configuration, opens the stores, and serves until it is stopped.

mod debug;
mod health;
mod images;
mod logging;
mod metrics;
mod network;
mod notify;
mod serve;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

use crate::settings::{Listen, Overrides, Settings, TEMPLATE};

pub(crate) use health::probe;

#[derive(Debug, Parser)]
#[command(name = "nacelled", version, about = "CRI runtime that runs every pod in its own microVM")]
struct Arguments {
    /// Configuration file [default: /etc/nacelle/config.toml, if it exists]
    #[arg(long, env = "NACELLE_CONFIG", global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for persistent data [default: /var/lib/nacelle]
    #[arg(long, env = "NACELLE_ROOT", global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory for sockets and other volatile data [default: /run/nacelle]
    #[arg(long, env = "NACELLE_STATE", global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// CRI socket [default: nacelled.sock in the state directory]
    #[arg(long, env = "NACELLE_SOCKET", global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory with CNI configurations [default: /etc/cni/net.d]
    #[arg(long, env = "NACELLE_CNI_CONF_DIR", global = true, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Log level: error, warn, info, debug, trace, or a filter such as info,sandbox=debug
    #[arg(long, env = "NACELLE_LOG", global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Where metrics are served: unix:/PATH or 127.0.0.1:PORT; empty: nowhere [default: nowhere]
    #[arg(long, env = "NACELLE_METRICS_LISTEN", global = true, value_name = "ADDRESS")]
    metrics_listen: Option<Listen>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print or check configuration files
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Internal: the process that spawns VMMs, started by nacelled
    #[command(hide = true)]
    Launcher,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every setting with its default
    Default,
    /// Validate the configuration file
    Check,
    /// Print a CNI configuration for a single node: bridge, NAT, published ports
    Cni {
        /// IPv4 subnet of pods; "none" to disable IPv4
        #[arg(long, default_value = ::network::DEFAULT_IPV4)]
        ipv4: String,
        /// IPv6 subnet of pods; "none" to disable IPv6 [default: fd00:88::/64 if this host has IPv6]
        #[arg(long)]
        ipv6: Option<String>,
    },
}

/// For the man pages.
pub(crate) fn command() -> clap::Command {
    Arguments::command()
}

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let prints = matches!(arguments.command, Some(Command::Config(_)));
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if prints && crate::is_broken_pipe(&error) => ExitCode::SUCCESS,
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
        metrics_listen: arguments.metrics_listen,
    };
    let load = || Settings::load(arguments.config.as_deref(), &overrides);
    match arguments.command {
        None => serve::serve(load()?),
        Some(Command::Launcher) => {
            let socket = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .context("duplicating standard input, which is the launcher's socket")?;
            sandbox::launcher::main(socket).context("launcher")
        }
        Some(Command::Config(ConfigCommand::Default)) => {
            crate::say(format_args!("{}", TEMPLATE.trim_end()))?;
            Ok(())
        }
        Some(Command::Config(ConfigCommand::Check)) => check(&load()?),
        Some(Command::Config(ConfigCommand::Cni { ipv4, ipv6 })) => {
            let ipv6 = ipv6.as_deref().or(::network::host_ipv6()).unwrap_or("none");
            let given = |text: &str| (text != "none").then(|| text.to_string());
            let (ipv4, ipv6) = (given(&ipv4), given(ipv6));
            let list = ::network::default_conflist(ipv4.as_deref(), ipv6.as_deref())?;
            Ok(crate::say(format_args!("{}", list.trim_end()))?)
        }
    }
}

fn check(settings: &Settings) -> Result<()> {
    logging::filter(&settings.log.level)?;
    if let Some(trouble) = settings.missing_files() {
        anyhow::bail!("{trouble}");
    }
    crate::say(format_args!(
        "The configuration is valid. The CRI socket is {}.",
        settings.socket.display()
    ))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
        let given = Arguments::parse_from(["nacelled", "config", "check", "--config", "/x"]);
        assert_eq!(given.config.unwrap(), PathBuf::from("/x"));
        let given = Arguments::parse_from(["nacelled", "--metrics-listen", ""]);
        assert_eq!(given.metrics_listen, Some(Listen::Off));
        let refused = Arguments::try_parse_from(["nacelled", "--metrics-listen", "0.0.0.0:1"]);
        assert!(refused.unwrap_err().to_string().contains("not a loopback address"));
        let help = Arguments::command().find_subcommand("config").unwrap().clone();
        let help = help.find_subcommand("cni").unwrap().clone().render_help().to_string();
        assert!(help.contains(::network::DEFAULT_IPV6), "{help}");
    }
}
