//! The version of the format, and why a record cannot be read.

/// Version of this format. A record of another version is unreadable; its pod is shown as not
/// ready.
pub(super) const VERSION: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BadRecord {
    #[error("record has version {got}, this release reads version {VERSION}")]
    Version { got: u32 },
    #[error("record is not valid")]
    Json(#[from] serde_json::Error),
    #[error("OCI {what} of container {container} is not valid")]
    Oci { what: &'static str, container: String, source: serde_json::Error },
}
