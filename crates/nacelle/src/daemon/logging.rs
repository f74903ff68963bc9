//! Logs to standard error, as text or as JSON.

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::settings::{Log, LogFormat};

pub(super) fn filter(level: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(level).with_context(|| format!("log level {level:?}"))
}

pub(super) fn start(log: &Log) -> Result<()> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(&log.level)?)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    let started = match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("starting the log: {error}"))
}
