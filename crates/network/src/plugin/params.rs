//! Parameters of plugins apart from the network configuration: environment (CNI spec section 2),
//! `CNI_ARGS`, and `runtimeConfig` by capability (section 3 and CONVENTIONS.md).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::conf::{Network, is_name};
use super::quantity;
use crate::model::Pod;

/// Maximum length of an id, bytes; it becomes part of file names.
const MAX_ID: usize = 128;
/// Bandwidth annotations of Kubernetes, also supported by containerd and CRI-O.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Capabilities that a pod requests explicitly; others are optional information.
const REQUESTED: [&str; 2] = ["portMappings", "bandwidth"];
/// Burst, bits: the maximum of the bandwidth plugin, as in containerd.
const BURST_BITS: u64 = u32::MAX as u64;
/// Valid rates, bits per second: 1k to 1P, as in kubelet and containerd.
const RATES: std::ops::RangeInclusive<i128> = 1_000..=1_000_000_000_000_000;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodError {
    #[error(
        "the pod id {id:?} must start with a letter or digit, contain only these, '.', '_' and '-', \
         and be at most {MAX_ID} long"
    )]
    Id { id: String },
    #[error(
        "the pod's {what} {value:?} contains ';', '=' or a control character, which CNI_ARGS cannot"
    )]
    Argument { what: &'static str, value: String },
    #[error("the annotation {key} is {value:?}, not a number of bits per second such as 10M")]
    Bandwidth { key: &'static str, value: String },
    #[error("the annotation {key} is {value:?}, not between 1k and 1P bits per second")]
    BandwidthRange { key: &'static str, value: String },
}

/// Parameters of one attachment, the same for all plugins of the chain. Stored with the pod, as DEL
/// needs the same ones as ADD.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    pub container_id: String,
    pub interface: String,
    pub netns: PathBuf,
    /// `CNI_ARGS`, in order.
    pub args: Vec<(String, String)>,
    /// All `runtimeConfig` values by capability; each plugin gets those of its capabilities.
    pub runtime: Map<String, Value>,
}

impl Params {
    pub fn new(pod: &Pod, interface: &str, netns: &Path) -> Result<Self, PodError> {
        check_id(&pod.id)?;
        let mut args = vec![("IgnoreUnknown".to_owned(), "1".to_owned())];
        for (key, what, value) in [
            ("K8S_POD_NAMESPACE", "namespace", &pod.namespace),
            ("K8S_POD_NAME", "name", &pod.name),
            ("K8S_POD_INFRA_CONTAINER_ID", "id", &pod.id),
            ("K8S_POD_UID", "uid", &pod.uid),
        ] {
            // A name such as "x;IP=10.0.0.1" would add another argument.
            if value.contains([';', '=']) || value.contains(char::is_control) {
                return Err(PodError::Argument { what, value: value.clone() });
            }
            args.push((key.to_owned(), value.clone()));
        }
        Ok(Self {
            container_id: pod.id.clone(),
            interface: interface.to_owned(),
            netns: netns.to_owned(),
            args,
            runtime: runtime(pod)?,
        })
    }

    /// Parameters of a pod of which only the id is known.
    pub fn from_id(id: &str, interface: &str, netns: &Path) -> Result<Self, PodError> {
        Self::new(&Pod { id: id.to_owned(), ..Pod::default() }, interface, netns)
    }

    /// Requested capabilities that no plugin of the network supports. As with other runtimes the
    /// pod runs anyway.
    pub fn unsupported_capabilities<'a>(
        &'a self,
        network: &'a Network,
    ) -> impl Iterator<Item = &'a str> {
        let served = |key: &str| network.plugins.iter().any(|p| p.capabilities.contains(key));
        REQUESTED.into_iter().filter(move |key| self.runtime.contains_key(*key) && !served(key))
    }

    pub fn args(&self) -> String {
        self.args.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(";")
    }
}

pub fn check_id(id: &str) -> Result<(), PodError> {
    if is_name(id) && id.len() <= MAX_ID {
        return Ok(());
    }
    Err(PodError::Id { id: id.to_owned() })
}

fn runtime(pod: &Pod) -> Result<Map<String, Value>, PodError> {
    let mut known = Map::new();
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .filter(|p| p.host_port != 0)
        .map(|p| {
            json!({
                "hostPort": p.host_port,
                "containerPort": p.container_port,
                "protocol": p.protocol.to_string(),
                "hostIP": p.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        })
        .collect();
    if !ports.is_empty() {
        known.insert("portMappings".into(), ports.into());
    }
    if !pod.dns.is_empty() {
        known.insert(
            "dns".into(),
            json!({
                "servers": pod.dns.servers,
                "searches": pod.dns.searches,
                "options": pod.dns.options,
            }),
        );
    }
    if let Some(bandwidth) = bandwidth(&pod.annotations)? {
        known.insert("bandwidth".into(), bandwidth);
    }
    if !pod.cgroup_parent.is_empty() {
        known.insert("cgroupPath".into(), json!(pod.cgroup_parent));
    }
    if !pod.annotations.is_empty() {
        known.insert("io.kubernetes.cri.pod-annotations".into(), json!(pod.annotations));
    }
    Ok(known)
}

fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Value>, PodError> {
    let mut limits = Map::new();
    for (key, rate, burst) in
        [(INGRESS, "ingressRate", "ingressBurst"), (EGRESS, "egressRate", "egressBurst")]
    {
        let Some(value) = annotations.get(key) else { continue };
        let bits = quantity::parse(value)
            .ok_or_else(|| PodError::Bandwidth { key, value: value.clone() })?;
        let bits = u64::try_from(bits)
            .ok()
            .filter(|_| RATES.contains(&bits))
            .ok_or_else(|| PodError::BandwidthRange { key, value: value.clone() })?;
        limits.insert(rate.into(), bits.into());
        limits.insert(burst.into(), BURST_BITS.into());
    }
    Ok((!limits.is_empty()).then_some(Value::Object(limits)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Dns, PortMapping, Protocol};

    fn pod() -> Pod {
        Pod {
            id: "abc".into(),
            name: "web".into(),
            namespace: "prod".into(),
            uid: "u-1".into(),
            ..Pod::default()
        }
    }

    fn params(pod: &Pod) -> Result<Params, PodError> {
        Params::new(pod, "eth0", Path::new("/run/netns/x"))
    }

    #[test]
    fn cni_args_contain_the_pods_metadata() {
        assert_eq!(
            params(&pod()).unwrap().args(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
    }

    #[test]
    fn a_name_cannot_add_an_argument() {
        let e = params(&Pod { name: "x;IP=10.0.0.1".into(), ..pod() }).unwrap_err();
        assert!(e.to_string().contains("name \"x;IP=10.0.0.1\""), "{e}");
        for id in ["", "../x", "-a", &"x".repeat(200)] {
            assert!(matches!(check_id(id), Err(PodError::Id { .. })), "{id}");
        }
    }

    #[test]
    fn published_ports_dns_and_bandwidth_become_capabilities() {
        let port = |host_port, host_ip| PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port,
            host_ip,
        };
        let p = params(&Pod {
            ports: vec![port(0, None), port(5353, Some("127.0.0.1".parse().unwrap()))],
            dns: Dns { servers: vec!["1.1.1.1".into()], ..Dns::default() },
            annotations: [(INGRESS.to_owned(), "1.5M".to_owned())].into(),
            cgroup_parent: "/kubepods/pod1".into(),
            ..pod()
        })
        .unwrap();
        assert_eq!(
            p.runtime["portMappings"],
            json!([{"hostPort":5353,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}])
        );
        assert_eq!(p.runtime["dns"]["servers"], json!(["1.1.1.1"]));
        assert_eq!(p.runtime["bandwidth"]["ingressRate"], json!(1_500_000));
        assert_eq!(p.runtime["bandwidth"].get("egressRate"), None);
        assert_eq!(p.runtime["cgroupPath"], json!("/kubepods/pod1"));
        assert!(params(&pod()).unwrap().runtime.is_empty());
    }

    #[test]
    fn unsupported_capabilities_are_found() {
        let network = |capabilities: Value| {
            let plugin = json!({"type": "x", "capabilities": capabilities});
            let list = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [plugin]});
            Network::from_value(PathBuf::new(), list).unwrap()
        };
        let annotations = [(INGRESS.to_owned(), "1M".to_owned())].into();
        let p = params(&Pod { annotations, cgroup_parent: "/x".into(), ..pod() }).unwrap();
        let unsupported_capabilities =
            |n: &Network| p.unsupported_capabilities(n).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            unsupported_capabilities(&network(json!({"portMappings": true}))),
            ["bandwidth"]
        );
        assert_eq!(
            unsupported_capabilities(&network(json!({"bandwidth": true}))),
            Vec::<String>::new()
        );
    }

    #[test]
    fn an_invalid_bandwidth_is_refused_with_the_name_of_the_annotation() {
        let error = |key: &str, value: &str| {
            let annotations = [(key.to_owned(), value.to_owned())].into();
            params(&Pod { annotations, ..pod() }).unwrap_err()
        };
        for key in [INGRESS, EGRESS] {
            for value in ["fast", "10X", "", "1K", "10 M"] {
                let e = error(key, value);
                assert!(matches!(e, PodError::Bandwidth { .. }), "{value}: {e}");
                assert!(e.to_string().contains(key), "{e}");
            }
            for value in ["0", "999", "-5M", "1.1P", "1E", "1e99"] {
                let e = error(key, value);
                assert!(matches!(e, PodError::BandwidthRange { .. }), "{value}: {e}");
                assert!(e.to_string().contains(key), "{e}");
            }
        }
    }

    #[test]
    fn the_minimum_and_maximum_bandwidth_are_accepted_with_containerds_burst() {
        let annotations = [(INGRESS.into(), "1k".into()), (EGRESS.into(), "1P".into())].into();
        let p = params(&Pod { annotations, ..pod() }).unwrap();
        assert_eq!(
            p.runtime["bandwidth"],
            json!({
                "ingressRate": 1000,
                "ingressBurst": u32::MAX,
                "egressRate": 1_000_000_000_000_000_u64,
                "egressBurst": u32::MAX,
            })
        );
    }
}
