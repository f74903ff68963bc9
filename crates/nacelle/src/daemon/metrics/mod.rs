//! Metrics in the Prometheus text format, on a unix socket or a loopback port; off by default.
//!
//! [`Counters`] receives what the crates measure. [`Node`] reads the states of pods and containers and the
//! cached statistics when it is scraped; no scrape calls a guest. docs/metrics.md describes every metric,
//! and a test compares it with what is served.

mod counters;
mod node;
mod process;
mod server;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub(super) use counters::Counters;
pub(super) use node::Node;
pub(super) use server::Server;

/// All metrics of the daemon.
pub(super) fn registry(counters: &Counters, node: Node) -> Arc<Registry> {
    let mut registry = Registry::default();
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    registry.register("nacelle_build", "Version of nacelled; the value is 1", Info::new(version));
    counters.register(&mut registry);
    registry.register_collector(Box::new(node));
    registry.register_collector(Box::new(process::Process));
    Arc::new(registry)
}
