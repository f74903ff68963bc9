//! `nacelle exec`.

use std::process::ExitCode;

use anyhow::Result;

use super::arguments::Exec;
use super::connect::Client;
use super::session::{self, Carry};
use super::{find, run};
use crate::api::ExecStart;
use crate::api::session_input::Input;

pub(super) async fn exec(client: &mut Client, options: Exec) -> Result<ExitCode> {
    let container = find::container(client, &options.container).await?;
    let carry = Carry { stdin: options.interactive, tty: options.tty };
    let mut env = run::environment(&options.env)?;
    if options.tty && !env.iter().any(|entry| entry.starts_with("TERM=")) {
        env.extend(std::env::var("TERM").ok().map(|term| format!("TERM={term}")));
    }
    let (sender, inputs) = session::inputs(Input::Start(ExecStart {
        container: container.id,
        command: options.command,
        tty: options.tty,
        stdin: options.interactive,
        env,
        user: options.user.unwrap_or_default(),
        cwd: options.workdir.unwrap_or_default(),
        size: session::window_size().filter(|_| options.tty),
    }));
    let reply = client.debug.exec(inputs).await;
    session::drive(sender, reply, carry).await.map(run::exit_code)
}
