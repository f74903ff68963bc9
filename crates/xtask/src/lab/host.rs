//! Running a command on this host, with the same names as in the lab: `/nacelle/bin` first in
//! PATH becomes the folder that cargo built into, `/nacelle/guest` and `/nacelle/images` become
//! variables.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::status::STATUS_LAB_FAILED;
use crate::{paths, run};

pub(super) fn run(command: &str, folder: Option<&Path>) -> Result<i32> {
    // The lab's image has what a node has; a host may lack CNI plugins or the registry.
    run::quiet(Command::new(paths::repo().join("crates/xtask/host/deps.sh")).arg("node"))?;
    let vmm = paths::newest_binary("nacelle-vmm").context("nacelle-vmm is not built")?;
    let binaries = vmm.parent().context("a binary lies in a folder")?;
    let path = env::var("PATH").unwrap_or_default();
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(command);
    bash.env("PATH", format!("{}:{path}", binaries.display()));
    bash.env("NACELLE_GUEST", paths::guest());
    bash.env("NACELLE_IMAGES", paths::images());
    if let Some(folder) = folder {
        bash.current_dir(folder);
    }
    let status = bash.status().context("starting bash")?;
    Ok(status.code().unwrap_or(STATUS_LAB_FAILED))
}
