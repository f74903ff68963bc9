//! Why a request failed, in the classes that callers act on.

use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no {what} {id:?}")]
    NotFound { what: &'static str, id: String },
    /// The name is taken (by `holder`), or the id is.
    #[error("{what} {name:?} is reserved for {holder:?}")]
    Exists { what: &'static str, name: String, holder: String },
    #[error("{id:?} is the beginning of {count} ids of a {what}")]
    Ambiguous { what: &'static str, id: String, count: usize },
    #[error("{message}")]
    InvalidArgument { message: String },
    #[error("{message}")]
    FailedPrecondition { message: String },
    #[error("{what} took longer than {limit:?}")]
    Deadline { what: String, limit: Duration },
    /// Disk full, or one of our own limits.
    #[error("{message}")]
    ResourceExhausted { message: String },
    /// More than the pod's VM can become.
    #[error("{message}")]
    OutOfRange { message: String },
    /// The guest or its VMM does not answer; may pass.
    #[error("{message}")]
    Unavailable { message: String },
    #[error("nothing listens at port {port} in pod {pod}")]
    NotListening { pod: String, port: u16 },
    #[error("command did not end within {limit:?} and was killed")]
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

    /// An I/O error with what was being done; a full disk keeps its class.
    pub(crate) fn io(what: impl std::fmt::Display, error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::ResourceExhausted { message: format!("{what}: {error}") }
            }
            _ => Self::Internal(anyhow::Error::new(error).context(what.to_string())),
        }
    }
}
