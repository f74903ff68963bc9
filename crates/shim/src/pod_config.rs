//! The pod of a sandbox that containerd creates by the Sandbox service: its options are a
//! `runtime.v1.PodSandboxConfig` (CRI, api.proto). Only the fields that a VM needs are decoded.
//!
//! Unlike for a pause container, containerd makes no resolv.conf and no specification for the pod, so that
//! DNS, host name and sysctls are taken from here.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message;
use sandbox::model::{CpuLimits, Dns, Meta, PodSpec};

use crate::settings::Settings;
use crate::spec::{self, NETNS};

/// Name of the message in the type URL of the options.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns_config: Option<DnsConfig>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct DnsConfig {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    /// Sum of the containers' resources.
    #[prost(message, optional, tag = "5")]
    resources: Option<LinuxContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainerResources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory_limit_in_bytes: i64,
}

/// The pod of CreateSandbox. `netns`: path of the network namespace; empty if the pod has none.
pub(crate) fn pod(
    namespace: &str,
    id: &str,
    options: &Any,
    netns: &str,
    settings: &Settings,
) -> Result<PodSpec> {
    if options.type_url.rsplit('/').next() != Some(TYPE) {
        bail!("options of type {:?}, expected {TYPE}", options.type_url);
    }
    let config = PodSandboxConfig::decode(&*options.value).with_context(|| TYPE.to_owned())?;
    let metadata = config.metadata.unwrap_or_default();
    let linux = config.linux.unwrap_or_default();
    let dns = config.dns_config.unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    // In CRI, 0 stands for "not set".
    let number = |value: i64| Some(value).filter(|value| *value != 0);
    let size = spec::Size {
        memory: number(resources.memory_limit_in_bytes),
        quota: number(resources.cpu_quota),
        period: number(resources.cpu_period),
    };
    let or = |text: String, default: &str| if text.is_empty() { default.to_owned() } else { text };
    Ok(PodSpec {
        meta: Meta {
            name: or(metadata.name, id),
            namespace: or(metadata.namespace, namespace),
            uid: or(metadata.uid, id),
            attempt: metadata.attempt,
            annotations: netns_annotation(netns),
            ..Meta::default()
        },
        hostname: spec::hostname(config.hostname, id),
        handler: String::new(),
        cgroup_parent: cgroup_parent(&linux.cgroup_parent),
        log_directory: String::new(),
        sysctls: with_default_sysctls(linux.sysctls),
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        ports: Vec::new(),
        vcpus: size.vcpus(settings),
        memory_mib: size.memory_mib(settings),
        cpu: CpuLimits::default(),
        host: None,
        origin: serde_json::Value::Null,
    })
}

/// With `sandboxer = "podsandbox"` containerd sets these for pods with a network of their own
/// (`enable_unprivileged_ports` and `enable_unprivileged_icmp`, on by default).
fn with_default_sysctls(mut sysctls: HashMap<String, String>) -> BTreeMap<String, String> {
    for (name, value) in [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ] {
        if !sysctls.contains_key(name) && !sysctls.contains_key(&name.replace('.', "/")) {
            sysctls.insert(name.to_owned(), value.to_owned());
        }
    }
    sysctls.into_iter().collect()
}

/// The pod's annotations do not come from its configuration: [`NETNS`] names a file of the host.
pub(crate) fn netns_annotation(netns: &str) -> BTreeMap<String, String> {
    let entry = (!netns.is_empty()).then(|| (NETNS.to_owned(), netns.to_owned()));
    entry.into_iter().collect()
}

/// With the systemd driver the kubelet gives the path of a slice, whose last component is its name.
fn cgroup_parent(parent: &str) -> String {
    match Path::new(parent).file_name().and_then(|name| name.to_str()) {
        Some(name) if name.ends_with(".slice") => name.to_owned(),
        _ => parent.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(value: Vec<u8>) -> Any {
        Any { type_url: TYPE.into(), value, ..Default::default() }
    }

    #[test]
    fn sysctls_of_the_pod_replace_the_defaults_in_both_spellings() {
        let own =
            [("net/ipv4/ping_group_range", "1 0"), ("net.ipv4.ip_unprivileged_port_start", "99")];
        let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let set = with_default_sysctls(own.into());
        assert_eq!((set.len(), set["net.ipv4.ip_unprivileged_port_start"].as_str()), (2, "99"));
        assert_eq!(with_default_sysctls(HashMap::new()).len(), 2);
    }

    /// With the types of CRI's own api.proto.
    #[test]
    fn a_kubelets_pod_configuration_becomes_a_pod() {
        use cri::v1;
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "web-0".into(),
                uid: "uid-1".into(),
                namespace: "shop".into(),
                attempt: 2,
            }),
            hostname: "web".into(),
            log_directory: "/var/log/pods/x".into(),
            dns_config: Some(v1::DnsConfig {
                servers: vec!["10.96.0.10".into()],
                searches: vec!["svc.cluster.local".into()],
                options: vec!["ndots:5".into()],
            }),
            port_mappings: vec![v1::PortMapping { host_port: 80, ..Default::default() }],
            labels: [("a".to_owned(), "b".to_owned())].into(),
            annotations: [(NETNS.to_owned(), "/proc/1/ns/net".to_owned())].into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods.slice/kubepods-pod1.slice".into(),
                sysctls: [("net.core.somaxconn".to_owned(), "9".to_owned())].into(),
                security_context: Some(Default::default()),
                overhead: Some(Default::default()),
                resources: Some(v1::LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    cpu_shares: 512,
                    memory_limit_in_bytes: 256 << 20,
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let any = options(config.encode_to_vec());
        let pod = pod("k8s.io", "0123", &any, "/var/run/netns/a", &Settings::default()).unwrap();
        let meta = &pod.meta;
        assert_eq!((&*meta.name, &*meta.namespace, &*meta.uid), ("web-0", "shop", "uid-1"));
        assert_eq!((meta.attempt, &*pod.hostname), (2, "web"));
        assert_eq!(meta.annotations, [(NETNS.to_owned(), "/var/run/netns/a".to_owned())].into());
        assert_eq!(pod.cgroup_parent, "kubepods-pod1.slice");
        assert_eq!(pod.sysctls["net.core.somaxconn"], "9");
        assert_eq!(pod.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!((pod.memory_mib, pod.vcpus), (Some(256 + 128), Some(1)));
        assert_eq!(pod.dns.servers, ["10.96.0.10"]);
        assert_eq!(pod.dns.searches, ["svc.cluster.local"]);
        assert_eq!(pod.dns.options, ["ndots:5"]);
    }

    #[test]
    fn a_pod_without_configuration_has_the_defaults() {
        let pod =
            pod("k8s.io", "0123456789abcdef", &options(vec![]), "", &Settings::default()).unwrap();
        assert_eq!((&*pod.meta.name, &*pod.meta.namespace), ("0123456789abcdef", "k8s.io"));
        assert_eq!((&*pod.hostname, &*pod.cgroup_parent), ("0123456789ab", ""));
        assert_eq!((pod.memory_mib, pod.vcpus), (None, None));
        assert!(pod.meta.annotations.is_empty());
    }

    #[test]
    fn options_of_another_type_and_damaged_ones_are_refused() {
        let parse = |any: &Any| pod("k8s.io", "a", any, "", &Settings::default());
        let prefixed = Any { type_url: format!("types.containerd.io/{TYPE}"), ..options(vec![]) };
        assert!(parse(&prefixed).is_ok());
        let other = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
        let error = format!("{:#}", parse(&other).unwrap_err());
        assert!(error.contains("runtimeoptions.v1.Options"), "{error}");
        let error = format!("{:#}", parse(&options(vec![0x0a, 0xff])).unwrap_err());
        assert!(error.contains(TYPE), "{error}");
    }

    #[test]
    fn the_cgroup_parent_is_a_slice_or_a_path() {
        assert_eq!(cgroup_parent("/kubepods/burstable/pod1"), "/kubepods/burstable/pod1");
        assert_eq!(cgroup_parent("/kubepods.slice/kubepods-pod1.slice"), "kubepods-pod1.slice");
        assert_eq!(cgroup_parent(""), "");
    }
}
