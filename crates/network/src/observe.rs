//! What is measured of CNI plugins, for an embedder that counts it.

use std::time::Duration;

use crate::plugin::error::{PluginError, Verb};
use crate::plugin::exec::ExecError;

/// Receives measurements. It is called between two plugins, so it must not block.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// A plugin has run, or could not be run. VERSION and STATUS are not reported.
    fn plugin_ran(&self, run: PluginRun<'_>);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PluginRun<'a> {
    /// `type` of the network configuration.
    pub plugin: &'a str,
    pub verb: Verb,
    pub outcome: Outcome,
    pub took: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Failed,
    /// It was killed because it took too long.
    TimedOut,
    /// It was killed because an ADD or DEL waited for it.
    Cancelled,
}

impl Outcome {
    pub(crate) fn of<T>(result: &Result<T, PluginError>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(PluginError::Exec { source: ExecError::Timeout { .. }, .. }) => Self::TimedOut,
            Err(PluginError::Exec { source: ExecError::Interrupted { .. }, .. }) => Self::Cancelled,
            Err(_) => Self::Failed,
        }
    }
}

/// Receives measurements and does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn plugin_ran(&self, _: PluginRun<'_>) {}
}
