//! Input ([`Pod`]) and output ([`Attachment`]) of the crate. Plain values.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// The network-related part of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Unique on this host; CNI_CONTAINERID.
    pub id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub annotations: BTreeMap<String, String>,
    pub ports: Vec<PortMapping>,
    /// Resolver configuration, for plugins with the capability `dns`.
    pub dns: Dns,
    /// Cgroup of the pod, for plugins with the capability `cgroupPath`.
    pub cgroup_parent: String,
    /// The pod's processes run in the namespace itself, without a VM: no taps are created and no
    /// interfaces returned.
    pub native: bool,
    /// Where the host has no CNI configuration, the pod is attached to the built-in network.
    pub default_network: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl Dns {
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    /// 0: no hostPort.
    pub host_port: u16,
    pub host_ip: Option<IpAddr>,
}

/// A network interface as the guest has to configure it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// CIDR notation, both families. Full prefix length if the host has no on-link route for the
    /// network, so that the guest creates none.
    pub addresses: Vec<String>,
}

/// A route of the guest. On-link routes come first, as gateways need them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// CIDR; empty for the default route of the gateway's family.
    pub destination: String,
    /// Empty for an on-link route.
    pub gateway: String,
    pub interface: String,
}

/// The network of an attached pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    pub netns: PathBuf,
    /// Interface n is connected with tap n of [`crate::Cni::open_taps`]. The first is CNI_IFNAME.
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    /// Addresses of the first interface in the plugins' order; the first is the primary one.
    pub addresses: Vec<IpAddr>,
    /// From the plugins' result; may be empty.
    pub dns: Dns,
}

impl Attachment {
    pub fn interface_names(&self) -> Vec<String> {
        self.interfaces.iter().map(|interface| interface.name.clone()).collect()
    }
}
