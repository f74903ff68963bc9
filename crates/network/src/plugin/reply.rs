//! Results and errors of plugins: CNI spec section 5. The raw result is kept for the next plugin;
//! the parts used here are validated.

use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::cidr::Cidr;
use crate::model::Dns;

/// An error result.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Failure {
    pub code: u64,
    #[serde(default)]
    pub msg: String,
    #[serde(default)]
    pub details: String,
}

/// Error codes of section 5.
pub mod code {
    pub const INCOMPATIBLE_VERSION: u64 = 1;
    pub const UNSUPPORTED_FIELD: u64 = 2;
    /// Unknown container; success for DEL.
    pub const UNKNOWN_CONTAINER: u64 = 3;
    pub const INVALID_ENVIRONMENT: u64 = 4;
    pub const IO_FAILURE: u64 = 5;
    pub const DECODING_FAILURE: u64 = 6;
    pub const INVALID_NETWORK: u64 = 7;
    pub const TRY_AGAIN_LATER: u64 = 11;
    pub const UNAVAILABLE: u64 = 50;
    pub const UNAVAILABLE_LIMITED: u64 = 51;
}

impl Failure {
    /// Meaning of the code; empty for a plugin's own codes.
    pub fn hint(&self) -> &'static str {
        match self.code {
            code::INCOMPATIBLE_VERSION => {
                "the plugin does not support the configuration's cniVersion: lower it or update \
                 the plugins"
            }
            code::UNSUPPORTED_FIELD => "the configuration has a field the plugin does not support",
            code::INVALID_ENVIRONMENT => "the environment is invalid",
            code::IO_FAILURE => "the plugin could not read its input",
            code::DECODING_FAILURE => "the plugin could not decode the configuration",
            code::INVALID_NETWORK => "the network configuration is invalid",
            code::TRY_AGAIN_LATER => "temporary error, try again later",
            code::UNAVAILABLE => "the plugin cannot attach pods now",
            code::UNAVAILABLE_LIMITED => {
                "the plugin cannot attach pods now, and attached ones may have lost connectivity"
            }
            _ => "",
        }
    }

    pub fn parse(stdout: &[u8]) -> Option<Self> {
        let failure: Self = serde_json::from_slice(stdout).ok()?;
        (failure.code != 0 || !failure.msg.is_empty()).then_some(failure)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.msg.trim() {
            "" => f.write_str("no message")?,
            msg => f.write_str(msg)?,
        }
        if !self.details.is_empty() {
            write!(f, " ({})", self.details)?;
        }
        write!(f, ", code {}", self.code)?;
        match self.hint() {
            "" => Ok(()),
            hint => write!(f, ": {hint}"),
        }
    }
}

/// Maximum interfaces, addresses or routes of one result.
const MAX_ENTRIES: usize = 256;

/// The result of ADD.
#[derive(Debug, Clone, PartialEq)]
pub struct Success {
    /// Unchanged, for the next plugin and later operations.
    pub raw: Value,
    pub interfaces: Vec<ResultInterface>,
    pub ips: Vec<ResultIp>,
    pub routes: Vec<ResultRoute>,
    pub dns: Dns,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ResultInterface {
    pub name: String,
    /// Network namespace of the interface; empty for the host's.
    #[serde(default)]
    pub sandbox: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultIp {
    pub address: Cidr,
    pub gateway: Option<IpAddr>,
    /// Index into the interfaces.
    pub interface: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultRoute {
    pub destination: Cidr,
    pub gateway: Option<IpAddr>,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    interfaces: Option<Vec<ResultInterface>>,
    #[serde(default)]
    ips: Option<Vec<WireIp>>,
    #[serde(default)]
    routes: Option<Vec<WireRoute>>,
    #[serde(default)]
    dns: Option<WireDns>,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
    #[serde(default)]
    gateway: Option<String>,
    #[serde(default)]
    interface: Option<i64>,
}

#[derive(Deserialize)]
struct WireRoute {
    dst: String,
    #[serde(default)]
    gw: Option<String>,
}

#[derive(Deserialize)]
struct WireDns {
    #[serde(default)]
    nameservers: Option<Vec<String>>,
    #[serde(default)]
    domain: Option<String>,
    #[serde(default)]
    search: Option<Vec<String>>,
    #[serde(default)]
    options: Option<Vec<String>>,
}

impl Success {
    /// Parses a result; the error describes what is invalid.
    pub fn parse(stdout: &[u8]) -> Result<Self, String> {
        if stdout.iter().all(u8::is_ascii_whitespace) {
            return Err("it printed nothing".into());
        }
        let raw: Value =
            serde_json::from_slice(stdout).map_err(|e| format!("it is not JSON ({e})"))?;
        Self::from_value(raw)
    }

    pub fn from_value(raw: Value) -> Result<Self, String> {
        if !raw.is_object() {
            return Err("it is not a JSON object".into());
        }
        let wire = Wire::deserialize(&raw).map_err(|e| e.to_string())?;
        let interfaces = wire.interfaces.unwrap_or_default();
        let (ips, routes) = (wire.ips.unwrap_or_default(), wire.routes.unwrap_or_default());
        for (what, n) in
            [("interfaces", interfaces.len()), ("ips", ips.len()), ("routes", routes.len())]
        {
            if n > MAX_ENTRIES {
                return Err(format!("it has {n} {what}, the maximum is {MAX_ENTRIES}"));
            }
        }
        let ips = ips.into_iter().map(|ip| ip.check(interfaces.len())).collect::<Result<_, _>>()?;
        let routes = routes
            .into_iter()
            .map(|r| {
                Ok(ResultRoute { destination: r.dst.parse()?, gateway: address(r.gw.as_deref())? })
            })
            .collect::<Result<_, String>>()?;
        Ok(Self { interfaces, ips, routes, dns: wire.dns.map(Dns::from).unwrap_or_default(), raw })
    }
}

impl WireIp {
    fn check(self, interfaces: usize) -> Result<ResultIp, String> {
        let interface = match self.interface {
            None => None,
            // Plugins of version 0.3 use -1 for "none".
            Some(i) if i < 0 => None,
            Some(i) if (i as usize) < interfaces => Some(i as usize),
            Some(i) => {
                return Err(format!(
                    "address {} refers to interface {i}, which is not in the result",
                    self.address
                ));
            }
        };
        Ok(ResultIp {
            address: self.address.parse()?,
            gateway: address(self.gateway.as_deref())?,
            interface,
        })
    }
}

fn address(text: Option<&str>) -> Result<Option<IpAddr>, String> {
    match text {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| format!("{text:?} is not an IP address")),
    }
}

impl From<WireDns> for Dns {
    fn from(wire: WireDns) -> Self {
        let mut searches = wire.search.unwrap_or_default();
        // `domain` is the older form of a search list with one entry.
        if let Some(domain) = wire.domain.filter(|d| !d.is_empty())
            && !searches.contains(&domain)
        {
            searches.insert(0, domain);
        }
        Self {
            servers: wire.nameservers.unwrap_or_default(),
            searches,
            options: wire.options.unwrap_or_default(),
        }
    }
}

/// The result of VERSION.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Versions {
    #[serde(rename = "supportedVersions")]
    pub supported: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_versions_are_parsed() {
        let new = br#"{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},
            {"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","sandbox":"/run/netns/x"}],
            "ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":1},
                   {"address":"fd00::5/64","gateway":"fd00::1","interface":1}],
            "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0","gw":"fd00::1"}],
            "dns":{"nameservers":["10.1.0.1"],"domain":"a.b","search":["c"],"options":["x"]}}"#;
        let s = Success::parse(new).unwrap();
        assert_eq!(s.ips[0].address.to_string(), "10.1.0.5/16");
        assert_eq!(s.ips[1].interface, Some(1));
        assert_eq!(s.routes[1].gateway, Some("fd00::1".parse().unwrap()));
        assert_eq!(s.dns.searches, ["a.b", "c"]);
        let old = br#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.0.5/16",
            "interface":-1}],"dns":{}}"#;
        assert_eq!(Success::parse(old).unwrap().ips[0].interface, None);
        assert_eq!(Success::parse(b"{}").unwrap().ips, []);
    }

    #[test]
    fn invalid_results_are_described() {
        for (text, expected) in [
            ("", "printed nothing"),
            ("hello", "not JSON"),
            ("[]", "not a JSON object"),
            (r#"{"ips":[{"address":"10.1.0.300/16"}]}"#, "10.1.0.300/16"),
            (r#"{"ips":[{"address":"10.1.0.3/40"}]}"#, "10.1.0.3/40"),
            (r#"{"ips":[{"address":"10.1.0.3/8","interface":2}]}"#, "interface 2"),
            (r#"{"routes":[{"dst":"0.0.0.0/0","gw":"gateway"}]}"#, "\"gateway\""),
            (r#"{"ips":3}"#, "expected a sequence"),
        ] {
            let e = Success::parse(text.as_bytes()).unwrap_err();
            assert!(e.contains(expected), "{text}: {e}");
        }
        let many = vec![r#"{"dst":"10.0.0.0/8"}"#; 300].join(",");
        let e = Success::parse(format!(r#"{{"routes":[{many}]}}"#).as_bytes()).unwrap_err();
        assert!(e.contains("300 routes"), "{e}");
    }

    #[test]
    fn a_failure_has_code_message_details_and_hint() {
        let f = Failure::parse(br#"{"code":11,"msg":"pool busy","details":"lock held"}"#).unwrap();
        assert_eq!(
            f.to_string(),
            "pool busy (lock held), code 11: temporary error, try again later"
        );
        assert_eq!(Failure::parse(b"{}"), None);
        assert_eq!(Failure::parse(b"panic: oh"), None);
    }
}
