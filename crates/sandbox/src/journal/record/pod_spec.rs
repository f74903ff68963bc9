//! The request for a pod in its record.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::convert::{all, same_fields, same_variants};
use super::network::StoredDns;
use crate::model::{CpuLimits, HostNamespaces, Meta, PodSpec, PortMapping, Protocol};

#[derive(Serialize, Deserialize)]
pub(super) struct StoredMeta {
    name: String,
    namespace: String,
    uid: String,
    attempt: u32,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct StoredPodSpec {
    meta: StoredMeta,
    hostname: String,
    handler: String,
    cgroup_parent: String,
    log_directory: String,
    sysctls: BTreeMap<String, String>,
    dns: StoredDns,
    ports: Vec<StoredPort>,
    vcpus: Option<u8>,
    memory_mib: Option<u32>,
    #[serde(default)]
    cpu: StoredCpuLimits,
    #[serde(default)]
    host: Option<StoredHostNamespaces>,
    /// The caller's request as JSON; not interpreted.
    origin: Value,
}

#[derive(Serialize, Deserialize)]
struct StoredHostNamespaces {
    network: bool,
    pid: bool,
    ipc: bool,
}

#[derive(Default, Serialize, Deserialize)]
struct StoredCpuLimits {
    quota_us: Option<u64>,
    period_us: Option<u64>,
    shares: Option<u64>,
}

#[derive(Serialize, Deserialize)]
enum StoredProtocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Serialize, Deserialize)]
struct StoredPort {
    protocol: StoredProtocol,
    container_port: u16,
    host_port: u16,
    host_ip: Option<IpAddr>,
}

same_fields!(StoredMeta = Meta { name, namespace, uid, attempt, labels, annotations });
same_fields!(StoredHostNamespaces = HostNamespaces { network, pid, ipc });
same_fields!(StoredCpuLimits = CpuLimits { quota_us, period_us, shares });
same_variants!(StoredProtocol = Protocol { Tcp, Udp, Sctp });

impl From<PortMapping> for StoredPort {
    fn from(live: PortMapping) -> Self {
        let PortMapping { protocol, container_port, host_port, host_ip } = live;
        Self { protocol: protocol.into(), container_port, host_port, host_ip }
    }
}

impl From<StoredPort> for PortMapping {
    fn from(stored: StoredPort) -> Self {
        let StoredPort { protocol, container_port, host_port, host_ip } = stored;
        Self { protocol: protocol.into(), container_port, host_port, host_ip }
    }
}

impl From<PodSpec> for StoredPodSpec {
    fn from(live: PodSpec) -> Self {
        let PodSpec {
            meta,
            hostname,
            handler,
            cgroup_parent,
            log_directory,
            sysctls,
            dns,
            ports,
            vcpus,
            memory_mib,
            cpu,
            host,
            origin,
        } = live;
        Self {
            meta: meta.into(),
            hostname,
            handler,
            cgroup_parent,
            log_directory,
            sysctls,
            dns: dns.into(),
            ports: all(ports),
            vcpus,
            memory_mib,
            cpu: cpu.into(),
            host: host.map(Into::into),
            origin,
        }
    }
}

impl From<StoredPodSpec> for PodSpec {
    fn from(stored: StoredPodSpec) -> Self {
        let StoredPodSpec {
            meta,
            hostname,
            handler,
            cgroup_parent,
            log_directory,
            sysctls,
            dns,
            ports,
            vcpus,
            memory_mib,
            cpu,
            host,
            origin,
        } = stored;
        Self {
            meta: meta.into(),
            hostname,
            handler,
            cgroup_parent,
            log_directory,
            sysctls,
            dns: dns.into(),
            ports: all(ports),
            vcpus,
            memory_mib,
            cpu: cpu.into(),
            host: host.map(Into::into),
            origin,
        }
    }
}
