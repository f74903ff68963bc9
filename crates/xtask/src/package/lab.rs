//! `make package-test`: installs, upgrades and removes the Debian packages in a lab that runs a bare
//! Debian 12 with systemd. The steps are in `tests/packages/test.sh`.

use std::process::Command;

use anyhow::{Context, Result};

use super::Kind;
use crate::paths;

/// Sorts after the version of the workspace.
const UPGRADE: &str = concat!(env!("CARGO_PKG_VERSION"), "+upgrade1");

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds that the test may take
    #[arg(long, default_value_t = 2400)]
    timeout: u64,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let scratch = tempfile::Builder::new().prefix("nacelle-packages-").tempdir()?;
    for (folder, version) in [("old", env!("CARGO_PKG_VERSION")), ("new", UPGRADE)] {
        let args = super::Args {
            version: version.to_owned(),
            out: Some(scratch.path().join(folder)),
            fast: true,
        };
        super::build(&args, Kind::Deb)?;
    }
    let mut lab = Command::new(std::env::current_exe().context("this program's own path")?);
    lab.args(["lab", "--systemd", "--bare", "--boot-timeout", "300", "--timeout"]);
    lab.arg(args.timeout.to_string()).arg("--share").arg(scratch.path());
    for input in [paths::images().join("busybox"), paths::repo().join("tests/packages/test.sh")] {
        lab.arg("--in").arg(input);
    }
    let status = lab.args(["--", "bash test.sh"]).status().context("starting the lab")?;
    Ok(status.code().unwrap_or(crate::lab::STATUS_LAB_FAILED))
}
