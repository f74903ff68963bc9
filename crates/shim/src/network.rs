//! Network of a pod: the network namespace that containerd created and set up with CNI. Its path is in
//! the pod's record, so that it is known after a crash of the shim.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ::network::existing;
use async_trait::async_trait;
use sandbox::model::{Dns, PodId, PodSpec};
use sandbox::ports::{Attachment, Interface, Network, PortError, Route};
use tokio_util::sync::CancellationToken;

use crate::spec::NETNS;

pub(crate) struct ExistingNetns;

fn netns(spec: &PodSpec) -> Option<PathBuf> {
    spec.meta.annotations.get(NETNS).map(PathBuf::from)
}

fn port_error(error: ::network::Error) -> PortError {
    PortError(error.into())
}

#[async_trait]
impl Network for ExistingNetns {
    fn netns_path(&self, _: &PodId) -> PathBuf {
        PathBuf::new()
    }

    async fn attach(
        &self,
        _: &PodId,
        spec: &PodSpec,
        _: &CancellationToken,
    ) -> Result<Attachment, PortError> {
        match netns(spec) {
            None => Ok(Attachment::default()),
            Some(path) => existing::attach(path).await.map(from_attachment).map_err(port_error),
        }
    }

    async fn open_taps(
        &self,
        _: &PodId,
        attachment: &Attachment,
    ) -> Result<Vec<OwnedFd>, PortError> {
        if attachment.interfaces.is_empty() {
            return Ok(Vec::new());
        }
        let (path, attachment) = (attachment.netns.clone(), to_attachment(attachment));
        existing::open_taps(path, attachment).await.map_err(port_error)
    }

    async fn detach(&self, _: &PodId, spec: &PodSpec) -> Result<(), PortError> {
        match netns(spec) {
            None => Ok(()),
            Some(path) => existing::detach(path).await.map_err(port_error),
        }
    }

    async fn not_ready_reason(&self) -> Option<String> {
        None
    }

    async fn collect_garbage(&self, _: &[PodId]) -> Result<(), PortError> {
        Ok(())
    }
}

fn from_attachment(attachment: ::network::Attachment) -> Attachment {
    let ::network::Attachment { netns, interfaces, routes, addresses, dns } = attachment;
    let interface = |i: ::network::Interface| Interface {
        name: i.name,
        mac: i.mac,
        mtu: i.mtu,
        addresses: i.addresses,
    };
    let route = |r: ::network::Route| Route {
        destination: r.destination,
        gateway: r.gateway,
        interface: r.interface,
    };
    Attachment {
        netns,
        interfaces: interfaces.into_iter().map(interface).collect(),
        routes: routes.into_iter().map(route).collect(),
        addresses,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
    }
}

/// The fields that opening the taps needs.
fn to_attachment(attachment: &Attachment) -> ::network::Attachment {
    let interface = |i: &Interface| ::network::Interface {
        name: i.name.clone(),
        mac: i.mac,
        mtu: i.mtu,
        addresses: i.addresses.clone(),
    };
    ::network::Attachment {
        netns: attachment.netns.clone(),
        interfaces: attachment.interfaces.iter().map(interface).collect(),
        ..Default::default()
    }
}
