//! The command line. Verbs, options and their help texts are worded as docker and crictl have them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

const GLOBAL: &str = "Global options";

#[derive(Debug, Parser)]
#[command(name = "nacelle", about = "Run and inspect containers in microVM pods", version)]
pub(super) struct Arguments {
    /// Socket of nacelled [default: /run/nacelle/nacelled.sock]
    #[arg(
        long,
        env = "NACELLE_SOCKET",
        global = true,
        value_name = "PATH",
        help_heading = GLOBAL
    )]
    pub(super) socket: Option<PathBuf>,
    /// Output format
    #[arg(
        long,
        short,
        value_enum,
        default_value_t = Output::Table,
        global = true,
        value_name = "FORMAT",
        help_heading = GLOBAL
    )]
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
    /// Check whether this host can run pods
    Check(Check),
    /// Create a pod and run a container in it; starts a private nacelled if none runs
    Run(Run),
    /// Create a pod without containers
    RunPod(RunPod),
    /// Pull an image from a registry
    Pull {
        /// Image reference, e.g. docker.io/library/busybox
        image: String,
        /// User name for the registry
        #[arg(long, short)]
        username: Option<String>,
        /// Password for the registry; the environment variable keeps it out of the process list
        #[arg(long, env = "NACELLE_PASSWORD", hide_env_values = true)]
        password: Option<String>,
    },
    /// List images
    Images,
    /// Remove one or more images
    Rmi {
        /// Image references or ids
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Import images from an OCI layout or a docker archive on this node
    Import {
        /// Directory or tar archive
        path: PathBuf,
        /// Reference for an image that the archive does not name
        #[arg(long)]
        name: Option<String>,
    },
    /// List pods
    Pods,
    /// List containers
    Ps {
        /// Show all containers (default shows just running)
        #[arg(long, short)]
        all: bool,
    },
    /// Display detailed information on one or more pods, containers or images
    Inspect {
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Fetch the logs of a container
    Logs(Logs),
    /// Execute a command in a running container
    Exec(Exec),
    /// Display resource usage of pods and containers
    Stats,
    /// Block until one or more containers stop, then print their exit codes
    Wait {
        /// Names or ids of containers, or pods with one container
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Stop one or more running pods or containers
    Stop {
        /// Names or ids of pods or containers
        #[arg(required = true)]
        names: Vec<String>,
        /// Seconds to wait before SIGKILL
        #[arg(long, short, value_name = "SECONDS", default_value_t = 10)]
        time: i64,
    },
    /// Kill one or more running pods or containers
    Kill {
        /// Names or ids of pods or containers
        #[arg(required = true)]
        names: Vec<String>,
        /// Signal to send; only SIGKILL is supported
        #[arg(long, short, default_value = "KILL", value_parser = sigkill)]
        signal: String,
    },
    /// Remove one or more pods or containers
    Rm {
        /// Names or ids of pods or containers
        #[arg(required = true)]
        names: Vec<String>,
        /// Force the removal of a running pod or container (uses SIGKILL)
        #[arg(long, short)]
        force: bool,
    },
    /// Print the console output of a pod's guest kernel
    Console {
        /// Name or id of the pod
        pod: String,
        /// Follow the output
        #[arg(long, short)]
        follow: bool,
    },
    /// Show how long each phase of a pod's start took
    Trace {
        /// Name or id of the pod
        pod: String,
    },
    /// Show the versions of nacelle and nacelled
    Version,
    /// Generate the autocompletion script for a shell
    Completions {
        /// Shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Write man pages of nacelle and nacelled into a directory
    #[command(hide = true)]
    Man {
        /// Directory; created if it does not exist
        dir: PathBuf,
    },
}

/// Exit code for a failure of nacelle itself, as docker has it: containers rarely exit with it.
pub(super) const OWN_FAILURE: u8 = 125;

impl Command {
    /// The exit code when nacelle itself fails. `run` and `exec` pass the container's exit code on,
    /// so theirs differs from what most programs exit with.
    pub(super) fn failure_code(&self) -> u8 {
        match self {
            Self::Run(_) | Self::Exec(_) => OWN_FAILURE,
            _ => 1,
        }
    }
}

/// The CRI can send two signals to a container: its stop signal, and this one.
fn sigkill(text: &str) -> Result<String, String> {
    let name = text.to_ascii_uppercase();
    match name.strip_prefix("SIG").unwrap_or(&name) {
        "KILL" | "9" => Ok("KILL".into()),
        _ => Err(format!(
            "only SIGKILL is supported; use `nacelle stop`, or `nacelle exec NAME kill -s {text} 1`"
        )),
    }
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Configuration file of nacelled; used when nacelled does not run
    #[arg(long, env = "NACELLE_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Run {
    /// Image reference; pulled if it is not on this node
    pub(super) image: String,
    /// Command and arguments; overwrites the image's default command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
    /// Keep standard input open
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Allocate a pseudo-TTY
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Run the container in the background and print the pod's id
    #[arg(long, short)]
    pub(super) detach: bool,
    /// Remove the pod and its container when the container exits
    #[arg(long)]
    pub(super) rm: bool,
    /// Assign a name to the pod and its container
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Set an environment variable: NAME=VALUE, or NAME for the value it has here
    #[arg(long, short)]
    pub(super) env: Vec<String>,
    /// Bind mount a file or directory of the host: /host/path:/container/path[:ro]
    #[arg(long, short)]
    pub(super) volume: Vec<String>,
    /// Publish a container's port to the host: [address:]host:container[/tcp|udp|sctp]
    #[arg(long, short)]
    pub(super) publish: Vec<String>,
    /// Number of CPUs, e.g. 1.5
    #[arg(long)]
    pub(super) cpus: Option<f64>,
    /// Memory limit, e.g. 512m or 2g
    #[arg(long, short)]
    pub(super) memory: Option<String>,
    /// User name or UID, with an optional numeric GID: user[:gid]
    #[arg(long, short)]
    pub(super) user: Option<String>,
    /// Working directory inside the container
    #[arg(long, short)]
    pub(super) workdir: Option<String>,
    /// Overwrite the default ENTRYPOINT of the image
    #[arg(long)]
    pub(super) entrypoint: Option<String>,
    /// Host name of the pod
    #[arg(long)]
    pub(super) hostname: Option<String>,
    /// Give extended privileges to the container, inside the pod's VM
    #[arg(long)]
    pub(super) privileged: bool,
    /// Mount the container's root filesystem as read only
    #[arg(long)]
    pub(super) read_only: bool,
}

#[derive(Debug, Args)]
pub(super) struct RunPod {
    /// Assign a name to the pod
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Number of CPUs, e.g. 1.5
    #[arg(long)]
    pub(super) cpus: Option<f64>,
    /// Memory limit, e.g. 512m or 2g
    #[arg(long, short)]
    pub(super) memory: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Logs {
    /// Name or id of the container, or of a pod with one container
    pub(super) container: String,
    /// Follow log output
    #[arg(long, short)]
    pub(super) follow: bool,
    /// Number of lines to show from the end of the logs
    #[arg(long, short = 'n')]
    pub(super) tail: Option<usize>,
    /// Show timestamps
    #[arg(long, short)]
    pub(super) timestamps: bool,
}

#[derive(Debug, Args)]
pub(super) struct Exec {
    /// Name or id of the container, or of a pod with one container
    pub(super) container: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
    /// Keep standard input open
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Allocate a pseudo-TTY
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Set an environment variable: NAME=VALUE, or NAME for the value it has here
    #[arg(long, short)]
    pub(super) env: Vec<String>,
    /// User name or UID, with an optional group: user[:group]
    #[arg(long, short)]
    pub(super) user: Option<String>,
    /// Working directory inside the container
    #[arg(long, short)]
    pub(super) workdir: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
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
    fn the_output_format_may_follow_the_verb() {
        for words in [["--output", "json"], ["-o", "json"]] {
            let given = Arguments::parse_from(["nacelle", "pods"].iter().chain(&words));
            assert_eq!(given.output, Output::Json);
        }
    }

    /// Every verb and every option of it has a help text, which begins with a capital letter and
    /// has no full stop, as docker's and crictl's do.
    #[test]
    fn every_option_has_a_help_text() {
        let command = Arguments::command();
        for verb in command.get_subcommands() {
            let mut texts = vec![(verb.get_name().to_string(), verb.get_about())];
            for option in verb.get_arguments().filter(|option| option.get_id() != "help") {
                let name = format!("{} {}", verb.get_name(), option.get_id());
                texts.push((name, option.get_help()));
            }
            for (name, text) in texts {
                let text = text.map(ToString::to_string).unwrap_or_default();
                assert!(text.starts_with(char::is_uppercase), "{name}: {text:?}");
                assert!(!text.ends_with('.'), "{name}: {text:?}");
            }
        }
    }

    #[test]
    fn kill_sends_sigkill_only_and_says_so() {
        for words in [&["kill", "c"][..], &["kill", "-s", "sigkill", "c"], &["kill", "-s9", "c"]] {
            let words = ["nacelle"].iter().chain(words);
            let Command::Kill { signal, .. } = Arguments::parse_from(words).command else {
                panic!("not a kill")
            };
            assert_eq!(signal, "KILL");
        }
        let words = ["nacelle", "kill", "-s", "HUP", "c"];
        let error = Arguments::try_parse_from(words).unwrap_err().to_string();
        assert!(error.contains("kill -s HUP"), "{error}");
    }

    #[test]
    fn failures_of_run_and_exec_are_told_from_exit_codes_of_containers() {
        let code = |words: &[&str]| {
            let words = ["nacelle"].iter().chain(words);
            Arguments::parse_from(words).command.failure_code()
        };
        assert_eq!(code(&["run", "image"]), 125);
        assert_eq!(code(&["exec", "c", "true"]), 125);
        assert_eq!(code(&["rm", "c"]), 1);
    }
}
