//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
#[command(name = "nacelle", about = "Runs containers in pods that are microVMs", version)]
pub(super) struct Arguments {
    /// nacelled's socket [default: /run/nacelle/nacelled.sock]
    #[arg(long, env = "NACELLE_SOCKET", global = true)]
    pub(super) socket: Option<PathBuf>,
    /// How results are printed
    #[arg(long, value_enum, default_value_t = Output::Table, global = true)]
    pub(super) output: Output,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Says whether this host can run pods, and what to do where it cannot
    Check(Check),
    /// Runs a container in a pod of its own; starts a private nacelled if none runs
    Run(Run),
    /// Starts a pod without a container and prints its id
    RunPod(RunPod),
    /// Fetches an image from a registry
    Pull {
        image: String,
        #[arg(long, short)]
        username: Option<String>,
        /// Better in the environment than in the list of processes
        #[arg(long, env = "NACELLE_PASSWORD", hide_env_values = true)]
        password: Option<String>,
    },
    /// Lists images
    Images,
    /// Removes images
    Rmi {
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Takes images out of an OCI layout or a docker archive on this node
    Import {
        path: PathBuf,
        /// For an image that names none itself
        #[arg(long)]
        name: Option<String>,
    },
    /// Lists pods
    Pods,
    /// Lists containers
    Ps {
        /// Those that have ended too
        #[arg(long, short)]
        all: bool,
    },
    /// Prints what a container has said
    Logs(Logs),
    /// Runs a command in a container
    Exec(Exec),
    /// Shows what pods and containers use
    Stats,
    /// Stops pods or containers
    Stop {
        #[arg(required = true)]
        names: Vec<String>,
        /// Seconds from the request to end until the kill
        #[arg(long, short, default_value_t = 10)]
        time: i64,
    },
    /// Removes pods or containers
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
        /// Those that still run too
        #[arg(long, short)]
        force: bool,
    },
    /// Prints the console of a pod's kernel
    Console {
        pod: String,
        /// Go on as it grows
        #[arg(long, short)]
        follow: bool,
    },
    /// Shows where a pod's start-up time went
    Trace { pod: String },
    /// Versions of this command and of nacelled
    Version,
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// nacelled's configuration, when it does not run
    #[arg(long, env = "NACELLE_CONFIG")]
    pub(super) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Run {
    pub(super) image: String,
    /// Instead of the image's own command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
    /// Connect our input to the container
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Give the container a terminal
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Leave it running and print its id
    #[arg(long, short)]
    pub(super) detach: bool,
    /// Remove it once it has ended
    #[arg(long)]
    pub(super) rm: bool,
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Variable: NAME=value, or NAME to pass our own on
    #[arg(long, short)]
    pub(super) env: Vec<String>,
    /// File or folder to share with the container: /here:/there[:ro]
    #[arg(long, short)]
    pub(super) volume: Vec<String>,
    /// Port of the host to publish: [address:]host:container[/udp]
    #[arg(long, short)]
    pub(super) publish: Vec<String>,
    /// CPUs, e.g. 1.5
    #[arg(long)]
    pub(super) cpus: Option<f64>,
    /// Memory, e.g. 512m or 2g
    #[arg(long, short)]
    pub(super) memory: Option<String>,
    /// user[:group], as numbers or as names of the image
    #[arg(long, short)]
    pub(super) user: Option<String>,
    #[arg(long, short)]
    pub(super) workdir: Option<String>,
    /// Instead of the image's entrypoint
    #[arg(long)]
    pub(super) entrypoint: Option<String>,
    #[arg(long)]
    pub(super) hostname: Option<String>,
    /// All capabilities inside the pod's VM
    #[arg(long)]
    pub(super) privileged: bool,
    #[arg(long)]
    pub(super) read_only: bool,
}

#[derive(Debug, Args)]
pub(super) struct RunPod {
    #[arg(long)]
    pub(super) name: Option<String>,
    #[arg(long)]
    pub(super) cpus: Option<f64>,
    #[arg(long, short)]
    pub(super) memory: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Logs {
    pub(super) container: String,
    /// Go on until the container ends
    #[arg(long, short)]
    pub(super) follow: bool,
    /// Only so many of the last lines
    #[arg(long)]
    pub(super) tail: Option<usize>,
    /// With the time of each line
    #[arg(long, short)]
    pub(super) timestamps: bool,
}

#[derive(Debug, Args)]
pub(super) struct Exec {
    pub(super) container: String,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
    /// Connect our input
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// With a terminal
    #[arg(long, short)]
    pub(super) tty: bool,
    #[arg(long, short)]
    pub(super) env: Vec<String>,
    #[arg(long, short)]
    pub(super) user: Option<String>,
    #[arg(long, short)]
    pub(super) workdir: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_container() {
        let words =
            ["nacelle", "run", "--rm", "-it", "-e", "A=b", "image", "sh", "-c", "x", "--rm"];
        let Command::Run(run) = Arguments::parse_from(words).command else { panic!("not a run") };
        assert!(run.rm && run.interactive && run.tty && !run.detach);
        assert_eq!(run.command, ["sh", "-c", "x", "--rm"]);
        assert_eq!(run.env, ["A=b"]);
    }

    #[test]
    fn the_form_of_output_may_stand_behind_the_verb() {
        let given = Arguments::parse_from(["nacelle", "pods", "--output", "json"]);
        assert_eq!(given.output, Output::Json);
    }
}
