//! Stats: what the cgroups, the interfaces and the writable layers say now.

use std::time::{SystemTime, UNIX_EPOCH};

use agent_api::v1;

use crate::agent::Agent;
use crate::guest::devices;

pub fn stats(agent: &Agent) -> v1::StatsReply {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let state = agent.lock();
    let containers = state
        .containers
        .iter()
        .filter_map(|(id, container)| {
            let cgroup = container.parts.cgroup.as_ref()?;
            Some(v1::ContainerStats {
                container_id: id.clone(),
                cpu: Some(cgroup.cpu()),
                memory: Some(cgroup.memory()),
                pids: cgroup.pids(),
                writable_layer: container.parts.rootfs.as_ref().map(|rootfs| rootfs.usage()),
                ..Default::default()
            })
        })
        .collect();
    let pod = v1::PodStats {
        cpu: Some(agent.pod_cgroup.cpu()),
        memory: Some(agent.pod_cgroup.memory()),
        pids: agent.pod_cgroup.pids(),
        interfaces: interfaces(
            &std::fs::read_to_string("/proc/net/dev").unwrap_or_default(),
            devices::is_card,
        ),
        ..Default::default()
    };
    v1::StatsReply {
        unix_time_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        containers,
        pod: Some(pod),
    }
}

/// Parses `/proc/net/dev`; only cards count: what loopback, bridges and tunnels inside the pod carry
/// has not left it, or is counted on a card.
fn interfaces(text: &str, is_card: impl Fn(&str) -> bool) -> Vec<v1::NetworkStats> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> =
                numbers.split_whitespace().map_while(|number| number.parse().ok()).collect();
            let name = name.trim();
            if numbers.len() < 12 || !is_card(name) {
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
