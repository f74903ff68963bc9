//! A pod's network in its record.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::convert::{all, same_fields};
use crate::model::Dns;
use crate::ports::{Attachment, Interface, Route};

#[derive(Default, Serialize, Deserialize)]
pub(super) struct StoredAttachment {
    netns: PathBuf,
    interfaces: Vec<StoredInterface>,
    routes: Vec<StoredRoute>,
    addresses: Vec<IpAddr>,
    dns: StoredDns,
}

#[derive(Serialize, Deserialize)]
struct StoredInterface {
    name: String,
    mac: [u8; 6],
    mtu: u16,
    /// CIDR notation.
    addresses: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct StoredRoute {
    /// CIDR notation; empty: default route.
    destination: String,
    /// Empty: on link.
    gateway: String,
    interface: String,
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct StoredDns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

same_fields!(StoredInterface = Interface { name, mac, mtu, addresses });
same_fields!(StoredRoute = Route { destination, gateway, interface });
same_fields!(StoredDns = Dns { servers, searches, options });

impl From<Attachment> for StoredAttachment {
    fn from(live: Attachment) -> Self {
        let Attachment { netns, interfaces, routes, addresses, dns } = live;
        let (interfaces, routes) = (all(interfaces), all(routes));
        Self { netns, interfaces, routes, addresses, dns: dns.into() }
    }
}

impl From<StoredAttachment> for Attachment {
    fn from(stored: StoredAttachment) -> Self {
        let StoredAttachment { netns, interfaces, routes, addresses, dns } = stored;
        let (interfaces, routes) = (all(interfaces), all(routes));
        Self { netns, interfaces, routes, addresses, dns: dns.into() }
    }
}
