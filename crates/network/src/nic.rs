//! The joint between what CNI made and what the guest gets. In the pod's network namespace:
//! ```text
//!   host bridge ── veth ═══ eth0 ⇄ tap0 ── VMM ── guest's eth0
//!                            └ tc ingress, mirred redirect, both ways
//! ```
//! The guest's NIC has the MAC, MTU, addresses and routes of the interface, so to the network the
//! guest *is* that interface, whatever the plugin (bridge, ptp, macvlan, ...) made it of.
//!
//! The interface keeps its addresses on the host side too, because plugins look for them at CHECK,
//! and at DEL to know which rules (masquerading) to take away. That the namespace's own kernel
//! never answers in the guest's place is the redirect's doing: it steals every frame before the
//! protocols see it, and the sysctls below keep the kernel from speaking unasked.

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

/// Interfaces one pod may have: each costs a device of the VM, and a plugin gone wild must not use
/// them up.
const MAX_INTERFACES: usize = 8;
/// Routes one pod may have; a guest configuration stays small whatever a routing daemon put there.
const MAX_ROUTES: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum NicError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Rtnl(#[from] RtnlError),
    #[error("cannot make the tap {name}")]
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
    #[error("the network plugins reported success but gave the pod's interface {name} no address")]
    NoAddress { name: String },
    #[error(
        "the pod's interfaces {one} and {other} have the same MAC: a guest cannot tell them apart"
    )]
    SameMac { one: String, other: String },
    #[error("the pod has {count} interfaces, {MAX_INTERFACES} at most are possible")]
    TooManyInterfaces { count: usize },
    #[error("the pod has {count} routes, {MAX_ROUTES} at most are possible")]
    TooManyRoutes { count: usize },
    #[error("the tap {name} of interface {interface} is not joined to it")]
    Severed { name: String, interface: String },
}

fn tap_name(n: usize) -> String {
    format!("tap{n}")
}

/// Joins every interface of the calling thread's namespace to a tap of its own. `primary` is the
/// one the plugins were asked for.
pub fn join(netns: &Path, primary: &str, result: &Success) -> Result<Attachment, NicError> {
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
        silence(&link.name, SILENT_INTERFACE)?;
        silence(&name, SILENT_TAP)?;
        let found = rtnl.links()?.into_iter().find(|l| l.name == name);
        let tap = found.ok_or_else(|| NicError::Severed {
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

/// What the plugins have made, for processes that live in the calling thread's namespace: the
/// interfaces are theirs as they are.
pub fn look(netns: &Path, primary: &str, result: &Success) -> Result<Attachment, NicError> {
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
    // A kubelet makes a pod without an address anew, over and over.
    if attachment.addresses.is_empty() {
        return Err(NicError::NoAddress { name: links[0].name.clone() });
    }
    Ok((links, attachment))
}

/// The loopback chain of other runtimes does no more than this.
pub fn set_up_loopback() -> Result<(), NicError> {
    /// The first link of every network namespace (drivers/net/loopback.c).
    const LOOPBACK: u32 = 1;
    Ok(Rtnl::open()?.set_up(LOOPBACK)?)
}

/// Opens the interfaces' taps in the calling thread's namespace.
pub fn open_taps(interfaces: &[Interface]) -> Result<Vec<std::os::fd::OwnedFd>, NicError> {
    let there: HashSet<String> = Rtnl::open()?.links()?.into_iter().map(|l| l.name).collect();
    (0..interfaces.len())
        .map(|n| {
            let name = tap_name(n);
            // Opening would make a new one, joined to nothing.
            if !there.contains(&name) {
                let interface = interfaces[n].name.clone();
                return Err(NicError::Severed { name, interface });
            }
            tap::open(&name).map_err(|source| {
                let hint = match source.raw_os_error() {
                    Some(libc::EBUSY) => "another VMM has it open",
                    _ => "is the kernel's tun driver there?",
                };
                NicError::OpenTap { name, hint, source }
            })
        })
        .collect()
}

/// Undoes [`join`] in the calling thread's namespace: takes away the taps that a link is joined to, and
/// the joints. What is not ours stays.
pub fn part() -> Result<(), NicError> {
    let mut rtnl = Rtnl::open()?;
    let links = rtnl.links()?;
    let is_tap = |link: &&Link| {
        let number = link.name.strip_prefix("tap").and_then(|n| n.parse::<usize>().ok());
        link.tun && number.is_some_and(|n| n < MAX_INTERFACES)
    };
    let taps: Vec<&Link> = links.iter().filter(is_tap).collect();
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

/// Whether the joints still stand.
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
            return Err(NicError::Severed { name, interface: interface.name.clone() });
        }
    }
    Ok(())
}

/// The interfaces that are the pod's: the primary, those the result names in its order, then others
/// that are up (added by plugins that call plugins and report only the first network).
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

/// What the guest has to set up. The kernel's own state is the truth (plugins later in the chain
/// may have changed what the result says); the result fills in what the kernel does not have.
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
            own.map(|a| with_or_without_network(a.address, link.index, routes)).collect();
        // The result's order names the primary address.
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
    // As other runtimes do it: a pod is known by the addresses of its primary interface.
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

/// Link-local IPv6 comes from the MAC, which the guest has as well.
fn is_automatic(address: &LinkAddress) -> bool {
    address.link_local && address.address.ip.is_ipv6()
}

/// A guest that is given `10.0.0.5/24` makes the route to `10.0.0.0/24` itself. Where the plugin
/// took that route away (ptp, and others that route every packet over the host), the guest is given
/// the address alone.
fn with_or_without_network(address: Cidr, link: u32, routes: &[LinkRoute]) -> Cidr {
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
    let mut wanted: Vec<(u32, Cidr, Option<IpAddr>, &str)> = Vec::new();
    for route in routes.iter().filter(|r| !r.connected) {
        let Some(link) = links.iter().find(|l| l.index == route.link) else { continue };
        wanted.push((route.metric, route.destination.network(), route.gateway, &link.name));
    }
    let known: HashSet<Cidr> = wanted.iter().map(|w| w.1).collect();
    for route in &result.routes {
        let destination = route.destination.network();
        if known.contains(&destination) {
            continue;
        }
        let of_family =
            result.ips.iter().filter(|ip| ip.address.ip.is_ipv4() == destination.ip.is_ipv4());
        let beside = |ip: &&ResultIp| {
            let gateway = route.gateway.and_then(|g| Cidr::new(g, ip.address.prefix));
            gateway.is_some_and(|g| g.network() == ip.address.network())
        };
        let ip = of_family
            .clone()
            .find(beside)
            .or_else(|| of_family.clone().find(|ip| ip.gateway.is_some()));
        let gateway = route.gateway.or(ip.and_then(|ip| ip.gateway));
        let interface = ip
            .and_then(|ip| result.interfaces.get(ip.interface?))
            .and_then(|i| links.iter().find(|l| l.name == i.name))
            .unwrap_or(&links[0]);
        wanted.push((0, destination, gateway, &interface.name));
    }
    if wanted.len() > MAX_ROUTES {
        return Err(NicError::TooManyRoutes { count: wanted.len() });
    }
    // Gateways must be reachable when their route is added; of two routes to the same place the
    // one with the lower metric comes first, and the kernel refuses the second.
    wanted.sort_by_key(|(metric, _, gateway, _)| (gateway.is_some(), *metric));
    let mut seen = HashSet::new();
    wanted.retain(|(_, destination, _, _)| seen.insert(*destination));
    Ok(wanted
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

/// Keeps the namespace's kernel from speaking on the pod's interface on its own account.
const SILENT_INTERFACE: &[(&str, &str, &str)] = &[
    // Never answer ARP, should a frame ever get past the redirect.
    ("ipv4", "arp_ignore", "8"),
    // The guest solicits routers, takes their advertisements and looks for duplicates.
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "router_solicitations", "0"),
    ("ipv6", "accept_dad", "0"),
    ("ipv6", "dad_transmits", "0"),
];
/// The tap has no addresses at all; with IPv6 it would greet the guest with its own.
const SILENT_TAP: &[(&str, &str, &str)] = &[("ipv6", "disable_ipv6", "1")];

fn silence(link: &str, settings: &[(&str, &str, &str)]) -> Result<(), NicError> {
    for (family, key, value) in settings {
        let path = PathBuf::from(format!("/proc/sys/net/{family}/conf/{link}/{key}"));
        match fs::write(&path, value) {
            Ok(()) => {}
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // Inside a container; the redirect does the greater part anyway.
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                tracing::warn!(path = %path.display(), "cannot set a sysctl: {e}");
            }
            Err(source) => return Err(NicError::Sysctl { path, source }),
        }
    }
    Ok(())
}
