//! Saves the VM of a starting pod as a template ([`crate::template`]).

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vmm_api::Request;
use vmm_api::client::{Client, ClientError};

use super::handle::Handle;
use crate::host::blocking;
use crate::template::{Key, Making, Template};

/// Time for the connection on which the agent was seen to listen to close in the guest.
const QUIET_LIMIT: Duration = Duration::from_secs(2);
/// More than the VMM takes to pause its vCPUs and devices, or to give up.
const PAUSE_LIMIT: Duration = Duration::from_secs(15);
const QUIET_POLL: Duration = Duration::from_millis(10);

/// Saves the VM, whose agent listens and has received no request. Whatever happens, the VM runs
/// again afterwards, or the error says that it does not.
pub(super) async fn save_template(handle: &Handle, making: Making) -> Result<(), anyhow::Error> {
    handle.guest.drop_first_connection();
    let control = handle.paths.control.clone();
    let limit = handle.node.config.vmm_call_deadline().max(PAUSE_LIMIT);
    blocking(move || {
        let template = save(&control, limit, making.key())?;
        tracing::info!(bytes = template.bytes(), "saved a VM as a template");
        making.finish(template);
        Ok(())
    })
    .await
}

fn save(control: &Path, limit: Duration, key: &Key) -> anyhow::Result<Template> {
    let saved = try_to_save(control, limit, key);
    if saved.is_err() {
        // Whatever has failed, also a reply that came too late: the VM must not stay paused.
        let client = Client::connect(control, limit)?;
        client.order(&Request::Resume).context("cannot resume the VM")?;
    }
    saved
}

fn try_to_save(control: &Path, limit: Duration, key: &Key) -> anyhow::Result<Template> {
    let client = Client::connect(control, limit)?;
    let state = memfd_create(c"vm-state", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let state = File::from(state);
    let end = Instant::now() + QUIET_LIMIT;
    loop {
        client.order(&Request::Pause)?;
        let saved = match client.snapshot(state.as_fd()) {
            Ok(memory) => Ok(Template::copy(key, &state, &memory)),
            Err(error) => Err(error),
        };
        client.order(&Request::Resume).context("cannot resume the VM")?;
        match saved {
            Ok(template) => return template.context("cannot copy the saved VM"),
            // A connection is still open.
            Err(ClientError::Refused(_)) if Instant::now() < end => {
                std::thread::sleep(QUIET_POLL);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
