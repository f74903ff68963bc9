//! Connects CNI interfaces with taps. In the pod's network namespace:
//! ```text
//!   host bridge ── veth ═══ eth0 ⇄ tap0 ── VMM ── guest's eth0
//!                            └ tc ingress, mirred redirect, both ways
//! ```
//! The guest's NIC has the MAC, MTU, addresses and routes of the interface, so it replaces the
//! interface for any plugin (bridge, ptp, macvlan, ...).
//!
//! The interface keeps its addresses in the namespace, as plugins need them in CHECK, and in DEL to
//! find their rules (masquerading). The namespace's kernel does not answer for the guest: the
//! redirect takes every frame before the protocol handlers, and the sysctls below prevent
//! unsolicited packets.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::cidr::Cidr;
use crate::model::{Attachment, Interface, Route};
use crate::netns::NetnsError;
use crate::plugin::reply::{ResultIp, Success};
use crate::rtnl::{Link, LinkAddress, LinkRoute, Rtnl, RtnlError};
use crate::tap;

/// Maximum interfaces of a pod; each is a device of the VM.
const MAX_INTERFACES: usize = 8;
/// Maximum routes of a pod; bounds the guest's configuration.
const MAX_ROUTES: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum NicError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Rtnl(#[from] RtnlError),
    #[error("cannot create the tap {name}")]
    Tap { name: String, source: io::Error },
    #[error("cannot open the tap {name}: {hint}")]
    OpenTap { name: String, hint: &'static str, source: io::Error },
    #[error("cannot set {}", .path.display())]
    Sysctl { path: PathBuf, source: io::Error },
    #[error(
        "the network plugins reported success but left no interface in the pod's network \
         namespace {}", .netns.display()
    )]
    NoInterface { netns: PathBuf },
    #[error(
        "the network plugins reported success but assigned no address to the pod's interface {name}"
    )]
    NoAddress { name: String },
    #[error(
        "the pod's interfaces {one} and {other} have the same MAC, so the guest cannot identify them"
    )]
    SameMac { one: String, other: String },
    #[error("the pod has {count} interfaces, the maximum is {MAX_INTERFACES}")]
    TooManyInterfaces { count: usize },
    #[error("the pod has {count} routes, the maximum is {MAX_ROUTES}")]
    TooManyRoutes { count: usize },
    #[error("{} is the host's own network namespace", .path.display())]
    OwnNamespace { path: PathBuf },
    #[error("the tap {name} is not connected with interface {interface}")]
    NotConnected { name: String, interface: String },
}

fn tap_name(n: usize) -> String {
    format!("tap{n}")
}

/// Connects every interface of the thread's namespace with a new tap. `primary` is CNI_IFNAME.
pub fn connect_taps(netns: &Path, primary: &str, result: &Success) -> Result<Attachment, NicError> {
    let mut rtnl = Rtnl::open()?;
    let (links, attachment) = find(&mut rtnl, netns, primary, result)?;
    for (n, link) in links.iter().enumerate() {
        if let Some(one) = links[..n].iter().find(|l| l.mac == link.mac) {
            return Err(NicError::SameMac { one: one.name.clone(), other: link.name.clone() });
        }
    }
    for (n, link) in links.iter().enumerate() {
        let name = tap_name(n);
        tap::create(&name).map_err(|source| NicError::Tap { name: name.clone(), source })?;
        set_sysctls(&link.name, INTERFACE_SYSCTLS)?;
        set_sysctls(&name, TAP_SYSCTLS)?;
        let found = rtnl.links()?.into_iter().find(|l| l.name == name);
        let tap = found.ok_or_else(|| NicError::NotConnected {
            name: name.clone(),
            interface: link.name.clone(),
        })?;
        rtnl.set_mtu(tap.index, link.mtu)?;
        rtnl.set_up(tap.index)?;
        rtnl.set_up(link.index)?;
        rtnl.redirect(link.index, tap.index)?;
        rtnl.redirect(tap.index, link.index)?;
    }
    Ok(attachment)
}

/// Describes the interfaces for processes in the thread's namespace, which use them directly.
pub fn describe_interfaces(
    netns: &Path,
    primary: &str,
    result: &Success,
) -> Result<Attachment, NicError> {
    let (_, attachment) = find(&mut Rtnl::open()?, netns, primary, result)?;
    Ok(Attachment { interfaces: Vec::new(), routes: Vec::new(), ..attachment })
}

fn find(
    rtnl: &mut Rtnl,
    netns: &Path,
    primary: &str,
    result: &Success,
) -> Result<(Vec<Link>, Attachment), NicError> {
    let links = pod_links(rtnl, primary, result)?;
    if links.is_empty() {
        return Err(NicError::NoInterface { netns: netns.to_owned() });
    }
    if links.len() > MAX_INTERFACES {
        return Err(NicError::TooManyInterfaces { count: links.len() });
    }
    let attachment = describe(netns, &links, &rtnl.addresses()?, &rtnl.routes()?, result)?;
    // kubelet would recreate a pod without an address in a loop.
    if attachment.addresses.is_empty() {
        return Err(NicError::NoAddress { name: links[0].name.clone() });
    }
    Ok((links, attachment))
}

/// Sets the loopback interface up, as other runtimes do with the loopback plugin.
pub fn set_up_loopback() -> Result<(), NicError> {
    /// The first link of every network namespace (drivers/net/loopback.c).
    const LOOPBACK: u32 = 1;
    Ok(Rtnl::open()?.set_up(LOOPBACK)?)
}

/// Opens the taps of the interfaces with these names in the thread's namespace.
pub fn open_taps(interfaces: &[String]) -> Result<Vec<std::os::fd::OwnedFd>, NicError> {
    let there: HashSet<String> = Rtnl::open()?.links()?.into_iter().map(|l| l.name).collect();
    interfaces
        .iter()
        .enumerate()
        .map(|(n, interface)| {
            let name = tap_name(n);
            // Opening would create a new tap.
            if !there.contains(&name) {
                let interface = interface.clone();
                return Err(NicError::NotConnected { name, interface });
            }
            open_tap(name)
        })
        .collect()
}

fn open_tap(name: String) -> Result<std::os::fd::OwnedFd, NicError> {
    tap::open(&name).map_err(|source| {
        let hint = match source.raw_os_error() {
            Some(libc::EBUSY) => "another VMM has it open",
            _ => "is the tun driver available?",
        };
        NicError::OpenTap { name, hint, source }
    })
}

/// Whether it has the name of a tap that [`connect_taps`] makes.
fn is_tap(link: &Link) -> bool {
    let number = link.name.strip_prefix("tap").and_then(|n| n.parse::<usize>().ok());
    link.tun && number.is_some_and(|n| n < MAX_INTERFACES)
}

/// Fails if a tap of the calling thread's namespace is open: another VM uses it (TUNSETIFF, EBUSY).
pub fn check_taps_unused() -> Result<(), NicError> {
    for link in Rtnl::open()?.links()?.into_iter().filter(is_tap) {
        open_tap(link.name)?;
    }
    Ok(())
}

/// Undoes [`connect_taps`] in the calling thread's namespace: removes the taps with its names (`tap0` to
/// `tap7`), and the redirections to them. Other links stay.
pub fn disconnect_taps() -> Result<(), NicError> {
    let mut rtnl = Rtnl::open()?;
    let links = rtnl.links()?;
    let taps: Vec<&Link> = links.iter().filter(|link| is_tap(link)).collect();
    for link in links.iter().filter(|link| !link.tun) {
        let targets = rtnl.redirects(link.index)?;
        if taps.iter().any(|tap| targets.contains(&tap.index)) {
            rtnl.delete_ingress(link.index)?;
        }
    }
    for tap in taps {
        rtnl.delete_link(tap.index)?;
    }
    Ok(())
}

/// Checks that all interfaces are connected with their taps.
pub fn check(interfaces: &[Interface]) -> Result<(), NicError> {
    let mut rtnl = Rtnl::open()?;
    let links = rtnl.links()?;
    for (n, interface) in interfaces.iter().enumerate() {
        let name = tap_name(n);
        let find = |name: &str| links.iter().find(|l| l.name == name).map(|l| l.index);
        let joined = match (find(&interface.name), find(&name)) {
            (Some(link), Some(tap)) => {
                rtnl.redirects(link)?.contains(&tap) && rtnl.redirects(tap)?.contains(&link)
            }
            _ => false,
        };
        if !joined {
            return Err(NicError::NotConnected { name, interface: interface.name.clone() });
        }
    }
    Ok(())
}

/// Interfaces of the pod: the primary, those of the result in its order, then others that are up
/// (meta plugins may report the first network only).
fn pod_links(rtnl: &mut Rtnl, primary: &str, result: &Success) -> Result<Vec<Link>, NicError> {
    let mut links: Vec<Link> = rtnl.links()?.into_iter().filter(|l| !l.tun).collect();
    links.sort_by_key(|l| l.index);
    let reported = result.interfaces.iter().filter(|i| !i.sandbox.is_empty());
    let named: Vec<&str> =
        std::iter::once(primary).chain(reported.map(|i| i.name.as_str())).collect();
    let rank = |link: &Link| named.iter().position(|n| *n == link.name).unwrap_or(named.len());
    links.retain(|l| l.up || rank(l) < named.len());
    links.sort_by_key(rank);
    Ok(links)
}

/// Describes the guest's configuration. The kernel's state has precedence, as later plugins may
/// have changed it; missing parts are from the result.
fn describe(
    netns: &Path,
    links: &[Link],
    addresses: &[LinkAddress],
    routes: &[LinkRoute],
    result: &Success,
) -> Result<Attachment, NicError> {
    let mut interfaces = Vec::new();
    for link in links {
        let own = addresses.iter().filter(|a| a.link == link.index && !is_automatic(a));
        let mut own: Vec<Cidr> =
            own.map(|a| adjust_prefix(a.address, link.index, routes)).collect();
        // The result's order determines the primary address.
        own.sort_by_key(|a| {
            result.ips.iter().position(|ip| ip.address.ip == a.ip).unwrap_or(usize::MAX)
        });
        interfaces.push(Interface {
            name: link.name.clone(),
            mac: link.mac,
            mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
            addresses: own.iter().map(Cidr::to_string).collect(),
        });
    }
    // Same as other runtimes: the pod's addresses are those of its primary interface.
    let of_primary = interfaces.iter().take(1).flat_map(|i: &Interface| &i.addresses);
    let addresses: Vec<IpAddr> =
        of_primary.filter_map(|a| a.parse::<Cidr>().ok()).map(|a| a.ip).collect();
    Ok(Attachment {
        netns: netns.to_owned(),
        routes: describe_routes(links, routes, result)?,
        interfaces,
        addresses,
        dns: result.dns.clone(),
    })
}

/// Link-local IPv6 addresses are derived from the MAC, also in the guest.
fn is_automatic(address: &LinkAddress) -> bool {
    address.link_local && address.address.ip.is_ipv6()
}

/// A guest with `10.0.0.5/24` adds a route to `10.0.0.0/24`. If the plugin removed that route (ptp,
/// and others that route all packets over the host), the address gets a full-length prefix.
fn adjust_prefix(address: Cidr, link: u32, routes: &[LinkRoute]) -> Cidr {
    let network = address.network();
    let on_link = |r: &LinkRoute| {
        r.link == link && r.connected && r.gateway.is_none() && r.destination == network
    };
    if routes.iter().any(on_link) { address } else { Cidr::host(address.ip) }
}

fn describe_routes(
    links: &[Link],
    routes: &[LinkRoute],
    result: &Success,
) -> Result<Vec<Route>, NicError> {
    let mut requested: Vec<(u32, Cidr, Option<IpAddr>, &str)> = Vec::new();
    for route in routes.iter().filter(|r| !r.connected) {
        let Some(link) = links.iter().find(|l| l.index == route.link) else { continue };
        requested.push((route.metric, route.destination.network(), route.gateway, &link.name));
    }
    let known: HashSet<Cidr> = requested.iter().map(|w| w.1).collect();
    for route in &result.routes {
        let destination = route.destination.network();
        if known.contains(&destination) {
            continue;
        }
        let of_family =
            result.ips.iter().filter(|ip| ip.address.ip.is_ipv4() == destination.ip.is_ipv4());
        let same_subnet = |ip: &&ResultIp| {
            let gateway = route.gateway.and_then(|g| Cidr::new(g, ip.address.prefix));
            gateway.is_some_and(|g| g.network() == ip.address.network())
        };
        let ip = of_family
            .clone()
            .find(same_subnet)
            .or_else(|| of_family.clone().find(|ip| ip.gateway.is_some()));
        let gateway = route.gateway.or(ip.and_then(|ip| ip.gateway));
        let interface = ip
            .and_then(|ip| result.interfaces.get(ip.interface?))
            .and_then(|i| links.iter().find(|l| l.name == i.name))
            .unwrap_or(&links[0]);
        requested.push((0, destination, gateway, &interface.name));
    }
    if requested.len() > MAX_ROUTES {
        return Err(NicError::TooManyRoutes { count: requested.len() });
    }
    // On-link routes first, as gateways need them. Of two routes to one destination the one with
    // the lower metric is kept.
    requested.sort_by_key(|(metric, _, gateway, _)| (gateway.is_some(), *metric));
    let mut seen = HashSet::new();
    requested.retain(|(_, destination, _, _)| seen.insert(*destination));
    Ok(requested
        .into_iter()
        .map(|(_, destination, gateway, interface)| Route {
            destination: match gateway {
                Some(_) if destination.prefix == 0 => String::new(),
                _ => destination.to_string(),
            },
            gateway: gateway.map(|g| g.to_string()).unwrap_or_default(),
            interface: interface.to_owned(),
        })
        .collect())
}

/// Sysctls that keep the namespace's kernel from sending packets on the pod's interface.
const INTERFACE_SYSCTLS: &[(&str, &str, &str)] = &[
    // No ARP replies, in case a frame passes the redirect.
    ("ipv4", "arp_ignore", "8"),
    // The guest does router solicitation and duplicate address detection.
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "router_solicitations", "0"),
    ("ipv6", "accept_dad", "0"),
    ("ipv6", "dad_transmits", "0"),
];
/// The tap has no addresses; with IPv6 it would send router solicitations to the guest.
const TAP_SYSCTLS: &[(&str, &str, &str)] = &[("ipv6", "disable_ipv6", "1")];

fn set_sysctls(link: &str, settings: &[(&str, &str, &str)]) -> Result<(), NicError> {
    for (family, key, value) in settings {
        let path = PathBuf::from(format!("/proc/sys/net/{family}/conf/{link}/{key}"));
        match fs::write(&path, value) {
            Ok(()) => {}
            // IPv6 is not in the kernel.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // In a container with read-only /proc/sys; the redirect alone is sufficient.
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                tracing::warn!(path = %path.display(), "cannot set a sysctl: {e}");
            }
            Err(source) => return Err(NicError::Sysctl { path, source }),
        }
    }
    Ok(())
}
