//! CRI requests to the life cycle's own types, and views back to CRI answers. Pure, apart from
//! looking at host paths that a request names.
//!
//! Refused, because a pod in a microVM has no part in the host or because it is not there yet:
//! host namespaces, user namespaces, devices and CDI, writable host mounts, mount propagation,
//! image volumes, SELinux labels, AppArmor profiles of the host, huge pages, Windows.

pub mod container;
pub mod image;
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
pub mod time;

/// A request that is not carried out: what about it, and why.
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

    /// The same refusal with the field's path inside a larger message.
    pub fn inside(self, outer: &str) -> Self {
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
