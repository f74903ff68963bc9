//! A network namespace that another program has created and configured: its interfaces are connected to
//! taps, and disconnected again. No CNI plugin runs and nothing is recorded: taps of a process that died
//! are found in the namespace itself. ARP and IPv6 settings of the interfaces are not restored.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use tokio::task::spawn_blocking;

use crate::error::Error;
use crate::model::{Attachment, Dns};
use crate::netns;
use crate::nic::{self, NicError};
use crate::plugin::reply::Success;

/// Preferred name of the primary interface.
const PRIMARY: &str = "eth0";

/// Connects the interfaces of the namespace at `path` to taps. Without any interface the pod has no
/// network. Taps and redirections of an earlier call are removed first.
/// The network namespace of this process is refused: its interfaces are the host's.
pub async fn attach(path: PathBuf) -> Result<Attachment, Error> {
    run_blocking(move || {
        if is_own_netns(&path) {
            return Err(NicError::OwnNamespace { path });
        }
        netns::run_in_netns(&path, || connect_interfaces(&path))
    })
    .await
}

fn is_own_netns(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    id(path).is_some_and(|found| Some(found) == id(Path::new("/proc/self/ns/net")))
}

/// Opens the tap of each interface, in the order of [`Attachment::interfaces`].
pub async fn open_taps(path: PathBuf, attachment: Attachment) -> Result<Vec<OwnedFd>, Error> {
    let names = attachment.interface_names();
    run_blocking(move || netns::run_in_netns(&path, || nic::open_taps(&names))).await
}

/// Removes the taps and redirections. Succeeds if the namespace does not exist.
pub async fn detach(path: PathBuf) -> Result<(), Error> {
    run_blocking(move || {
        if !netns::is_mounted(&path) {
            return Ok(());
        }
        netns::run_in_netns(&path, nic::disconnect_taps)
    })
    .await
}

fn connect_interfaces(path: &Path) -> Result<Attachment, NicError> {
    nic::check_taps_unused()?;
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

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NicError> + Send + 'static,
) -> Result<T, Error> {
    Ok(spawn_blocking(work).await??)
}
