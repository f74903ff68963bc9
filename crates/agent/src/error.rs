//! What can go wrong in the guest, as the callers may want to tell apart. `service` alone maps
//! these to gRPC codes.

use std::io;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {id:?} does not exist")]
    NotFound { what: &'static str, id: String },
    #[error("{what} {id:?} exists already")]
    Exists { what: &'static str, id: String },
    #[error("{field}: {why}")]
    Invalid { field: &'static str, why: String },
    #[error("{0}")]
    Precondition(String),
    /// The program of a container or an exec could not be run.
    #[error("{message}")]
    Command { missing: bool, message: String },
    #[error("{what}: the limit is {limit}")]
    Exhausted { what: &'static str, limit: u64 },
    #[error("{doing} has not finished in {} s", after.as_secs())]
    Deadline { doing: String, after: Duration },
    /// A file system of the container does not answer, and as many threads wait for it as may.
    #[error("{doing}: {threads} earlier calls wait for a file system that does not answer")]
    Hung { doing: String, threads: usize },
    #[error("{doing}")]
    Os { doing: String, source: io::Error },
    #[error("{doing}: {why}")]
    Helper { doing: &'static str, why: String },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn invalid(field: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { field, why: why.into() }
    }

    pub fn container(id: &str) -> Self {
        Self::NotFound { what: "container", id: id.to_owned() }
    }

    /// Whether the operating system said this errno.
    pub fn is_errno(&self, errno: nix::errno::Errno) -> bool {
        matches!(self, Self::Os { source, .. } if source.raw_os_error() == Some(errno as i32))
    }

    /// The error and its sources in one line.
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

/// Says what was being done when the operating system refused.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Os { doing: what(), source: source.into() })
    }
}
