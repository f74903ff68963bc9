//! The running file server of a pod.

use crate::host::process::Process;
use crate::host::share::ShareServer;

#[derive(Debug)]
pub(super) struct FileServer {
    pub(super) shares: ShareServer,
    pub(super) process: Process,
    /// It enforces access per share (`vmm_api::shares::Access`).
    pub(super) checks_access: bool,
}
