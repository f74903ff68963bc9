//! The verbs of CNI plugins and how they fail.

use std::path::PathBuf;

use super::conf::SpecVersion;
use super::exec::ExecError;
use super::reply::{Failure, code};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    #[error(
        "the network {network:?} needs the CNI plugin {kind:?}, which is in none of {} \
         (for the standard plugins: apt install containernetworking-plugins)", paths(.searched)
    )]
    Missing { network: String, kind: String, searched: Vec<PathBuf> },
    #[error("CNI plugin {kind:?}, {verb}", verb = .verb.as_str())]
    Exec { kind: String, verb: Verb, source: ExecError },
    #[error("CNI plugin {kind:?} failed at {verb}: {failure}{output}", verb = .verb.as_str())]
    Failed { kind: String, verb: Verb, failure: Failure, output: String },
    #[error("CNI plugin {kind:?} failed at {verb} without an error message: {status}{output}",
        verb = .verb.as_str())]
    NoMessage { kind: String, verb: Verb, status: std::process::ExitStatus, output: String },
    #[error("CNI plugin {kind:?} printed an invalid reply to {verb}: {problem}", verb = .verb.as_str())]
    InvalidReply { kind: String, verb: Verb, problem: String },
    #[error(
        "CNI plugin {kind:?} ({}) does not support the network's cniVersion {version}, only {}",
        .binary.display(), .supported.join(", ")
    )]
    Version { kind: String, binary: PathBuf, version: SpecVersion, supported: Vec<String> },
}

impl PluginError {
    /// Whether the plugin returned "try again later".
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Failed { failure, .. } if failure.code == code::TRY_AGAIN_LATER)
    }
}

fn paths(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}
