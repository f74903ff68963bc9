//! Errors of the agent, by the distinctions that callers need. Only `service` maps them to gRPC
//! codes.

use std::io;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {id:?} does not exist")]
    NotFound { what: &'static str, id: String },
    #[error("{what} {id:?} exists already")]
    Exists { what: &'static str, id: String },
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("{0}")]
    Precondition(String),
    /// The program of a container or an exec could not be executed.
    #[error("{message}")]
    Command { missing: bool, message: String },
    #[error("{what}: the limit is {limit}")]
    Exhausted { what: &'static str, limit: u64 },
    #[error("{operation} has not finished in {} s", after.as_secs())]
    Deadline { operation: String, after: Duration },
    /// A file system of the container does not answer, and the maximum number of threads is blocked
    /// in it.
    #[error("{operation}: {threads} earlier calls wait for a file system that does not answer")]
    Hung { operation: String, threads: usize },
    #[error("{operation}")]
    Os { operation: String, source: io::Error },
    #[error("{operation}: {reason}")]
    Helper { operation: &'static str, reason: String },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    pub fn container(id: &str) -> Self {
        Self::NotFound { what: "container", id: id.to_owned() }
    }

    /// Whether the error is this errno.
    pub fn is_errno(&self, errno: nix::errno::Errno) -> bool {
        matches!(self, Self::Os { source, .. } if source.raw_os_error() == Some(errno as i32))
    }

    /// The error and its sources, joined by `: `.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

/// Adds the failed operation to an operating system error.
pub trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Os { operation: what(), source: source.into() })
    }
}
