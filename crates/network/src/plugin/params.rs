//! What plugins are told beside the network's configuration: the environment (CNI spec section 2),
//! `CNI_ARGS`, and the runtime's knowledge by capability (`runtimeConfig`, section 3 and
//! CONVENTIONS.md).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conf::is_name;
use crate::model::Pod;

/// Longer ids make file names that file systems refuse.
const MAX_ID: usize = 128;
/// Annotations of the kubelet's own, honoured by containerd and CRI-O.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Bits that may pass in one go above the rate; what the other runtimes use.
const BURST_BITS: u64 = i32::MAX as u64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodError {
    #[error(
        "the pod id {id:?} must begin with a letter or digit, hold only these, '.', '_' and '-', \
         and be at most {MAX_ID} long"
    )]
    Id { id: String },
    #[error(
        "the pod's {what} {value:?} holds ';', '=' or a control character, which CNI cannot carry"
    )]
    Argument { what: &'static str, value: String },
    #[error("the annotation {key} is {value:?}, not a number of bits a second such as 10M")]
    Bandwidth { key: &'static str, value: String },
}

/// One pod on one network, as each plugin of the chain sees it. Kept on disk with the pod, so that
/// it can be taken off the network exactly as it was put on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Params {
    pub container_id: String,
    pub interface: String,
    pub netns: PathBuf,
    /// `CNI_ARGS`, in order.
    pub args: Vec<(String, String)>,
    /// All we know, by capability; each plugin gets what it asked for.
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
            // A name such as "x;IP=10.0.0.1" would become an argument of its own.
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

    /// For a pod of which nothing but the id is known any more.
    pub fn bare(id: &str, interface: &str, netns: &Path) -> Result<Self, PodError> {
        Self::new(&Pod { id: id.to_owned(), ..Pod::default() }, interface, netns)
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
        let bits = quantity(value)
            .filter(|bits| *bits > 0)
            .ok_or_else(|| PodError::Bandwidth { key, value: value.clone() })?;
        limits.insert(rate.into(), bits.into());
        limits.insert(burst.into(), BURST_BITS.into());
    }
    Ok((!limits.is_empty()).then_some(Value::Object(limits)))
}

/// A Kubernetes quantity that is a whole number, e.g. `10M`, `1.5G`, `512Ki`.
fn quantity(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let unit: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit);
    }
    let bits = number.parse::<f64>().ok()? * unit as f64;
    (bits.is_finite() && bits < u64::MAX as f64).then_some(bits as u64)
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
    fn arguments_name_the_pod() {
        assert_eq!(
            params(&pod()).unwrap().args(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
    }

    #[test]
    fn a_name_cannot_smuggle_an_argument_in() {
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
            ..pod()
        })
        .unwrap();
        assert_eq!(
            p.runtime["portMappings"],
            json!([{"hostPort":5353,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}])
        );
        assert_eq!(p.runtime["dns"]["servers"], json!(["1.1.1.1"]));
        assert_eq!(p.runtime["bandwidth"]["ingressRate"], json!(1_500_000));
        assert!(params(&pod()).unwrap().runtime.is_empty());
    }

    #[test]
    fn a_bandwidth_that_is_none_is_refused_rather_than_dropped() {
        for value in ["fast", "10X", "0", "", "-5M", "99999999999T"] {
            let annotations = [(EGRESS.to_owned(), value.to_owned())].into();
            let e = params(&Pod { annotations, ..pod() }).unwrap_err();
            assert!(matches!(e, PodError::Bandwidth { .. }), "{value}: {e}");
        }
        assert_eq!(quantity("512Ki"), Some(512 * 1024));
    }
}
