//! Parses the values of options: volumes, ports, sizes.

use anyhow::{Context, Result, anyhow, bail};
use cri::v1;

/// `/host:/container`, `/host:/container:ro`: a bind mount.
pub(super) fn volume(text: &str) -> Result<v1::Mount> {
    let parts: Vec<&str> = text.split(':').collect();
    let (host, container, readonly) = match parts.as_slice() {
        [host, container] | [host, container, "rw"] => (*host, *container, false),
        [host, container, "ro"] => (*host, *container, true),
        _ => bail!(
            "--volume {text:?}: use /host/path:/container/path or /host/path:/container/path:ro"
        ),
    };
    let host_path = std::path::absolute(host).with_context(|| format!("--volume {text:?}"))?;
    Ok(v1::Mount {
        host_path: host_path.to_string_lossy().into_owned(),
        container_path: container.to_string(),
        readonly,
        ..Default::default()
    })
}

/// `8080:80`, `127.0.0.1:8080:80`, `[::1]:53:53/udp`.
pub(super) fn port(text: &str) -> Result<v1::PortMapping> {
    let wrong = || anyhow!("--publish {text:?}: use [address:]host:container[/tcp|udp|sctp]");
    let (rest, protocol) = match text.rsplit_once('/') {
        None => (text, v1::Protocol::Tcp),
        Some((rest, "tcp")) => (rest, v1::Protocol::Tcp),
        Some((rest, "udp")) => (rest, v1::Protocol::Udp),
        Some((rest, "sctp")) => (rest, v1::Protocol::Sctp),
        Some(_) => return Err(wrong()),
    };
    let (rest, container) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let (address, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong());
    }
    let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n > 0).ok_or_else(wrong);
    Ok(v1::PortMapping {
        protocol: protocol as i32,
        container_port: i32::from(number(container)?),
        host_port: i32::from(number(host)?),
        host_ip: address.to_string(),
    })
}

/// `512m`, `2g`, `1048576`.
pub(super) fn size(text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let plain = lower.trim_end_matches('b').trim_end_matches('i');
    let (digits, shift) = match plain.char_indices().last() {
        Some((at, 'k')) => (&plain[..at], 10),
        Some((at, 'm')) => (&plain[..at], 20),
        Some((at, 'g')) => (&plain[..at], 30),
        Some((at, 't')) => (&plain[..at], 40),
        _ => (plain, 0),
    };
    digits
        .parse::<i64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|size| *size > 0)
        .ok_or_else(|| anyhow!("size {text:?}: use a number with a unit, such as 512m or 2g"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_writable_by_default() {
        let mount = volume("/a:/b").unwrap();
        assert_eq!((mount.host_path.as_str(), mount.container_path.as_str()), ("/a", "/b"));
        assert!(!mount.readonly && !volume("/a:/b:rw").unwrap().readonly);
        assert!(volume("/a:/b:ro").unwrap().readonly);
        assert!(volume("/a").is_err() && volume("/a:/b:z").is_err());
    }

    #[test]
    fn ports_have_optional_addresses_and_protocols() {
        let plain = port("8080:80").unwrap();
        assert_eq!((plain.host_port, plain.container_port, plain.protocol), (8080, 80, 0));
        let full = port("[::1]:53:5353/udp").unwrap();
        assert_eq!((full.host_ip.as_str(), full.host_port, full.protocol), ("::1", 53, 1));
        assert_eq!(port("127.0.0.1:1:2").unwrap().host_ip, "127.0.0.1");
        for bad in ["80", "0:80", "a:80", "80:80/icmp", "host:1:2", "1:70000"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512m").unwrap(), 512 << 20);
        assert_eq!(size("2GiB").unwrap(), 2 << 30);
        assert_eq!(size("4096").unwrap(), 4096);
        for bad in ["", "m", "-1", "1.5g", "99999999999t"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
