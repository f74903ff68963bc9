//! Stats: counters of cgroups, network interfaces, writable layers and emptyDirs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agent_api::v1;
use futures_util::future::join_all;

use super::Container;
use super::process::unix_time_ns;
use super::rootfs::{Layer, Rootfs, VOLUMES};
use crate::agent::Agent;
use crate::blocking::{LOOKUP_TIMEOUT, Pool, STATS_TIMEOUT};
use crate::error::Result;
use crate::guest::devices;
use crate::guest::scratch::file_system_usage;
use crate::oci::cgroup::Cgroup;

/// Maximum open files counted in one request, for all containers together: each costs a system
/// call, and their number is up to the containers.
const MAX_FILES: usize = 16384;
/// Maximum files counted in a writable layer without a quota: their number is up to the container.
const MAX_INODES: u64 = 200_000;
/// Maximum processes counted in one container.
const MAX_PROCESSES: usize = 4096;

/// Data of a container for the statistics, copied out of the locked state.
struct Subject {
    id: String,
    cgroup: Cgroup,
    layer: Option<Layer>,
    init: i32,
    started_unix_ns: i64,
}

/// Measures a file system in a pool of its own; None after the timeout.
async fn measure<T: Send + 'static>(
    pool: Pool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    // The error was logged; the next request tries again.
    pool.run("measure a file system", STATS_TIMEOUT, move || Ok(work())).await.ok()
}

pub async fn stats(agent: &Agent) -> Result<v1::StatsReply> {
    let subjects: Vec<Subject> = {
        let state = agent.lock();
        let subject = |(id, container): (&String, &Container)| {
            Some(Subject {
                id: id.clone(),
                cgroup: container.parts.cgroup.clone()?,
                layer: container.parts.rootfs.as_ref().and_then(Rootfs::layer).cloned(),
                init: container.init.pid,
                started_unix_ns: container.init.started_unix_ns,
            })
        };
        state.containers.iter().filter_map(subject).collect()
    };
    let pod = agent.pod_cgroup.clone();
    // try_lock: the lock is held while an emptyDir is filled.
    let empty_dirs = agent.empty_dirs.try_lock().map(|dirs| dirs.list()).unwrap_or_default();
    // A pool for each: a file system that hangs is left out without delaying the others.
    let layers = subjects.iter().map(|subject| {
        let pool = agent.pools.for_stats("container", &subject.id);
        let layer = subject.layer.clone();
        async move {
            let layer = layer?;
            measure(pool, move || layer_usage(&layer)).await
        }
    });
    let volumes = empty_dirs.into_iter().map(|dir| {
        let pool = agent.pools.for_stats("emptyDir", &dir.id);
        let volume_id = dir.id.clone();
        async move {
            let usage = Some(measure(pool, move || dir.usage()).await?);
            Some(v1::VolumeStats { volume_id, usage })
        }
    });
    let (layers, volumes) = futures_util::join!(join_all(layers), join_all(volumes));
    let volumes = volumes.into_iter().flatten().collect();
    let host = agent.config.host.as_ref().map(|host| host.network);
    // Hundreds of reads of kernel files: not on the event loop's thread.
    let collect = move || {
        let mut files = MAX_FILES;
        let all = subjects.iter().zip(layers);
        let containers =
            all.map(|(subject, layer)| container(subject, layer, &mut files)).collect();
        Ok(v1::StatsReply {
            unix_time_ns: unix_time_ns(),
            containers,
            pod: Some(v1::PodStats {
                cpu: Some(pod.cpu()),
                memory: Some(pod_memory(&pod, host.is_some())),
                pids: pod.pids(),
                interfaces: interfaces(
                    &fs::read_to_string("/proc/net/dev").unwrap_or_default(),
                    |name| match host {
                        None => devices::is_nic(name),
                        // Only PCI devices count, not interfaces that programs created. In a host
                        // pod all but loopback, or none if the network is the host's.
                        Some(has_hosts_network) => !has_hosts_network && name != "lo",
                    },
                ),
                io_pressure: pod.pressure("io.pressure"),
                empty_dirs: volumes,
            }),
        })
    };
    agent.pools.for_stats("the", "pod").run("read cgroup files", LOOKUP_TIMEOUT, collect).await
}

/// In a guest the cgroup's limit is the agent's own (`guest::reserve`), not one of the pod.
fn pod_memory(pod: &Cgroup, on_host: bool) -> v1::Memory {
    let memory = pod.memory();
    if on_host { memory } else { v1::Memory { limit: 0, available: 0, ..memory } }
}

fn layer_usage(layer: &Layer) -> v1::FsUsage {
    match layer {
        Layer::Own(path) => file_system_usage(path),
        Layer::Host(path) => directory_usage(path),
        Layer::Scratch(dir) => dir.usage(),
    }
}

fn container(
    subject: &Subject,
    writable_layer: Option<v1::FsUsage>,
    files: &mut usize,
) -> v1::ContainerStats {
    let cgroup = &subject.cgroup;
    v1::ContainerStats {
        container_id: subject.id.clone(),
        cpu: Some(cgroup.cpu()),
        memory: Some(cgroup.memory()),
        pids: cgroup.pids(),
        writable_layer,
        processes: Some(processes(cgroup, subject.init, files)),
        block_io: cgroup.block_io(),
        oom_events: cgroup.oom_kills(),
        started_unix_ns: subject.started_unix_ns,
    }
}

/// Usage of a layer that is a directory, by counting; size and free space are the file system's.
fn directory_usage(layer: &Path) -> v1::FsUsage {
    let mut found = v1::FsUsage { used_bytes: 0, inodes_used: 0, ..file_system_usage(layer) };
    let mut dirs = vec![layer.join("data"), layer.join(VOLUMES)];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            // Not followed if it is a symlink.
            let Ok(meta) = entry.metadata() else { continue };
            if found.inodes_used >= MAX_INODES {
                return found;
            }
            found.inodes_used += 1;
            found.used_bytes += meta.blocks() * 512;
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    found
}

/// Counts the open files of a container's processes; `files` is the remaining budget.
fn processes(cgroup: &Cgroup, init: i32, files: &mut usize) -> v1::ProcessStats {
    let pids = cgroup.processes_up_to(MAX_PROCESSES);
    let (mut open, mut sockets) = (0, 0);
    for pid in &pids {
        // The process may have exited.
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in entries.flatten() {
            if *files == 0 {
                break;
            }
            *files -= 1;
            open += 1;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if target.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
                sockets += 1;
            }
        }
    }
    let limits = fs::read_to_string(format!("/proc/{init}/limits")).unwrap_or_default();
    v1::ProcessStats {
        processes: pids.len() as u64,
        // pids.current counts threads.
        threads: cgroup.pids(),
        threads_max: cgroup.pids_max(),
        file_descriptors: open,
        sockets,
        ulimit_soft_nofile: soft_limit(&limits, "Max open files"),
    }
}

/// Parses `/proc/<pid>/limits`; 0 if unlimited or unknown.
fn soft_limit(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Parses `/proc/net/dev`. Only NICs are counted: traffic of loopback, bridges and tunnels stays in
/// the pod or is counted on a NIC.
fn interfaces(text: &str, is_nic: impl Fn(&str) -> bool) -> Vec<v1::NetworkStats> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> =
                numbers.split_whitespace().map_while(|number| number.parse().ok()).collect();
            let name = name.trim();
            if numbers.len() < 12 || !is_nic(name) {
                return None;
            }
            Some(v1::NetworkStats {
                name: name.to_owned(),
                rx_bytes: numbers[0],
                rx_errors: numbers[2],
                tx_bytes: numbers[8],
                tx_errors: numbers[10],
                rx_packets: numbers[1],
                rx_dropped: numbers[3],
                tx_packets: numbers[9],
                tx_dropped: numbers[11],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_soft_limit_is_read_from_proc() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max processes             unlimited            unlimited            processes\n\
                    Max open files            1024                 4096                 files\n";
        assert_eq!(soft_limit(text, "Max open files"), 1024);
        assert_eq!(soft_limit(text, "Max processes"), 0);
        assert_eq!(soft_limit("", "Max open files"), 0);
    }

    #[test]
    fn interfaces_are_read_from_proc() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
            lo:    1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n  \
            eth0: 100 2 3 0 0 0 0 0 200 4 5 0 0 0 0 0\n";
        let all = interfaces(text, |name| name != "lo");
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].rx_bytes, all[0].rx_errors), (100, 3));
        assert_eq!((all[0].tx_bytes, all[0].tx_errors), (200, 5));
    }
}
