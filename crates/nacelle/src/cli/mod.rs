//! `nacelle`: the command line client. One file per verb, or per group of small verbs.
//!
//! Exit codes are docker's: of `run` and `exec` the container's own, 125 when nacelle itself fails,
//! 126 when the command cannot be executed, 127 when it is not found. Other verbs fail with 1, wrong
//! usage with 125.

mod arguments;
mod check;
mod connect;
mod console;
mod exec;
mod find;
mod generate;
mod images;
mod inspect;
mod interrupts;
mod list;
mod logs;
mod private;
mod remove;
mod run;
mod session;
mod stats;
mod table;
mod terminal;
mod trace;
mod volume;
mod wait;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use arguments::{Arguments, Command, OWN_FAILURE};
use connect::{Client, CommandFailed};

pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    let failure = arguments.command.failure_code();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting threads")
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, failure),
    };
    let outcome = runtime.block_on(dispatch(arguments));
    // A thread may still be blocked in a read of standard input.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => fail(&error, failure),
    }
}

/// `--help` and `--version` come here, too.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed standard output is not a failure.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(OWN_FAILURE) } else { ExitCode::SUCCESS }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    if crate::is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    eprintln!("nacelle: {error:#}");
    let command = error.chain().find_map(|cause| cause.downcast_ref::<CommandFailed>());
    ExitCode::from(command.map_or(code, |failed| failed.code))
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { socket, output, command } = arguments;
    match command {
        Command::Check(check) => return check::check(socket.as_deref(), check, output).await,
        Command::Run(options) => return run::run(socket.as_deref(), options).await,
        Command::Completions { shell } => {
            generate::completions(shell)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { dir } => {
            generate::man_pages(&dir)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let client = Client::connect(socket.as_deref()).await;
    if let Command::Version = command {
        return list::version(client.ok(), output).await;
    }
    let mut client = client?;
    match command {
        Command::Check(_)
        | Command::Run(_)
        | Command::Version
        | Command::Completions { .. }
        | Command::Man { .. } => {}
        Command::RunPod(options) => run::run_pod(&mut client, options).await?,
        Command::Pull { image, username, password } => {
            images::pull(&mut client, &image, username, password).await?;
        }
        Command::Images => images::list(&mut client, output).await?,
        Command::Rmi { images } => {
            return each(&images, async |image| images::remove(&mut client, image).await).await;
        }
        Command::Import { path, name } => images::import(&mut client, &path, name).await?,
        Command::Pods => list::pods(&mut client, output).await?,
        Command::Ps { all } => list::containers(&mut client, all, output).await?,
        Command::Inspect { names } => inspect::inspect(&mut client, &names).await?,
        Command::Wait { names } => wait::wait(&mut client, &names).await?,
        Command::Logs(options) => logs::logs(&mut client, options).await?,
        Command::Exec(options) => return exec::exec(&mut client, options).await,
        Command::Stats => stats::stats(&mut client, output).await?,
        Command::Stop { names, time } => {
            return each(&names, async |name| remove::stop(&mut client, name, time).await).await;
        }
        Command::Kill { names, signal: _ } => {
            return each(&names, async |name| remove::kill(&mut client, name).await).await;
        }
        Command::Rm { names, force } => {
            return each(&names, async |name| remove::remove(&mut client, name, force).await).await;
        }
        Command::Console { pod, follow } => console::console(&mut client, &pod, follow).await?,
        Command::Trace { pod } => trace::trace(&mut client, &pod, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Handles each name, also after a failure of another one, and prints those that succeeded.
async fn each(
    names: &[String],
    mut action: impl AsyncFnMut(&str) -> Result<()>,
) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match action(name).await {
            Ok(()) => crate::say(format_args!("{name}"))?,
            Err(error) => code = fail(&error, 1),
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_does_not_keep_later_names_from_being_handled() {
        let names = ["a", "b", "c"].map(String::from);
        let mut seen = Vec::new();
        let code = each(&names, async |name| {
            seen.push(name.to_owned());
            if name == "b" { anyhow::bail!("no such pod or container: b") } else { Ok(()) }
        });
        let code = code.await.unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(1)));
        assert_eq!(seen, ["a", "b", "c"]);
    }

    #[test]
    fn wrong_usage_has_the_code_of_our_own_failures_and_help_has_not() {
        let code = |words: &[&str]| {
            let error = Arguments::try_parse_from(words).unwrap_err();
            format!("{:?}", usage(&error))
        };
        let of = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(code(&["nacelle", "run", "--no-such-option", "image"]), of(125));
        assert_eq!(code(&["nacelle", "no-such-verb"]), of(125));
        assert_eq!(code(&["nacelle", "--help"]), of(0));
    }

    #[test]
    fn a_command_that_cannot_be_started_has_its_own_code() {
        let of = |code: u8| format!("{:?}", ExitCode::from(code));
        let status = tonic::Status::failed_precondition(
            "exec: \"nope\": executable file not found in $PATH",
        );
        let error = connect::call_error(status).context("container c");
        assert_eq!(format!("{:?}", fail(&error, 125)), of(127));
        let error = connect::call_error(tonic::Status::not_found("no container \"c\""));
        assert_eq!(format!("{:?}", fail(&error, 125)), of(125));
    }
}
