//! The crate's error type.

use std::path::PathBuf;

use crate::netns::NetnsError;
use crate::nic::NicError;
use crate::plugin::conf::ConfError;
use crate::plugin::error::PluginError;
use crate::plugin::params::PodError;
use crate::record::RecordError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("CNI GC is not run, because not all pods of the network are known: {problem}")]
    IncompletePodList { problem: String },
    #[error("the stored result of the plugins is damaged: {problem}")]
    Result { problem: String },
    #[error("cannot remove the libcni cache file of the pod in {}", .dir.display())]
    Results { dir: PathBuf, source: std::io::Error },
    #[error("the pod {id} is not attached to a network")]
    Unattached { id: String },
    /// All errors of a clean-up, which continues after failures.
    #[error("{}", join_errors(.0))]
    Several(Vec<Error>),
    #[error("cancelled while it waited for other pods")]
    Cancelled,
    #[error("the worker thread of a network operation panicked")]
    Panicked,
    #[error("the process is shutting down; the network operation was not started")]
    ShuttingDown,
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        if error.is_panic() { Self::Panicked } else { Self::ShuttingDown }
    }
}

impl Error {
    /// Whether a retry may succeed without a change of configuration.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Plugin(e) => e.is_temporary(),
            Self::Several(all) => all.iter().all(Self::is_temporary),
            _ => false,
        }
    }

    pub(crate) fn all(mut errors: Vec<Error>) -> Result<(), Error> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

fn join_errors(errors: &[Error]) -> String {
    errors.iter().map(|e| with_causes(e)).collect::<Vec<_>>().join("; and ")
}

/// The error and its sources, joined by `: `.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
