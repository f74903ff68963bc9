//! The pod's network interfaces and routes, with the values of the host's CNI result.

use std::net::IpAddr;

use agent_api::v1;
use nix::errno::Errno;

use super::devices;
use super::netlink::{
    IFA_ADDRESS, IFA_BROADCAST, IFA_LOCAL, IFLA_IFNAME, IFLA_MTU, NLM_F_CREATE, NLM_F_REPLACE,
    Netlink, RTA_DST, RTA_GATEWAY, RTA_OIF, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE, Request,
};
use crate::error::{Context, Error, Result};

/// Maximum length of an interface name (IFNAMSIZ without the NUL).
const MAX_NAME: usize = 15;
/// Maximum interfaces, addresses and routes of a pod in total.
const MAX_ENTRIES: usize = 4096;

// uapi/linux/if_addr.h, rtnetlink.h, if.h
const IFA_F_NODAD: u8 = 0x02;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

/// An address with a prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    prefix: u8,
}

fn cidr(text: &str, field: &'static str) -> Result<Cidr> {
    let bad = || Error::invalid(field, format!("{text:?} is not an address with a prefix length"));
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let prefix = prefix.parse().map_err(|_| bad())?;
    if prefix > if address.is_ipv4() { 32 } else { 128 } {
        return Err(bad());
    }
    Ok(Cidr { address, prefix })
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn index(name: &str) -> Result<i32> {
    let index = nix::net::if_::if_nametoindex(name)
        .map_err(|_| Error::NotFound { what: "interface", id: name.to_owned() })?;
    i32::try_from(index).map_err(|_| Error::invalid("interface", "index out of range"))
}

/// `struct ifinfomsg` that sets or clears IFF_UP.
fn link(index: i32, up: Option<bool>) -> Request {
    let mut body = [0u8; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    if let Some(up) = up {
        body[8..12].copy_from_slice(&(if up { IFF_UP } else { 0 }).to_ne_bytes());
        body[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    }
    Request::new(RTM_NEWLINK, 0).body(&body)
}

pub fn loopback_up() -> Result<()> {
    let what = || "bring the loopback interface up".to_owned();
    Netlink::open().and_then(|netlink| netlink.call(link(1, Some(true)))).context(what)
}

/// Configures all interfaces, then the routes. Idempotent.
pub fn configure(interfaces: &[v1::Interface], routes: &[v1::Route]) -> Result<()> {
    let addresses: usize = interfaces.iter().map(|each| 1 + each.addresses.len()).sum();
    if addresses + routes.len() > MAX_ENTRIES {
        return Err(Error::Exhausted { what: "addresses and routes", limit: MAX_ENTRIES as u64 });
    }
    if interfaces.is_empty() && routes.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open().context(|| "open netlink".to_owned())?;
    for interface in interfaces {
        set_up(&netlink, interface)?;
    }
    for route in routes {
        add_route(&netlink, route)?;
    }
    Ok(())
}

fn set_up(netlink: &Netlink, wanted: &v1::Interface) -> Result<()> {
    let name = wanted.name.as_str();
    if name.is_empty() || name.len() > MAX_NAME || name.contains(['/', ' ', '\0', ':']) {
        return Err(Error::invalid("interface name", format!("{name:?} is not a valid name")));
    }
    let present = devices::interface(&wanted.mac)
        .ok_or_else(|| Error::NotFound { what: "interface with MAC", id: wanted.mac.clone() })?;
    let index = index(&present)?;
    if present != name {
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        // An interface can only be renamed while it is down.
        netlink
            .call(link(index, Some(false)))
            .and_then(|()| netlink.call(link(index, None).attribute(IFLA_IFNAME, &text)))
            .context(|| format!("rename interface {present} to {name}"))?;
    }
    if wanted.mtu != 0 {
        netlink
            .call(link(index, None).attribute(IFLA_MTU, &wanted.mtu.to_ne_bytes()))
            .context(|| format!("set MTU {} of {name}", wanted.mtu))?;
    }
    netlink.call(link(index, Some(true))).context(|| format!("bring {name} up"))?;
    for text in &wanted.addresses {
        let Cidr { address, prefix } = cidr(text, "address")?;
        let mut body = [0u8; 8];
        // IFA_F_NODAD: IPAM guarantees a unique address, and duplicate address detection would keep
        // it unusable for a second.
        (body[0], body[1], body[2]) = (family(address), prefix, IFA_F_NODAD);
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut request = Request::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)
            .body(&body)
            .address(IFA_LOCAL, address)
            .address(IFA_ADDRESS, address);
        if let IpAddr::V4(address) = address
            && prefix < 31
        {
            let broadcast = u32::from(address) | (u32::MAX >> prefix);
            request = request.address(IFA_BROADCAST, IpAddr::V4(broadcast.into()));
        }
        netlink.call(request).context(|| format!("add address {text} to {name}"))?;
    }
    Ok(())
}

fn add_route(netlink: &Netlink, route: &v1::Route) -> Result<()> {
    let what = || {
        format!(
            "add route to {:?} through {:?} on {}",
            route.destination, route.gateway, route.interface
        )
    };
    let gateway: Option<IpAddr> =
        match route.gateway.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                Error::invalid("route.gateway", format!("{text:?} is not an address"))
            })?),
        };
    let destination = match (route.destination.as_str(), gateway) {
        ("", Some(gateway)) => {
            let any = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            cidr(any, "route.destination")?
        }
        ("", None) => cidr("0.0.0.0/0", "route.destination")?,
        (text, _) => cidr(text, "route.destination")?,
    };
    if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.address.is_ipv4()) {
        return Err(Error::invalid("route.gateway", "is of another family than the destination"));
    }
    let request = |flags: u32| -> Result<Request> {
        let scope = if gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        // struct rtmsg
        let mut body = [0u8; 12];
        body[0] = family(destination.address);
        body[1] = destination.prefix;
        (body[4], body[5], body[6], body[7]) = (RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST);
        body[8..12].copy_from_slice(&flags.to_ne_bytes());
        let mut request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE).body(&body);
        if destination.prefix != 0 {
            request = request.address(RTA_DST, destination.address);
        }
        if let Some(gateway) = gateway {
            request = request.address(RTA_GATEWAY, gateway);
        }
        if !route.interface.is_empty() {
            request = request.attribute(RTA_OIF, &index(&route.interface)?.to_ne_bytes());
        }
        Ok(request)
    };
    match netlink.call(request(0)?) {
        Ok(()) => Ok(()),
        // A gateway outside of the interface's prefixes (with a /32 address, as many CNI plugins
        // assign): retried as on-link.
        Err(error)
            if gateway.is_some()
                && !route.interface.is_empty()
                && [
                    Errno::ENETUNREACH as i32,
                    Errno::EHOSTUNREACH as i32,
                    Errno::EINVAL as i32,
                ]
                .contains(&error.raw_os_error().unwrap_or(0)) =>
        {
            netlink.call(request(RTNH_F_ONLINK)?).context(what)
        }
        Err(error) => Err(error).context(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_a_prefix_length_of_their_family() {
        assert_eq!(
            cidr("10.1.2.3/24", "a").unwrap(),
            Cidr { address: "10.1.2.3".parse().unwrap(), prefix: 24 }
        );
        assert_eq!(cidr("fd00::1/64", "a").unwrap().prefix, 64);
        for bad in ["10.1.2.3", "10.1.2.3/33", "::/129", "x/1", "1.2.3.4/-1", "/8"] {
            assert!(cidr(bad, "a").is_err(), "{bad}");
        }
    }
}
