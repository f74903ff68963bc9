//! RunPodSandbox's request to a [`PodSpec`].

use std::collections::BTreeMap;
use std::path::{Component, Path};

use sandbox::model::{Dns, Meta, PodSpec, PortMapping, Protocol};

use super::security::Selinux;
use super::userns::user_namespace;
use super::{Refusal, check_meta, check_name, host_pod, known, resources, security};
use crate::config::Config;
use crate::v1;

/// HOST_NAME_MAX of Linux, hostname(7).
const MAX_HOSTNAME: usize = 64;

/// Sysctls that containerd sets in each pod that says nothing else: any user may open any port, and
/// ping.
const ANY_PORT: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const ANY_PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

/// Properties of the node that matter for a pod.
#[derive(Debug, Clone)]
pub struct Host {
    pub cpus: usize,
    /// For pods without a host name.
    pub hostname: String,
}

impl Host {
    pub fn here() -> Self {
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let hostname = self::hostname(hostname.trim()).unwrap_or_default();
        Self { cpus: std::thread::available_parallelism().map_or(1, |n| n.get()), hostname }
    }
}

pub fn to_spec(
    request: &v1::PodSandboxConfig,
    handler: &str,
    host: &Host,
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
    let in_context = |refusal: Refusal| refusal.in_field("linux.security_context");
    let meta = metadata(request)?;
    let shared = security::namespaces(context.namespace_options.as_ref()).map_err(in_context)?;
    if let Some(shared) = shared {
        let (namespace, annotations) = (meta.namespace.as_str(), &meta.annotations);
        let facts = host_pod::PodFacts { namespace, annotations, handler };
        host_pod::check(shared, &facts, &config.host_pods).map_err(in_context)?;
    }
    // Its AppArmor profile is for a process of the pod's own, and there is none.
    security::selinux(context.selinux_options.as_ref(), Selinux::of_host()).map_err(in_context)?;
    let user_namespace = user_namespace(context.namespace_options.as_ref())
        .map_err(|refusal| refusal.in_field("linux.security_context"))?;
    let size =
        resources::vm_size(linux.resources.as_ref(), linux.overhead.as_ref(), host.cpus, config)?;
    check_sysctls(&linux.sysctls)?;
    let dns = request.dns_config.clone().unwrap_or_default();
    check_dns(&dns)?;
    let name = hostname(&request.hostname)?;
    let has_hosts_network = shared.is_some_and(|shared| shared.network);
    if has_hosts_network && !name.is_empty() && name != host.hostname {
        return Err(Refusal::invalid(
            "hostname",
            format!(
                "a pod in the host's network has its name, {:?}, and not {name:?}",
                host.hostname
            ),
        ));
    }
    Ok(PodSpec {
        meta,
        hostname: if name.is_empty() { host.hostname.clone() } else { name },
        handler: handler.to_string(),
        cgroup_parent: inner_path("linux.cgroup_parent", &linux.cgroup_parent)?,
        log_directory: log_directory(&request.log_directory)?,
        sysctls: if has_hosts_network {
            linux.sysctls
        } else {
            with_default_sysctls(linux.sysctls, user_namespace.is_some())
        },
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        ports: ports(&request.port_mappings)?,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        cpu: resources::cpu_limits(linux.resources.as_ref(), linux.overhead.as_ref()),
        host: shared,
        origin: serde_json::to_value(request).unwrap_or_default(),
    })
}

fn with_default_sysctls(
    mut sysctls: BTreeMap<String, String>,
    user_namespace: bool,
) -> BTreeMap<String, String> {
    // The groups of a user namespace are not all those of the range.
    let ping = Some(ANY_PING).filter(|_| !user_namespace);
    for (name, value) in [Some(ANY_PORT), ping].into_iter().flatten() {
        let slashes = name.replace('.', "/");
        if !sysctls.contains_key(name) && !sysctls.contains_key(&slashes) {
            sysctls.insert(name.to_string(), value.to_string());
        }
    }
    sysctls
}

fn metadata(request: &v1::PodSandboxConfig) -> Result<Meta, Refusal> {
    let metadata = request.metadata.clone().unwrap_or_default();
    if metadata.name.is_empty() {
        return Err(Refusal::invalid("metadata.name", "empty; a pod needs a name"));
    }
    for (field, text) in [
        ("metadata.name", &metadata.name),
        ("metadata.namespace", &metadata.namespace),
        ("metadata.uid", &metadata.uid),
    ] {
        check_name(field, text)?;
    }
    check_meta(&request.labels, &request.annotations)?;
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
/// its kernel does not have, and the agent of a pod without a VM what is the host's.
fn check_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
    for (name, value) in sysctls {
        let valid = !name.is_empty()
            && name.bytes().all(plain)
            && !name.contains("..")
            && !name.starts_with(['.', '/']);
        if !valid {
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
    use sandbox::model::HostNamespaces;

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
        to_spec(request, "", &host(), &Config::default())
    }

    fn host() -> Host {
        Host { cpus: 4, hostname: "node".into() }
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
    fn a_pod_without_a_name_of_its_own_has_the_nodes() {
        assert_eq!(convert(&request()).unwrap().hostname, "node");
        let named = v1::PodSandboxConfig { hostname: "web".into(), ..request() };
        assert_eq!(convert(&named).unwrap().hostname, "web");
        assert!(Host::here().cpus > 0);
    }

    #[test]
    fn any_user_may_open_ports_and_ping_unless_the_pod_sets_sysctls() {
        let sysctls = |asked: &[(&str, &str)], user_namespace| {
            let asked = asked.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            with_default_sysctls(asked, user_namespace)
        };
        let usual = sysctls(&[], false);
        assert_eq!(usual["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(usual["net.ipv4.ping_group_range"], "0 2147483647");
        assert!(!sysctls(&[], true).contains_key("net.ipv4.ping_group_range"));
        let own = sysctls(&[("net/ipv4/ping_group_range", "1 0"), (ANY_PORT.0, "1024")], false);
        assert_eq!((own.len(), own[ANY_PORT.0].as_str()), (2, "1024"));
    }

    #[test]
    fn only_configured_handlers_are_known() {
        let config = Config::default();
        assert_eq!(to_spec(&request(), "nacelle", &host(), &config).unwrap().handler, "nacelle");
        assert!(to_spec(&request(), "runc", &host(), &config).is_err());
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
    fn a_pod_of_the_hosts_network_is_allowed_or_not_and_has_its_name_and_sysctls() {
        let asked = linux(host_network());
        let refusal = convert(&asked).unwrap_err().to_string();
        assert!(refusal.starts_with("linux.security_context.namespace_options"), "{refusal}");
        assert!(refusal.contains("hostNetwork") && refusal.contains("[cri.host_pods]"));
        let mut config = Config::default();
        config.host_pods.enabled = true;
        config.host_pods.namespaces = vec!["shop".into()];
        let spec = to_spec(&asked, "", &host(), &config).unwrap();
        assert_eq!(spec.host, Some(HostNamespaces { network: true, pid: false, ipc: false }));
        assert_eq!((spec.hostname.as_str(), spec.sysctls.len()), ("node", 0));
        let named = v1::PodSandboxConfig { hostname: "web".into(), ..asked };
        let refusal = to_spec(&named, "", &host(), &config).unwrap_err().to_string();
        assert!(refusal.starts_with("hostname") && refusal.contains("\"node\""), "{refusal}");
        assert_eq!(to_spec(&request(), "", &host(), &config).unwrap().host, None);
    }

    fn host_network() -> v1::LinuxPodSandboxConfig {
        let network = v1::NamespaceMode::Node as i32;
        v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption { network, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn malformed_requests_are_rejected_with_the_field() {
        let base = request();
        let sysctl = |name: &str| v1::LinuxPodSandboxConfig {
            sysctls: [(name.to_string(), "1".to_string())].into(),
            ..Default::default()
        };
        let table = [
            (v1::PodSandboxConfig { metadata: None, ..base.clone() }, "metadata.name"),
            (v1::PodSandboxConfig { hostname: "a b".into(), ..base.clone() }, "hostname"),
            (
                v1::PodSandboxConfig {
                    metadata: Some(v1::PodSandboxMetadata {
                        name: "web".into(),
                        namespace: "../x".into(),
                        ..Default::default()
                    }),
                    ..base.clone()
                },
                "metadata.namespace",
            ),
            (
                v1::PodSandboxConfig {
                    labels: [("l".to_string(), "x".repeat(2 << 20))].into(),
                    ..base.clone()
                },
                "labels",
            ),
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
            (linux(host_network()), "linux.security_context.namespace_options"),
        ];
        for (request, field) in table {
            let text = convert(&request).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
