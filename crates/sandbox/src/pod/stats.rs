//! Polls a pod's statistics into a cache, so that listings do not call guests. A read triggers a
//! new measurement, so that a reader a second later sees new values (`crictl stats` takes two
//! samples and refuses identical ones).

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::v1;
use tokio::time::Instant;

use super::handle::Handle;
use crate::error::Error;
use crate::stats::{
    BlockIoView, ContainerStatsView, CpuView, EmptyDirView, FsView, InterfaceView, MemoryView,
    PodStatsView, PressureView, ProcessView,
};

/// Shortest interval between two measurements.
const FRESH: Duration = Duration::from_millis(800);
/// Period over which measurements after a listing are spread.
const SPREAD: Duration = Duration::from_millis(400);
const POLL_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait of a reader with an empty cache.
const FIRST_LIMIT: Duration = Duration::from_millis(500);
/// Entries accepted per list of a guest's reply.
const MAX_ENTRIES: usize = 1024;
/// Longest interface name (IFNAMSIZ), with room.
const MAX_NAME: usize = 64;
/// Longest name of a volume in Kubernetes is 63.
const MAX_VOLUME_NAME: usize = 128;

pub(super) async fn poll(handle: Arc<Handle>) {
    let interval = handle.node.config.stats_interval().max(Duration::from_millis(50));
    // Spreads the measurements of pods that started or were listed together.
    let jitter = (RandomState::new().hash_one(&handle.id) % 1000) as f64 / 1000.0;
    let mut measured = Instant::now();
    let mut due = measured + interval.mul_f64(jitter);
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(due) => {}
            () = handle.stats_read.notified() => {
                let soon = Instant::now() + SPREAD.mul_f64(jitter);
                tokio::time::sleep_until(soon.max(measured + FRESH).min(due)).await;
            }
        }
        if let Err(error) = handle.measure(POLL_LIMIT).await {
            tracing::debug!(pod = handle.id, %error, "no stats");
        }
        measured = Instant::now();
        due = measured + interval;
    }
}

impl Handle {
    async fn measure(&self, limit: Duration) -> Result<Arc<PodStatsView>, Error> {
        let reply = self
            .guest
            .call_within(limit, "stats", |mut c| async move { c.stats(v1::StatsRequest {}).await });
        let reply = reply.await?;
        let view = Arc::new(view(&self.id, reply, self.last_stats().as_deref()));
        self.set_stats(view.clone());
        Ok(view)
    }

    /// From the cache; an empty cache is filled now, once: after a failure later callers do not
    /// wait.
    pub(crate) async fn stats_or_measure(&self) -> Result<Arc<PodStatsView>, Error> {
        if let Some(stats) = self.stats() {
            return Ok(stats);
        }
        self.ready_pod()?;
        let first = self.first_stats.get_or_init(|| async {
            if let Err(error) = self.measure(FIRST_LIMIT).await {
                tracing::debug!(pod = self.id, %error, "no first stats");
            }
        });
        first.await;
        let not_yet = || Error::unavailable(format!("pod {} was not measured yet", self.id));
        self.stats().ok_or_else(not_yet)
    }

    /// As [`Self::stats_or_measure`]; measures again for a container that is newer than the cache.
    pub(crate) async fn container_stats(&self, id: &str) -> Result<ContainerStatsView, Error> {
        let find = |stats: &PodStatsView| stats.containers.iter().find(|c| c.id == id).cloned();
        if let Some(found) = find(&*self.stats_or_measure().await?) {
            return Ok(found);
        }
        self.ready_pod()?;
        find(&*self.measure(FIRST_LIMIT).await?)
            .ok_or_else(|| Error::NotFound { what: "running container", id: id.to_owned() })
    }
}

/// The guest's clock is untrusted.
fn time(unix_ns: i64) -> Option<SystemTime> {
    let since = u64::try_from(unix_ns).ok().filter(|ns| *ns > 0).map(Duration::from_nanos)?;
    UNIX_EPOCH.checked_add(since)
}

/// Removes entries with duplicate keys: a hostile guest's duplicates would invalidate the metrics
/// of the whole node.
fn distinct<T, K: Ord>(all: Vec<T>, key: impl Fn(&T) -> K) -> impl Iterator<Item = T> {
    let mut seen = BTreeSet::new();
    all.into_iter().take(MAX_ENTRIES).filter(move |one| seen.insert(key(one)))
}

fn view(pod: &str, reply: v1::StatsReply, last: Option<&PodStatsView>) -> PodStatsView {
    let at = time(reply.unix_time_ns).unwrap_or_else(SystemTime::now);
    let containers = distinct(reply.containers, |c| c.container_id.clone()).map(|c| {
        let before = last.and_then(|l| l.containers.iter().find(|b| b.id == c.container_id));
        ContainerStatsView {
            at,
            cpu: cpu(c.cpu, at, before.map(|b| (b.at, &b.cpu))),
            memory: memory(c.memory),
            pids: c.pids,
            writable_layer: layer(c.writable_layer),
            processes: processes(c.processes),
            block_io: distinct(c.block_io, |d| (d.major, d.minor)).map(block_io).collect(),
            oom_events: c.oom_events,
            started_at: time(c.started_unix_ns),
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
        interfaces: distinct(totals.interfaces, |i| i.name.clone()).map(interface).collect(),
        io_pressure: totals.io_pressure.map(pressure),
        containers: containers.collect(),
        empty_dirs: distinct(totals.empty_dirs, |d| d.volume_id.clone()).map(empty_dir).collect(),
    }
}

fn empty_dir(stats: v1::VolumeStats) -> EmptyDirView {
    let v1::VolumeStats { mut volume_id, usage } = stats;
    truncate(&mut volume_id, MAX_VOLUME_NAME);
    EmptyDirView { name: volume_id, usage: layer(usage) }
}

fn pressure(pressure: v1::Pressure) -> PressureView {
    let v1::Pressure { some_us, full_us } = pressure;
    PressureView { some_us, full_us }
}

fn layer(usage: Option<v1::FsUsage>) -> FsView {
    let v1::FsUsage { used_bytes, inodes_used, capacity, inodes } = usage.unwrap_or_default();
    FsView { used_bytes, inodes_used, capacity, inodes }
}

fn processes(stats: Option<v1::ProcessStats>) -> ProcessView {
    let v1::ProcessStats {
        processes,
        threads,
        threads_max,
        file_descriptors,
        sockets,
        ulimit_soft_nofile,
    } = stats.unwrap_or_default();
    ProcessView { processes, threads, threads_max, file_descriptors, sockets, ulimit_soft_nofile }
}

fn block_io(io: v1::BlockIo) -> BlockIoView {
    let v1::BlockIo { major, minor, read_bytes, written_bytes, reads, writes } = io;
    BlockIoView { major, minor, read_bytes, written_bytes, reads, writes }
}

/// A hostile guest may send a name of megabytes.
fn truncate(name: &mut String, most: usize) {
    if name.len() > most {
        name.clear();
    }
}

fn interface(stats: v1::NetworkStats) -> InterfaceView {
    let v1::NetworkStats {
        mut name,
        rx_bytes,
        rx_errors,
        tx_bytes,
        tx_errors,
        rx_packets,
        rx_dropped,
        tx_packets,
        tx_dropped,
    } = stats;
    truncate(&mut name, MAX_NAME);
    InterfaceView {
        name,
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
    }
}

fn cpu(now: Option<v1::Cpu>, at: SystemTime, before: Option<(SystemTime, &CpuView)>) -> CpuView {
    let v1::Cpu {
        usage_ns,
        throttled_ns,
        periods,
        throttled_periods,
        user_ns,
        system_ns,
        pressure: waited,
    } = now.unwrap_or_default();
    let usage_nano_cores = before.map_or(0, |(then, old)| {
        let passed = at.duration_since(then).map_or(0, |d| d.as_nanos());
        let used = u128::from(usage_ns.saturating_sub(old.usage_ns));
        let rate = (used * 1_000_000_000).checked_div(passed);
        // A repeated measurement has no new data.
        rate.map_or(old.usage_nano_cores, |r| u64::try_from(r).unwrap_or(u64::MAX))
    });
    CpuView {
        usage_ns,
        usage_nano_cores,
        user_ns,
        system_ns,
        throttled_ns,
        periods,
        throttled_periods,
        pressure: waited.map(pressure),
    }
}

fn memory(memory: Option<v1::Memory>) -> MemoryView {
    let v1::Memory {
        usage,
        working_set,
        available,
        rss,
        page_faults,
        major_page_faults,
        cache,
        mapped_file,
        swap,
        kernel,
        limit,
        failures,
        peak,
        total_active_file,
        total_inactive_file,
        pressure: waited,
    } = memory.unwrap_or_default();
    MemoryView {
        usage,
        working_set,
        available,
        rss,
        cache,
        mapped_file,
        swap,
        kernel,
        limit,
        peak,
        failures,
        page_faults,
        major_page_faults,
        total_active_file,
        total_inactive_file,
        pressure: waited.map(pressure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_entries_of_a_guest_are_dropped() {
        let interface =
            |rx_bytes| v1::NetworkStats { name: "eth0".into(), rx_bytes, ..Default::default() };
        let disk = |major| v1::BlockIo { major, minor: 0, ..Default::default() };
        let container = v1::ContainerStats {
            container_id: "c".into(),
            block_io: vec![disk(253), disk(254), disk(253)],
            ..Default::default()
        };
        let interfaces = vec![interface(1), interface(2)];
        let reply = v1::StatsReply {
            containers: vec![container.clone(), container],
            pod: Some(v1::PodStats { interfaces, ..Default::default() }),
            ..Default::default()
        };
        let stats = view("p", reply, None);
        assert_eq!((stats.interfaces.len(), stats.interfaces[0].rx_bytes), (1, 1));
        assert_eq!((stats.containers.len(), stats.containers[0].block_io.len()), (1, 2));
    }

    #[test]
    fn cpu_usage_rate_is_computed_from_two_measurements() {
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
