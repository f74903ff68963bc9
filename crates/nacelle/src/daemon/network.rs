//! Implements `sandbox`'s network port with the `network` crate. Neither crate knows the other, so
//! the types of both are converted here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ::network::Cni;
use async_trait::async_trait;
use sandbox::model::{Dns, PodId, PodSpec, Protocol};
use sandbox::ports::{Attachment, Interface, Network, PortError, Route};
use tokio_util::sync::CancellationToken;

use crate::DEFAULT_NETWORK_ANNOTATION;

pub(super) struct CniNetwork(pub(super) Cni);

#[async_trait]
impl Network for CniNetwork {
    fn netns_path(&self, pod: &PodId) -> PathBuf {
        self.0.netns_path(pod)
    }

    async fn attach(
        &self,
        pod: &PodId,
        spec: &PodSpec,
        cancel: &CancellationToken,
    ) -> Result<Attachment, PortError> {
        let attached = self.0.attach_unless(to_pod(pod, spec), cancel.cancelled()).await;
        attached.map(from_attachment).map_err(port_error)
    }

    async fn open_taps(
        &self,
        pod: &PodId,
        attachment: &Attachment,
    ) -> Result<Vec<OwnedFd>, PortError> {
        let names = attachment.interfaces.iter().map(|interface| interface.name.clone());
        self.0.open_taps(pod, names.collect()).await.map_err(port_error)
    }

    async fn detach(&self, pod: &PodId, _: &PodSpec) -> Result<(), PortError> {
        self.0.detach(pod).await.map_err(port_error)
    }

    async fn not_ready_reason(&self) -> Option<String> {
        self.0.trouble().await
    }

    async fn damaged_records(&self) -> Vec<String> {
        self.0.damaged().await
    }

    async fn collect_garbage(&self, known: &[PodId]) -> Result<(), PortError> {
        self.0.collect(known).await.map_err(port_error)
    }
}

fn port_error(error: ::network::Error) -> PortError {
    match error {
        ::network::Error::Cancelled => PortError::cancelled(),
        error => PortError(error.into()),
    }
}

fn to_pod(id: &PodId, spec: &PodSpec) -> ::network::Pod {
    ::network::Pod {
        id: id.clone(),
        name: spec.meta.name.clone(),
        namespace: spec.meta.namespace.clone(),
        uid: spec.meta.uid.clone(),
        annotations: spec.meta.annotations.clone(),
        ports: spec
            .ports
            .iter()
            .map(|port| ::network::PortMapping {
                protocol: match port.protocol {
                    Protocol::Tcp => ::network::Protocol::Tcp,
                    Protocol::Udp => ::network::Protocol::Udp,
                    Protocol::Sctp => ::network::Protocol::Sctp,
                },
                container_port: port.container_port,
                host_port: port.host_port,
                host_ip: port.host_ip,
            })
            .collect(),
        dns: to_dns(&spec.dns),
        native: spec.host.is_some(),
        // A kubelet's pod waits for the operator's network, whatever its annotations are.
        default_network: asks_for_default(&spec.meta.annotations)
            && !spec.meta.labels.contains_key(KUBELET_LABEL),
        cgroup_parent: spec.cgroup_parent.clone(),
    }
}

/// A kubelet gives it to every pod (k8s.io/kubelet/pkg/types).
const KUBELET_LABEL: &str = "io.kubernetes.pod.uid";

fn asks_for_default(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(DEFAULT_NETWORK_ANNOTATION).is_some_and(|value| value == "true")
}

fn to_dns(dns: &Dns) -> ::network::Dns {
    ::network::Dns {
        servers: dns.servers.clone(),
        searches: dns.searches.clone(),
        options: dns.options.clone(),
    }
}

fn from_attachment(made: ::network::Attachment) -> Attachment {
    let ::network::Attachment { netns, interfaces, routes, addresses, dns } = made;
    Attachment {
        netns,
        interfaces: interfaces
            .into_iter()
            .map(|::network::Interface { name, mac, mtu, addresses }| Interface {
                name,
                mac,
                mtu,
                addresses,
            })
            .collect(),
        routes: routes
            .into_iter()
            .map(|::network::Route { destination, gateway, interface }| Route {
                destination,
                gateway,
                interface,
            })
            .collect(),
        addresses,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pods_that_ask_for_it_are_attached_to_the_built_in_network() {
        let with = |value: &str| {
            BTreeMap::from([(DEFAULT_NETWORK_ANNOTATION.to_string(), value.to_string())])
        };
        assert!(asks_for_default(&with("true")));
        assert!(!asks_for_default(&with("false")) && !asks_for_default(&BTreeMap::new()));
    }
}
