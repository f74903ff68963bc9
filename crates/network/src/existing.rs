//! A network namespace that somebody else has made and connected: what stands in it is joined to taps,
//! and parted from them again. No plugin runs and nothing is recorded: all that is left by a caller
//! who died is found in the namespace itself.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use tokio::task::spawn_blocking;

use crate::host::Error;
use crate::model::{Attachment, Dns};
use crate::netns;
use crate::nic::{self, NicError};
use crate::plugin::reply::Success;

/// The interface that is looked for first.
const PRIMARY: &str = "eth0";

/// Joins what is in the namespace at `path` to taps. Without any interface there is nothing to be
/// joined: the pod has no network. Whatever an earlier call left is taken away first.
pub async fn attach(path: PathBuf) -> Result<Attachment, Error> {
    blocking(move || netns::run_in_netns(&path, || join(&path))).await
}

/// Opens the tap of each interface, in the order of [`Attachment::interfaces`].
pub async fn open_taps(path: PathBuf, attachment: Attachment) -> Result<Vec<OwnedFd>, Error> {
    blocking(move || netns::run_in_netns(&path, || nic::open_taps(&attachment.interfaces))).await
}

/// Takes the taps away and leaves the namespace as it was. Fine when it has gone.
pub async fn detach(path: PathBuf) -> Result<(), Error> {
    blocking(move || {
        if !netns::is_mounted(&path) {
            return Ok(());
        }
        netns::run_in_netns(&path, nic::disconnect_taps)
    })
    .await
}

fn join(path: &Path) -> Result<Attachment, NicError> {
    nic::disconnect_taps()?;
    let success = Success {
        raw: serde_json::Value::Null,
        interfaces: Vec::new(),
        ips: Vec::new(),
        routes: Vec::new(),
        dns: Dns::default(),
    };
    match nic::connect_taps(path, PRIMARY, &success) {
        Err(NicError::NoInterface { .. }) => {
            Ok(Attachment { netns: path.to_owned(), ..Default::default() })
        }
        result => result,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NicError> + Send + 'static,
) -> Result<T, Error> {
    match spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::Panicked),
    }
}
