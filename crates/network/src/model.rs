//! What goes in ([`Pod`]) and what comes out ([`Attachment`]). Plain values.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// A pod as far as networks care.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Unique on this host; the plugins' container id.
    pub id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub annotations: BTreeMap<String, String>,
    pub ports: Vec<PortMapping>,
    /// What the pod's resolver is to use; told to plugins that ask for it.
    pub dns: Dns,
    /// Told to plugins that ask for it.
    pub cgroup_parent: String,
    /// Its processes live in the namespace itself: no taps are made, no interfaces told.
    pub native: bool,
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
    /// 0: not published on the host.
    pub host_port: u16,
    pub host_ip: Option<IpAddr>,
}

/// One network interface as the guest has to set it up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// CIDR notation, both families. A prefix of full length where the host has no on-link route
    /// for the network, so that the guest makes none either.
    pub addresses: Vec<String>,
}

/// A route of the guest. On-link routes come first, so that gateways are reachable when used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// CIDR; empty: default route of the gateway's family.
    pub destination: String,
    /// Empty: on link.
    pub gateway: String,
    pub interface: String,
}

/// A pod's network as it stands on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    pub netns: PathBuf,
    /// The n-th one is joined to the tap that [`crate::Cni::open_taps`] returns n-th. First is the
    /// one that the plugins were asked for.
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    /// Of the first interface, in the plugins' order: first is the primary address.
    pub addresses: Vec<IpAddr>,
    /// From the plugins' result; empty when they said nothing.
    pub dns: Dns,
}
