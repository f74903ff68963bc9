//! A network configuration for a single node: printed by `nacelled config cni`, and built in for
//! pods that ask for the default network on a host without CNI configuration.

use std::path::Path;

use serde_json::{Value, json};

use crate::cidr::Cidr;
use crate::plugin::conf::{ConfError, Network, SpecVersion};

pub const DEFAULT_IPV4: &str = "10.88.0.0/16";
pub const DEFAULT_IPV6: &str = "fd00:88::/64";

/// The built-in network has a name, a bridge and subnets of its own, so that it is not in the way of a
/// configuration that comes later. 10.88.0.0/16 is also Podman's default.
pub(crate) const BUILT_IN_NAME: &str = "nacelle-default";
const BUILT_IN_BRIDGE: &str = "nacelle-def0";
const BUILT_IN_IPV4: &str = "10.213.0.0/16";
const BUILT_IN_IPV6: &str = "fd00:213::/64";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    #[error("{0}")]
    Text(String),
    #[error("{subnet} is not an {family} network")]
    Family { subnet: String, family: &'static str },
    #[error("{subnet} is too small for pods")]
    Small { subnet: String },
    #[error("a network needs an IPv4 or an IPv6 subnet")]
    None,
}

/// Shown in errors where the path of a configuration file is shown otherwise.
const BUILT_IN: &str = "(built-in network)";

/// A bridge network with host-local IPAM for the given subnets, masquerading and hostPorts. Needs
/// the plugins of Debian's package containernetworking-plugins.
pub fn default_conflist(ipv4: Option<&str>, ipv6: Option<&str>) -> Result<String, SubnetError> {
    Ok(format!("{:#}\n", conflist("nacelle", "nacelle0", ipv4, ipv6)?))
}

/// The default IPv6 subnet, if this host has IPv6. The bridge plugin fails otherwise.
pub fn host_ipv6() -> Option<&'static str> {
    has_ipv6(Path::new("/proc")).then_some(DEFAULT_IPV6)
}

/// The network of pods that ask for the default one.
pub(crate) fn built_in() -> Result<Network, ConfError> {
    let ipv6 = has_ipv6(Path::new("/proc")).then_some(BUILT_IN_IPV6);
    let list = conflist(BUILT_IN_NAME, BUILT_IN_BRIDGE, Some(BUILT_IN_IPV4), ipv6);
    let list = list.map_err(|error| ConfError::Invalid {
        path: BUILT_IN.into(),
        problem: error.to_string(),
    })?;
    Network::from_value(BUILT_IN.into(), list)
}

fn has_ipv6(proc: &Path) -> bool {
    let switch = proc.join("sys/net/ipv6/conf/all/disable_ipv6");
    // The file is missing where the kernel has no IPv6 (`ipv6.disable=1`).
    std::fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0")
}

fn conflist(
    name: &str,
    bridge: &str,
    ipv4: Option<&str>,
    ipv6: Option<&str>,
) -> Result<Value, SubnetError> {
    let mut ranges: Vec<Value> = Vec::new();
    let mut routes: Vec<Value> = Vec::new();
    for (text, is_v4, family, any) in
        [(ipv4, true, "IPv4", "0.0.0.0/0"), (ipv6, false, "IPv6", "::/0")]
    {
        let Some(text) = text else { continue };
        let subnet = text.parse::<Cidr>().map_err(SubnetError::Text)?.network();
        if subnet.ip.is_ipv4() != is_v4 {
            return Err(SubnetError::Family { subnet: text.to_owned(), family });
        }
        // Network address, gateway, one pod, broadcast.
        let longest = if is_v4 { 30 } else { 126 };
        if subnet.prefix > longest {
            return Err(SubnetError::Small { subnet: text.to_owned() });
        }
        ranges.push(json!([{
            "subnet": subnet.to_string(),
            "gateway": subnet.first_host().to_string(),
        }]));
        routes.push(json!({ "dst": any }));
    }
    if ranges.is_empty() {
        return Err(SubnetError::None);
    }
    Ok(json!({
        // Supported by all plugin releases since 2022.
        "cniVersion": SpecVersion::V1_0_0.as_str(),
        "name": name,
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                "isGateway": true,
                "isDefaultGateway": false,
                "ipMasq": true,
                // Lets a pod connect to its own hostPort.
                "hairpinMode": true,
                "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
            },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
            // Accepts the pods' packets on hosts whose FORWARD policy is DROP.
            { "type": "firewall", "backend": "iptables" },
        ],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::conf::Network;

    #[test]
    fn the_default_is_a_valid_dual_stack_network() {
        let text = default_conflist(Some(DEFAULT_IPV4), Some(DEFAULT_IPV6)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-nacelle.conflist"), &text).unwrap();
        let network = Network::load(dir.path()).unwrap();
        assert_eq!(network.name, "nacelle");
        let kinds: Vec<_> = network.plugins.iter().map(|p| p.kind.as_str()).collect();
        assert_eq!(kinds, ["bridge", "portmap", "firewall"]);
        assert!(text.contains("10.88.0.1") && text.contains("fd00:88::1"));
    }

    #[test]
    fn the_built_in_network_has_ipv6_where_the_host_has_it() {
        let network = built_in().unwrap();
        assert_eq!(network.name, BUILT_IN_NAME);
        // IFNAMSIZ.
        assert!(BUILT_IN_BRIDGE.len() < 16);
        let proc = tempfile::tempdir().unwrap();
        assert!(!has_ipv6(proc.path()));
        let all = proc.path().join("sys/net/ipv6/conf/all");
        std::fs::create_dir_all(&all).unwrap();
        for (text, expected) in [("0\n", true), ("1\n", false)] {
            std::fs::write(all.join("disable_ipv6"), text).unwrap();
            assert_eq!(has_ipv6(proc.path()), expected, "{text:?}");
        }
    }

    #[test]
    fn invalid_subnets_are_refused() {
        for (v4, v6, expected) in [
            (None, None, "needs an IPv4"),
            (Some("fd00::/64"), None, "not an IPv4"),
            (None, Some("10.0.0.0/8"), "not an IPv6"),
            (Some("10.0.0.0/31"), None, "too small"),
            (Some("10.0.0"), None, "not an address"),
        ] {
            let e = default_conflist(v4, v6).unwrap_err().to_string();
            assert!(e.contains(expected), "{e}");
        }
    }
}
