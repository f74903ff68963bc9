//! `nacelle`: looks at pods and runs containers, over nacelled's socket. One verb a file.

mod arguments;
mod check;
mod connect;
mod console;
mod exec;
mod find;
mod images;
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

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use arguments::{Arguments, Command};
use connect::Client;

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting threads")
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let outcome = runtime.block_on(dispatch(arguments));
    // A thread may still wait for a key.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // Somebody who reads only the beginning of our output (`| head`) is no failure.
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("nacelle: {error:#}");
    ExitCode::FAILURE
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { socket, output, command } = arguments;
    match command {
        Command::Check(check) => return check::check(socket.as_deref(), check, output).await,
        Command::Run(options) => return run::run(socket.as_deref(), options).await,
        _ => {}
    }
    let client = Client::connect(socket.as_deref()).await;
    if let Command::Version = command {
        return list::version(client.ok(), output).await;
    }
    let mut client = client?;
    match command {
        Command::Check(_) | Command::Run(_) | Command::Version => {}
        Command::RunPod(options) => run::run_pod(&mut client, options).await?,
        Command::Pull { image, username, password } => {
            images::pull(&mut client, &image, username, password).await?;
        }
        Command::Images => images::list(&mut client, output).await?,
        Command::Rmi { images } => images::remove(&mut client, &images).await?,
        Command::Import { path, name } => images::import(&mut client, &path, name).await?,
        Command::Pods => list::pods(&mut client, output).await?,
        Command::Ps { all } => list::containers(&mut client, all, output).await?,
        Command::Logs(options) => logs::logs(&mut client, options).await?,
        Command::Exec(options) => return exec::exec(&mut client, options).await,
        Command::Stats => stats::stats(&mut client, output).await?,
        Command::Stop { names, time } => remove::stop(&mut client, &names, time).await?,
        Command::Rm { names, force } => remove::remove(&mut client, &names, force).await?,
        Command::Console { pod, follow } => console::console(&mut client, &pod, follow).await?,
        Command::Trace { pod } => trace::trace(&mut client, &pod, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}
