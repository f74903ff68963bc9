//! The crate's error type; [`Error::kind`] classifies errors for mapping to a protocol.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::erofs::DataError;
use crate::layer::LayerError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{reference:?} is not a valid image reference: {reason}")]
    InvalidReference { reference: String, reason: &'static str },
    #[error("registry {registry} has no {what}")]
    NotFound { registry: String, what: String },
    #[error(
        "registry {registry} denies access to {repository}: {detail}; check the name and the \
         credentials"
    )]
    Denied { registry: String, repository: String, detail: String },
    #[error("registry {registry} returned status {status} for {url}: {detail}")]
    Status { registry: String, url: String, status: u16, detail: String },
    #[error("registry {registry} cannot be reached")]
    Transport { registry: String, source: reqwest::Error },
    #[error("registry {registry} sent no data for {seconds} s ({what})")]
    Stalled { registry: String, what: String, seconds: u64 },
    #[error("registry {registry} violated the protocol: {reason}")]
    Protocol { registry: String, reason: String },
    #[error("registry {registry} cannot be used: {reason}")]
    RegistryConfig { registry: String, reason: String },
    #[error("{what} has digest {got}, expected {expected}")]
    DigestMismatch { what: String, expected: Digest, got: Digest },
    #[error("{what} is {got} bytes long, expected {expected} from its descriptor")]
    SizeMismatch { what: String, expected: u64, got: u64 },
    #[error("{what} is {got}, more than the limit of {limit} ({setting})")]
    TooLarge { what: String, got: u64, limit: u64, setting: &'static str },
    #[error("{what} is not valid: {reason}")]
    InvalidImage { what: String, reason: String },
    #[error("{reference} has no image for linux/amd64; available: {offered}")]
    NoPlatform { reference: String, offered: String },
    #[error("layer {digest} cannot be used")]
    Layer { digest: Digest, source: LayerError },
    #[error("no space left for {}", path.display())]
    StorageFull { path: PathBuf, source: io::Error },
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is in use by another process", root.display())]
    InUse { root: PathBuf },
    #[error("{} is damaged: {reason}", path.display())]
    Record { path: PathBuf, reason: String },
    #[error(
        "{} has format {found}, this version of nacelle knows formats up to {known}",
        path.display()
    )]
    RecordVersion { path: PathBuf, found: u64, known: u64 },
    #[error("{} is neither an OCI layout nor a docker archive: {reason}", path.display())]
    NotAnArchive { path: PathBuf, reason: String },
    #[error("{what} could not be fetched from any host: {}", list(tried))]
    Endpoints { what: String, tried: Vec<(String, Error)> },
    #[error("credentials: the auth field is not base64 of \"user:password\"")]
    MalformedAuth,
    #[error("the pull was cancelled")]
    Cancelled,
    #[error(transparent)]
    Shared(Arc<Error>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    InvalidArgument,
    NotFound,
    PermissionDenied,
    /// A retry may succeed.
    Unavailable,
    DeadlineExceeded,
    /// The disk is full.
    ResourceExhausted,
    /// The image is invalid, malicious, or exceeds a limit.
    BadImage,
    Cancelled,
    Internal,
}

impl Error {
    /// The original error if several callers share it.
    pub fn inner(&self) -> &Self {
        match self {
            Self::Shared(inner) => inner.inner(),
            own => own,
        }
    }

    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidReference { .. } | Self::NotAnArchive { .. } | Self::MalformedAuth => {
                ErrorKind::InvalidArgument
            }
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Denied { .. } => ErrorKind::PermissionDenied,
            Self::Status { .. } | Self::Transport { .. } | Self::Protocol { .. } => {
                ErrorKind::Unavailable
            }
            Self::Stalled { .. } => ErrorKind::DeadlineExceeded,
            Self::DigestMismatch { .. }
            | Self::SizeMismatch { .. }
            | Self::TooLarge { .. }
            | Self::InvalidImage { .. }
            | Self::NoPlatform { .. }
            | Self::Layer { .. } => ErrorKind::BadImage,
            Self::StorageFull { .. } => ErrorKind::ResourceExhausted,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::RegistryConfig { .. }
            | Self::Io { .. }
            | Self::InUse { .. }
            | Self::Record { .. }
            | Self::RecordVersion { .. } => ErrorKind::Internal,
            Self::Endpoints { tried, .. } => {
                most_specific(tried).map_or(ErrorKind::Internal, Self::kind)
            }
            Self::Shared(inner) => inner.kind(),
        }
    }

    /// Whether a newer release wrote the record, which can read it.
    pub(crate) fn is_newer_version(&self) -> bool {
        matches!(self, Self::RecordVersion { found, known, .. } if found > known)
    }

    /// The content of a store file is invalid. False for errors of this process and for a full
    /// disk, which may be temporary.
    pub(crate) fn is_damage(&self) -> bool {
        use io::ErrorKind as Kind;

        use nix::libc;
        match self {
            Self::Record { .. } | Self::RecordVersion { .. } | Self::DigestMismatch { .. } => true,
            Self::Io { source, .. } => {
                let damage = [libc::EIO, libc::EUCLEAN, libc::EBADMSG, libc::ELOOP];
                let kinds = [Kind::NotFound, Kind::IsADirectory, Kind::NotADirectory];
                source.raw_os_error().is_some_and(|code| damage.contains(&code))
                    || kinds.contains(&source.kind())
            }
            _ => false,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::StorageFull { path, source }
            }
            _ => Self::Io { action, path, source },
        }
    }

    pub(crate) fn layer(digest: Digest, source: LayerError) -> Self {
        if matches!(source, LayerError::Cancelled) {
            return Self::Cancelled;
        }
        match source.host_fault() {
            Some((path, e)) => {
                // The source cannot be moved out, so the error is rebuilt from its code.
                let copy = e.raw_os_error().map_or_else(
                    || io::Error::new(e.kind(), e.to_string()),
                    io::Error::from_raw_os_error,
                );
                Self::io("write", path, copy)
            }
            None => Self::Layer { digest, source },
        }
    }

    pub(crate) fn data(what: &str, source: DataError) -> Self {
        match source {
            DataError::Write { path, source } => Self::io("write", &path, source),
            other => Self::InvalidImage { what: what.into(), reason: other.to_string() },
        }
    }
}

/// The most specific of several hosts' errors: a response outranks a connection error; among equals
/// the last wins, which is the registry itself.
fn most_specific(tried: &[(String, Error)]) -> Option<&Error> {
    let rank = |error: &Error| match error {
        Error::Transport { .. } => 0,
        Error::Stalled { .. } | Error::Status { .. } => 1,
        Error::NotFound { .. } => 2,
        _ => 3,
    };
    tried.iter().map(|(_, error)| error).max_by_key(|error| rank(error))
}

/// Each host with its error and the error's sources.
fn list(tried: &[(String, Error)]) -> String {
    let one = |(place, error): &(String, Error)| {
        let mut text = format!("{place}: {error}");
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    tried.iter().map(one).collect::<Vec<_>>().join("; ")
}
