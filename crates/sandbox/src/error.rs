//! Errors by class, as callers act on them.

use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no {what} {id:?}")]
    NotFound { what: &'static str, id: String },
    /// The name is reserved by `holder`, or the id exists.
    #[error("{what} {name:?} is reserved for {holder:?}")]
    Exists { what: &'static str, name: String, holder: String },
    #[error("{what} id prefix {id:?} is ambiguous: {count} matches")]
    Ambiguous { what: &'static str, id: String, count: usize },
    #[error("{message}")]
    InvalidArgument { message: String },
    #[error("{message}")]
    FailedPrecondition { message: String },
    #[error("{what} took longer than {limit:?}")]
    Deadline { what: String, limit: Duration },
    /// Disk full, or a configured limit reached.
    #[error("{message}")]
    ResourceExhausted { message: String },
    /// More than the pod's VM can be resized to.
    #[error("{message}")]
    OutOfRange { message: String },
    /// The guest or its VMM does not answer. The caller may retry.
    #[error("{message}")]
    Unavailable { message: String },
    #[error("connection to port {port} in pod {pod} refused")]
    NotListening { pod: String, port: u16 },
    #[error("command timed out after {limit:?} and was killed")]
    ExecTimeout { limit: Duration },
    #[error("{what} was cancelled")]
    Cancelled { what: &'static str },
    #[error("{message}")]
    Unsupported { message: String },
    #[error("{0:#}")]
    Internal(#[from] anyhow::Error),
}

impl Error {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::InvalidArgument { message: message.into() }
    }

    pub(crate) fn precondition(message: impl Into<String>) -> Self {
        Self::FailedPrecondition { message: message.into() }
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable { message: message.into() }
    }

    /// An I/O error with its operation; ENOSPC and EDQUOT become [`Self::ResourceExhausted`].
    pub(crate) fn io(what: impl std::fmt::Display, error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::ResourceExhausted { message: format!("{what}: {error}") }
            }
            _ => Self::Internal(anyhow::Error::new(error).context(what.to_string())),
        }
    }
}
