//! RunPodSandbox's request to a [`PodSpec`].

use std::collections::BTreeMap;
use std::path::{Component, Path};

use sandbox::model::{Dns, Meta, PodSpec, PortMapping, Protocol};

use super::{Refusal, known, resources, security};
use crate::config::Config;
use crate::v1;

/// HOST_NAME_MAX of Linux, hostname(7).
const MAX_HOSTNAME: usize = 64;

pub fn to_spec(
    request: &v1::PodSandboxConfig,
    handler: &str,
    host_cpus: usize,
    config: &Config,
) -> Result<PodSpec, Refusal> {
    if !handler.is_empty() && !config.handlers.iter().any(|known| known == handler) {
        return Err(Refusal::invalid(
            "runtime_handler",
            format!("{handler:?} is not one of {:?}", config.handlers),
        ));
    }
    if request.windows.is_some() {
        return Err(Refusal::unsupported("windows", "this is a Linux node"));
    }
    let linux = request.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    security::namespaces(context.namespace_options.as_ref())
        .and_then(|()| {
            security::mandatory_access(
                context.selinux_options.as_ref(),
                context.apparmor.as_ref(),
                "",
            )
        })
        .map_err(|refusal| refusal.inside("linux.security_context"))?;
    let size =
        resources::vm_size(linux.resources.as_ref(), linux.overhead.as_ref(), host_cpus, config)?;
    check_sysctls(&linux.sysctls)?;
    let dns = request.dns_config.clone().unwrap_or_default();
    check_dns(&dns)?;
    Ok(PodSpec {
        meta: metadata(request)?,
        hostname: hostname(&request.hostname)?,
        handler: handler.to_string(),
        cgroup_parent: inner_path("linux.cgroup_parent", &linux.cgroup_parent)?,
        log_directory: log_directory(&request.log_directory)?,
        sysctls: linux.sysctls,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        ports: ports(&request.port_mappings)?,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        origin: serde_json::to_value(request).unwrap_or_default(),
    })
}

fn metadata(request: &v1::PodSandboxConfig) -> Result<Meta, Refusal> {
    let metadata = request.metadata.clone().unwrap_or_default();
    if metadata.name.is_empty() {
        return Err(Refusal::invalid("metadata.name", "empty; a pod needs a name"));
    }
    Ok(Meta {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        attempt: metadata.attempt,
        labels: request.labels.clone(),
        annotations: request.annotations.clone(),
    })
}

fn hostname(name: &str) -> Result<String, Refusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_';
    if name.len() > MAX_HOSTNAME || !name.bytes().all(plain) {
        return Err(Refusal::invalid(
            "hostname",
            format!("{name:?} has other characters than letters, digits, '-', '.', or is too long"),
        ));
    }
    Ok(name.to_string())
}

fn log_directory(path: &str) -> Result<String, Refusal> {
    if !path.is_empty() && !Path::new(path).is_absolute() {
        return Err(Refusal::invalid("log_directory", format!("{path:?} is not absolute")));
    }
    inner_path("log_directory", path)
}

fn inner_path(field: &str, path: &str) -> Result<String, Refusal> {
    let upwards = Path::new(path).components().any(|part| part == Component::ParentDir);
    if upwards || path.contains('\0') {
        return Err(Refusal::invalid(field, format!("{path:?} leads upwards")));
    }
    Ok(path.to_string())
}

/// The words end up in lines of /etc/resolv.conf, which a line break among them would forge.
fn check_dns(dns: &v1::DnsConfig) -> Result<(), Refusal> {
    for (field, words) in
        [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)]
    {
        if let Some(word) = words.iter().find(|word| {
            word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control())
        }) {
            return Err(Refusal::invalid(
                format!("dns_config.{field}"),
                format!("{word:?} is empty or holds white space"),
            ));
        }
    }
    Ok(())
}

/// In a pod's own kernel every sysctl is the pod's, so all names are taken; the guest refuses what
/// its kernel does not have.
fn check_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
    for (name, value) in sysctls {
        let sound = !name.is_empty()
            && name.bytes().all(plain)
            && !name.contains("..")
            && !name.starts_with(['.', '/']);
        if !sound {
            return Err(Refusal::invalid("linux.sysctls", format!("{name:?} is no sysctl")));
        }
        if value.contains('\0') {
            return Err(Refusal::invalid("linux.sysctls", format!("{name}: a zero byte in it")));
        }
    }
    Ok(())
}

/// Mappings without a host port only say what the pod listens on.
fn ports(mappings: &[v1::PortMapping]) -> Result<Vec<PortMapping>, Refusal> {
    let mut ports = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let field = |name: &str| format!("port_mappings[{index}].{name}");
        let port = |name: &str, value: i32| {
            u16::try_from(value)
                .map_err(|_| Refusal::invalid(field(name), format!("{value} is no port")))
        };
        let host_port = port("host_port", mapping.host_port)?;
        let container_port = port("container_port", mapping.container_port)?;
        if host_port == 0 {
            continue;
        }
        if container_port == 0 {
            return Err(Refusal::invalid(field("container_port"), "0 is no port"));
        }
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                Refusal::invalid(field("host_ip"), format!("{text:?} is no address"))
            })?),
        };
        let protocol = match known(&field("protocol"), mapping.protocol)? {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        };
        ports.push(PortMapping { protocol, container_port, host_port, host_ip });
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "web".into(),
                uid: "u".into(),
                namespace: "shop".into(),
                attempt: 1,
            }),
            ..Default::default()
        }
    }

    fn convert(request: &v1::PodSandboxConfig) -> Result<PodSpec, Refusal> {
        to_spec(request, "", 4, &Config::default())
    }

    fn linux(linux: v1::LinuxPodSandboxConfig) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig { linux: Some(linux), ..request() }
    }

    #[test]
    fn a_plain_request_becomes_a_pod_of_default_size() {
        let spec = convert(&request()).unwrap();
        assert_eq!((spec.meta.name.as_str(), spec.meta.namespace.as_str()), ("web", "shop"));
        assert_eq!((spec.vcpus, spec.memory_mib), (None, None));
        assert_eq!(spec.origin["metadata"]["attempt"], 1);
    }

    #[test]
    fn only_configured_handlers_are_known() {
        let config = Config::default();
        assert_eq!(to_spec(&request(), "nacelle", 4, &config).unwrap().handler, "nacelle");
        assert!(to_spec(&request(), "runc", 4, &config).is_err());
    }

    #[test]
    fn ports_of_the_host_are_mapped_and_others_left_away() {
        let mapping = |container_port, host_port, host_ip: &str| v1::PortMapping {
            protocol: v1::Protocol::Udp as i32,
            container_port,
            host_port,
            host_ip: host_ip.into(),
        };
        let with = |mapping| v1::PodSandboxConfig { port_mappings: vec![mapping], ..request() };
        assert!(convert(&with(mapping(80, 0, ""))).unwrap().ports.is_empty());
        let ports = convert(&with(mapping(53, 5353, "::1"))).unwrap().ports;
        assert_eq!(ports[0].protocol, Protocol::Udp);
        assert_eq!(ports[0].host_ip.unwrap().to_string(), "::1");
        for bad in [mapping(0, 1, ""), mapping(80, 70_000, ""), mapping(80, 1, "host")] {
            assert!(convert(&with(bad)).is_err());
        }
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        let base = request();
        let host_network = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(v1::NamespaceOption { network: 2, ..Default::default() }),
            ..Default::default()
        };
        let sysctl = |name: &str| v1::LinuxPodSandboxConfig {
            sysctls: [(name.to_string(), "1".to_string())].into(),
            ..Default::default()
        };
        let table = [
            (v1::PodSandboxConfig { metadata: None, ..base.clone() }, "metadata.name"),
            (v1::PodSandboxConfig { hostname: "a b".into(), ..base.clone() }, "hostname"),
            (v1::PodSandboxConfig { hostname: "a".repeat(65), ..base.clone() }, "hostname"),
            (v1::PodSandboxConfig { log_directory: "x".into(), ..base.clone() }, "log_directory"),
            (v1::PodSandboxConfig { log_directory: "/a/../b".into(), ..base }, "log_directory"),
            (linux(sysctl("net/../../x")), "linux.sysctls"),
            (linux(sysctl("a b")), "linux.sysctls"),
            (
                v1::PodSandboxConfig {
                    dns_config: Some(v1::DnsConfig {
                        searches: vec!["a\nnameserver 6.6.6.6".into()],
                        ..Default::default()
                    }),
                    ..request()
                },
                "dns_config.searches",
            ),
            (
                linux(v1::LinuxPodSandboxConfig {
                    cgroup_parent: "/a/../..".into(),
                    ..Default::default()
                }),
                "linux.cgroup_parent",
            ),
            (
                linux(v1::LinuxPodSandboxConfig {
                    security_context: Some(host_network),
                    ..Default::default()
                }),
                "linux.security_context.namespace_options.network",
            ),
        ];
        for (request, field) in table {
            let text = convert(&request).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
