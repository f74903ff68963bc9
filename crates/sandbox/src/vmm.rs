//! A pod's VMM: its configuration, control socket and exit status.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use vmm_api::client::{Client, ClientError};
use vmm_api::{DiskConfig, ExitReason, Fd, NetConfig, Reply, Request, VmExit, VmStatus};

use crate::error::Error;
use crate::failpoint::Failpoints;
use crate::host::blocking;
use crate::observe::DeathCause;

/// A status file is one small object; a compromised VMM may write more.
const MAX_STATUS: u64 = 64 << 10;
/// Bytes of console output in an exit reason.
const TAIL: usize = 1024;

/// Client of one VMM's control socket; each call has its own connection and deadline.
#[derive(Debug, Clone)]
pub(crate) struct Vmm {
    control: PathBuf,
    limit: Duration,
    failpoints: Failpoints,
}

impl Vmm {
    pub(crate) fn new(control: PathBuf, limit: Duration, failpoints: Failpoints) -> Self {
        Self { control, limit, failpoints }
    }

    async fn call(&self, request: Request, fd: Option<OwnedFd>) -> Result<Reply, ClientError> {
        let (control, limit) = (self.control.clone(), self.limit);
        blocking(move || {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            Client::connect(&control, limit)?.call(&request, &fds)
        })
        .await
    }

    pub(crate) async fn status(&self) -> Result<VmStatus, Error> {
        match self.call(Request::Status, None).await {
            Ok(Reply::Status(status)) => Ok(status),
            Ok(got) => Err(Error::unavailable(format!("VMM answered {got:?} to a status request"))),
            Err(e) => Err(failed("status", e)),
        }
    }

    /// Hot-plugs a disk; one that is plugged already is no error.
    pub(crate) async fn add_disk(
        &self,
        serial: &str,
        file: File,
        read_only: bool,
    ) -> Result<(), Error> {
        let disk = DiskConfig { serial: serial.to_owned(), file: Fd(-1), read_only };
        let plugged = async {
            match self.call(Request::AddDisk { disk }, Some(file.into())).await {
                Ok(_) | Err(ClientError::Refused(vmm_api::Error::Exists { .. })) => Ok(()),
                Err(ClientError::Refused(e @ vmm_api::Error::BusFull { .. })) => {
                    Err(Error::ResourceExhausted { message: e.to_string() })
                }
                Err(e) => Err(failed("plug a disk", e)),
            }
        };
        self.failpoints.wrap("VMM: plug a disk", plugged).await
    }

    /// Hot-plugs a network interface backed by `tap`; one that is plugged already is no error.
    pub(crate) async fn add_net(
        &self,
        id: &str,
        mac: [u8; 6],
        mtu: u16,
        tap: OwnedFd,
    ) -> Result<(), Error> {
        let net = NetConfig { id: id.to_owned(), tap: Fd(-1), mac, mtu };
        let plugged = async {
            match self.call(Request::AddNet { net }, Some(tap)).await {
                Ok(_) | Err(ClientError::Refused(vmm_api::Error::Exists { .. })) => Ok(()),
                Err(ClientError::Refused(e @ vmm_api::Error::BusFull { .. })) => {
                    Err(Error::ResourceExhausted { message: e.to_string() })
                }
                Err(e) => Err(failed("plug a network interface", e)),
            }
        };
        self.failpoints.wrap("VMM: plug a network interface", plugged).await
    }

    /// Hot-plugs a file system with the vhost-user connection `backend`; one that is plugged
    /// already is no error and keeps its backend. The guest finds it by `tag` after a PCI rescan.
    pub(crate) async fn add_fs(&self, id: &str, tag: &str, backend: OwnedFd) -> Result<(), Error> {
        let request = Request::AddFs { id: id.to_owned(), tag: tag.to_owned() };
        let plugged = async {
            match self.call(request, Some(backend)).await {
                Ok(_) | Err(ClientError::Refused(vmm_api::Error::Exists { .. })) => Ok(()),
                Err(ClientError::Refused(e @ vmm_api::Error::BusFull { .. })) => {
                    Err(Error::ResourceExhausted { message: e.to_string() })
                }
                Err(e) => Err(failed("plug a file system", e)),
            }
        };
        self.failpoints.wrap("VMM: plug a file system", plugged).await
    }

    /// Requests this memory size; returns before the guest has plugged or unplugged it.
    pub(crate) async fn resize_memory(&self, memory_mib: u32) -> Result<(), Error> {
        let resized = async {
            match self.call(Request::ResizeMemory { memory_mib }, None).await {
                Ok(_) => Ok(()),
                Err(ClientError::Refused(e @ vmm_api::Error::Memory { .. })) => {
                    Err(Error::OutOfRange { message: e.to_string() })
                }
                Err(e) => Err(failed("resize memory", e)),
            }
        };
        self.failpoints.wrap("VMM: resize memory", resized).await
    }

    /// Unplugs a device; a missing one is no error.
    pub(crate) async fn remove_device(&self, id: &str) -> Result<(), Error> {
        let unplugged = async {
            match self.call(Request::RemoveDevice { id: id.to_owned() }, None).await {
                Ok(_) | Err(ClientError::Refused(vmm_api::Error::NoSuchDevice { .. })) => Ok(()),
                Err(e) => Err(failed("unplug a device", e)),
            }
        };
        self.failpoints.wrap("VMM: unplug a device", unplugged).await
    }
}

fn failed(what: &str, error: ClientError) -> Error {
    match error {
        ClientError::Deadline { limit } => Error::Deadline { what: format!("VMM: {what}"), limit },
        ClientError::Connect { .. } | ClientError::Transport(_) => {
            Error::unavailable(format!("VMM: {what}: {:#}", anyhow::Error::new(error)))
        }
        other => Error::Internal(anyhow::Error::new(other).context(format!("VMM: {what}"))),
    }
}

/// Serial of a disk: at most 20 ASCII bytes (virtio 1.2, 5.2.6.1: VIRTIO_BLK_T_GET_ID), so it is a
/// hash of the name.
pub(crate) fn serial(prefix: char, name: &[u8]) -> String {
    let digest = Sha256::digest(name);
    let hex: String = digest.iter().take(9).map(|b| format!("{b:02x}")).collect();
    format!("{prefix}{hex}")
}

/// Cause and reason of a VM's exit. `status` is the file that the VMM writes on exit; None: it was
/// killed first.
pub(crate) fn exit_reason(status: &Path) -> Option<(DeathCause, String)> {
    let exit = read_exit(status)?;
    let (cause, what) = match exit.reason {
        ExitReason::Shutdown => (DeathCause::Shutdown, "the guest powered off"),
        ExitReason::Reset => (DeathCause::Reset, "the guest reset itself"),
        ExitReason::Panic => (DeathCause::Panic, "the guest's kernel panicked"),
        ExitReason::Killed => (DeathCause::Terminated, "the VMM received a kill request"),
        ExitReason::TripleFault => (DeathCause::TripleFault, "a vCPU triple-faulted"),
        ExitReason::Error => (DeathCause::Error, "the VMM failed"),
    };
    let mut text = what.to_owned();
    if !exit.message.is_empty() {
        text.push_str(": ");
        text.push_str(&clean(&exit.message, TAIL));
    }
    if matches!(exit.reason, ExitReason::Panic | ExitReason::TripleFault | ExitReason::Error)
        && !exit.console_tail.is_empty()
    {
        text.push_str("; console: ");
        text.push_str(&clean(&exit.console_tail, TAIL));
    }
    Some((cause, text))
}

fn read_exit(path: &Path) -> Option<VmExit> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_STATUS).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The last `limit` bytes of a guest's text, with control characters replaced.
pub(crate) fn clean(text: &str, limit: usize) -> String {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let kept = text[start..].trim();
    kept.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_fits_into_a_virtio_id_and_differs_per_disk() {
        let a = serial('e', b"/images/a");
        assert!(a.len() <= 20 && a.is_ascii(), "{a}");
        assert_ne!(a, serial('e', b"/images/b"));
        assert_ne!(a, serial('s', b"/images/a"));
    }

    #[test]
    fn a_panic_has_the_console_tail_in_its_reason_and_an_invalid_status_has_no_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status");
        let exit = VmExit {
            reason: ExitReason::Panic,
            message: "Kernel panic - not syncing".into(),
            console_tail: format!("{}é\x1b[31mlast line\n", "x".repeat(2000)),
        };
        std::fs::write(&path, serde_json::to_vec(&exit).unwrap()).unwrap();
        let (cause, text) = exit_reason(&path).unwrap();
        assert_eq!(cause, DeathCause::Panic);
        assert!(text.starts_with("the guest's kernel panicked: Kernel panic"), "{text}");
        assert!(text.ends_with("?[31mlast line") && text.len() < 2 * TAIL + 200, "{text}");
        std::fs::write(&path, "{").unwrap();
        assert_eq!(exit_reason(&path), None);
    }
}
