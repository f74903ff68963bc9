//! An IP address with a prefix length.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    pub fn new(ip: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= full(ip)).then_some(Self { ip, prefix })
    }

    /// The address with a full-length prefix.
    pub fn host(ip: IpAddr) -> Self {
        Self { ip, prefix: full(ip) }
    }

    /// The network address: host bits cleared.
    pub fn network(self) -> Self {
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
            }
        };
        Self { ip, prefix: self.prefix }
    }

    /// First address after the network address; the usual gateway.
    pub fn first_host(self) -> IpAddr {
        match self.network().ip {
            IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits().saturating_add(1))),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits().saturating_add(1))),
        }
    }
}

fn full(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text
            .split_once('/')
            .and_then(|(ip, prefix)| Self::new(ip.parse().ok()?, prefix.parse().ok()?));
        parsed.ok_or_else(|| format!("{text:?} is not an address with a prefix length"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_address_is_computed_for_every_length() {
        for (text, network, first) in [
            ("10.1.2.3/16", "10.1.0.0/16", "10.1.0.1"),
            ("10.1.2.3/0", "0.0.0.0/0", "0.0.0.1"),
            ("10.1.2.3/32", "10.1.2.3/32", "10.1.2.4"),
            ("fd00::1:5/64", "fd00::/64", "fd00::1"),
            ("fd00::5/0", "::/0", "::1"),
        ] {
            let cidr: Cidr = text.parse().unwrap();
            assert_eq!(cidr.network().to_string(), network);
            assert_eq!(cidr.first_host().to_string(), first);
        }
    }

    #[test]
    fn invalid_prefixes_are_refused() {
        for text in ["10.0.0.1", "10.0.0.1/33", "fd00::/129", "x/8", "10.0.0.1/-1", ""] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
