//! CRI requests to the life cycle's own types, and views back to CRI answers. Pure, apart from
//! looking at host paths that a request names.
//!
//! Rejected, because a pod in a microVM has no access to the host or because it is not implemented:
//! character devices of the host and CDI, sockets of the host, mounts that appear on the host,
//! SELinux labels where the host has SELinux, huge pages, Windows. Pods with namespaces of the host
//! have no VM ([`host_pod`]), so they have these devices, sockets and mounts.

use std::collections::BTreeMap;

pub mod container;
mod container_path;
pub mod devices;
pub mod host_pod;
pub mod image;
pub mod metrics;
mod mountinfo;
pub mod mounts;
pub mod pod;
pub mod process;
pub mod resources;
pub mod seccomp;
mod seccomp_table;
pub mod security;
pub mod signal;
pub mod stats;
pub mod status;
#[cfg(test)]
mod tests;
pub mod time;
pub mod userns;

/// A rejected request: the field and the reason.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request contradicts itself or the interface.
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// A sound request that nacelle cannot carry out.
    #[error("{field}: {reason}")]
    Unsupported { field: String, reason: String },
}

impl Refusal {
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    pub fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.into() }
    }

    /// The same error with the field's path prefixed by the outer message's.
    pub fn in_field(self, outer: &str) -> Self {
        match self {
            Self::Invalid { field, reason } => {
                Self::Invalid { field: format!("{outer}.{field}"), reason }
            }
            Self::Unsupported { field, reason } => {
                Self::Unsupported { field: format!("{outer}.{field}"), reason }
            }
        }
    }
}

/// An enum's value from its number on the wire.
pub(crate) fn known<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T, Refusal> {
    T::try_from(value).map_err(|_| Refusal::invalid(field, format!("{value} has no meaning")))
}

/// Labels and annotations of one pod or container, bytes. They are written to the journal and given
/// back with every listing; Kubernetes' own limit is 256 KiB for annotations.
const MAX_META: usize = 1 << 20;
/// A name; Kubernetes' own limit is 253 characters.
const MAX_NAME: usize = 1024;

pub(crate) fn check_meta(
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> Result<(), Refusal> {
    for (field, map) in [("labels", labels), ("annotations", annotations)] {
        let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        if size > MAX_META {
            return Err(Refusal::invalid(
                field,
                format!("{size} bytes; at most {MAX_META} are taken"),
            ));
        }
    }
    Ok(())
}

/// Names are shown to people and passed to CNI plugins; they are no paths.
pub(crate) fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    if name.len() > MAX_NAME {
        return Err(Refusal::invalid(
            field,
            format!("{} bytes; at most {MAX_NAME} are taken", name.len()),
        ));
    }
    if name.chars().any(|c| c == '/' || c == ';' || c.is_control()) {
        return Err(Refusal::invalid(
            field,
            format!("{name:?} holds a slash, a semicolon or a control character"),
        ));
    }
    Ok(())
}
