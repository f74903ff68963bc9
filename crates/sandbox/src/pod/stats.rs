//! Keeps a pod's usage fresh in the cache, so that no listing waits for a guest.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::stats::{ContainerStatsView, CpuView, FsView, InterfaceView, MemoryView, PodStatsView};

const POLL_LIMIT: Duration = Duration::from_secs(2);
/// A reader that finds the cache empty waits this long.
const FIRST_LIMIT: Duration = Duration::from_millis(500);
/// Entries taken from a guest's answer: a hostile one may send as many as a message holds.
const MAX_ENTRIES: usize = 1024;

pub(super) async fn poll(handle: Arc<Handle>) {
    let interval = handle.node.config.stats_interval().max(Duration::from_millis(50));
    // Pods that started together are not to be measured together for ever.
    let jitter = RandomState::new().hash_one(&handle.id) % 1000;
    tokio::time::sleep(interval.mul_f64(jitter as f64 / 1000.0)).await;
    loop {
        if let Err(error) = handle.measure(POLL_LIMIT).await {
            tracing::debug!(pod = handle.id, %error, "no stats");
        }
        tokio::time::sleep(interval).await;
    }
}

impl Handle {
    async fn measure(&self, limit: Duration) -> Result<PodStatsView, Error> {
        let reply = self
            .guest
            .call_within(limit, "stats", |mut c| async move { c.stats(v1::StatsRequest {}).await });
        let reply = reply.await?;
        let view = view(&self.id, reply, self.stats().as_ref());
        self.set_stats(view.clone());
        Ok(view)
    }

    /// From the cache; an empty one is filled now.
    pub(crate) async fn stats_or_measure(&self) -> Result<PodStatsView, Error> {
        match self.stats() {
            Some(stats) => Ok(stats),
            None => {
                self.ready_pod()?;
                self.measure(FIRST_LIMIT).await
            }
        }
    }

    /// As [`Self::stats_or_measure`], measured anew for a container that is younger than the cache.
    pub(crate) async fn container_stats(&self, id: &str) -> Result<ContainerStatsView, Error> {
        let find = |stats: PodStatsView| stats.containers.into_iter().find(|c| c.id == id);
        if let Some(found) = find(self.stats_or_measure().await?) {
            return Ok(found);
        }
        self.ready_pod()?;
        find(self.measure(FIRST_LIMIT).await?)
            .ok_or_else(|| Error::NotFound { what: "running container", id: id.to_owned() })
    }
}

fn view(pod: &str, reply: v1::StatsReply, last: Option<&PodStatsView>) -> PodStatsView {
    let at = u64::try_from(reply.unix_time_ns)
        .ok()
        .and_then(|ns| UNIX_EPOCH.checked_add(Duration::from_nanos(ns)))
        .unwrap_or_else(SystemTime::now);
    let containers = reply.containers.into_iter().take(MAX_ENTRIES).map(|c| {
        let before = last.and_then(|l| l.containers.iter().find(|b| b.id == c.container_id));
        let layer = c.writable_layer.unwrap_or_default();
        ContainerStatsView {
            at,
            cpu: cpu(c.cpu, at, before.map(|b| (b.at, &b.cpu))),
            memory: memory(c.memory),
            pids: c.pids,
            writable_layer: FsView { used_bytes: layer.used_bytes, inodes_used: layer.inodes_used },
            id: c.container_id,
        }
    });
    let totals = reply.pod.unwrap_or_default();
    PodStatsView {
        pod: pod.to_owned(),
        at,
        cpu: cpu(totals.cpu, at, last.map(|l| (l.at, &l.cpu))),
        memory: memory(totals.memory),
        pids: totals.pids,
        interfaces: totals
            .interfaces
            .into_iter()
            .take(MAX_ENTRIES)
            .map(|i| InterfaceView {
                name: i.name,
                rx_bytes: i.rx_bytes,
                rx_errors: i.rx_errors,
                tx_bytes: i.tx_bytes,
                tx_errors: i.tx_errors,
            })
            .collect(),
        containers: containers.collect(),
    }
}

fn cpu(now: Option<v1::Cpu>, at: SystemTime, before: Option<(SystemTime, &CpuView)>) -> CpuView {
    let now = now.unwrap_or_default();
    let usage_nano_cores = before.map_or(0, |(then, old)| {
        let passed = at.duration_since(then).map_or(0, |d| d.as_nanos());
        let used = u128::from(now.usage_ns.saturating_sub(old.usage_ns));
        let rate = (used * 1_000_000_000).checked_div(passed);
        // The same measurement again says nothing new.
        rate.map_or(old.usage_nano_cores, |r| u64::try_from(r).unwrap_or(u64::MAX))
    });
    CpuView {
        usage_ns: now.usage_ns,
        usage_nano_cores,
        throttled_ns: now.throttled_ns,
        periods: now.periods,
        throttled_periods: now.throttled_periods,
    }
}

fn memory(memory: Option<v1::Memory>) -> MemoryView {
    let m = memory.unwrap_or_default();
    MemoryView {
        usage: m.usage,
        working_set: m.working_set,
        available: m.available,
        rss: m.rss,
        page_faults: m.page_faults,
        major_page_faults: m.major_page_faults,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_cpu_use_comes_from_two_measurements() {
        let reply = |seconds: i64, usage_ns| v1::StatsReply {
            unix_time_ns: seconds * 1_000_000_000,
            pod: Some(v1::PodStats {
                cpu: Some(v1::Cpu { usage_ns, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let first = view("p", reply(10, 4_000_000_000), None);
        assert_eq!(first.cpu.usage_nano_cores, 0);
        let second = view("p", reply(12, 5_000_000_000), Some(&first));
        assert_eq!(second.cpu.usage_nano_cores, 500_000_000);
        let third = view("p", reply(12, 5_000_000_000), Some(&second));
        assert_eq!(third.cpu.usage_nano_cores, 500_000_000);
    }
}
