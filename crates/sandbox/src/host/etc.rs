//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a pod.

use std::net::IpAddr;

use crate::model::Dns;

/// File name in the pod's `etc` volume, and its path in containers.
pub(crate) const FILES: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];

pub(crate) fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for address in addresses {
            text.push_str(&format!("{address}\t{hostname}\n"));
        }
    }
    text
}

/// resolv.conf(5): the pod's DNS configuration, otherwise its network's, otherwise the host's. A
/// loopback resolver of the host is not reachable from the pod and is dropped.
pub(crate) fn resolv_conf(pod: &Dns, network: &Dns, host: &str) -> String {
    let chosen = [pod, network].into_iter().find(|d| **d != Dns::default());
    match chosen {
        Some(dns) => {
            let mut text = String::new();
            if !dns.searches.is_empty() {
                text.push_str(&format!("search {}\n", dns.searches.join(" ")));
            }
            for server in &dns.servers {
                text.push_str(&format!("nameserver {server}\n"));
            }
            if !dns.options.is_empty() {
                text.push_str(&format!("options {}\n", dns.options.join(" ")));
            }
            text
        }
        None => host.lines().filter(|l| !is_loopback_server(l)).map(|l| format!("{l}\n")).collect(),
    }
}

fn is_loopback_server(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.next() == Some("nameserver")
        && words
            .next()
            .and_then(|w| w.split('%').next()?.parse::<IpAddr>().ok())
            .is_some_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(server: &str) -> Dns {
        Dns { servers: vec![server.into()], ..Dns::default() }
    }

    #[test]
    fn dns_of_the_pod_precedes_the_networks_and_the_hosts() {
        let none = Dns::default();
        let host = "nameserver 127.0.0.53\nnameserver 9.9.9.9\nsearch home\n";
        assert_eq!(resolv_conf(&dns("1.1.1.1"), &dns("2.2.2.2"), host), "nameserver 1.1.1.1\n");
        assert_eq!(resolv_conf(&none, &dns("2.2.2.2"), host), "nameserver 2.2.2.2\n");
        assert_eq!(resolv_conf(&none, &none, host), "nameserver 9.9.9.9\nsearch home\n");
    }

    #[test]
    fn every_address_of_the_pod_has_its_name() {
        let text = hosts("web", &["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);
        assert!(text.ends_with("10.0.0.2\tweb\nfd00::2\tweb\n"));
    }
}
