//! The configuration of a guest that has booted: identity, network, files in /etc.

use std::fs::{self, File};
use std::time::{SystemTime, UNIX_EPOCH};

use agent_api::v1;

use super::disks::write_volume;
use super::handle::Handle;
use super::volume_ids::ETC_VOLUME;
use crate::error::Error;
use crate::host::etc;
use crate::node::Node;
use crate::policy::Pod;
use crate::ports::Attachment;
use crate::vmm;

/// Entropy for the guest, bytes; more than twice the state of its RNG.
const ENTROPY: usize = 128;
/// Configures the guest; returns its kernel's release.
pub(super) async fn configure(
    handle: &Handle,
    pod: &Pod,
    attachment: &Attachment,
) -> Result<String, Error> {
    let guest = &handle.guest;
    let hello = guest.hello(handle.node.config.guest_call_deadline()).await?;
    let mut entropy = vec![0; ENTROPY];
    getrandom(&mut entropy)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = v1::ConfigurePodRequest {
        pod_id: pod.id.clone(),
        hostname: pod.spec.hostname.clone(),
        unix_time_ns: now.as_nanos() as i64,
        entropy,
        sysctls: pod.spec.sysctls.clone().into_iter().collect(),
        interfaces: attachment.interfaces.iter().map(interface).collect(),
        routes: attachment.routes.iter().map(route).collect(),
        shm_size: 0,
        reclaim_idle: handle.node.config.reclaim_memory,
    };
    guest.call("configure the pod", |mut c| async move { c.configure_pod(request).await }).await?;
    write_volume(guest, ETC_VOLUME, etc_files(handle.node.as_ref(), pod, attachment)).await?;
    Ok(vmm::clean(&hello.kernel_release, 128))
}

fn etc_files(node: &Node, pod: &Pod, attachment: &Attachment) -> Vec<v1::VolumeFile> {
    let host = fs::read_to_string(&node.config.resolv_conf).unwrap_or_default();
    let spec = &pod.spec;
    let hosts = match spec.host {
        // The host's /etc/hosts, as it shares the host's network.
        Some(host) if host.network => fs::read_to_string("/etc/hosts").ok(),
        _ => None,
    };
    let texts = [
        hosts.unwrap_or_else(|| etc::hosts(&spec.hostname, &attachment.addresses)),
        format!("{}\n", spec.hostname),
        etc::resolv_conf(&spec.dns, &attachment.dns, &host),
    ];
    let files = etc::FILES.iter().zip(texts).map(|((name, _), text)| v1::VolumeFile {
        path: (*name).to_owned(),
        mode: libc::S_IFREG | 0o644,
        uid: 0,
        gid: 0,
        content: text.into_bytes(),
        append: false,
    });
    files.collect()
}

fn interface(interface: &crate::ports::Interface) -> v1::Interface {
    v1::Interface {
        mac: interface.mac.map(|b| format!("{b:02x}")).join(":"),
        name: interface.name.clone(),
        mtu: interface.mtu.into(),
        addresses: interface.addresses.clone(),
    }
}

fn route(route: &crate::ports::Route) -> v1::Route {
    v1::Route {
        destination: route.destination.clone(),
        gateway: route.gateway.clone(),
        interface: route.interface.clone(),
    }
}

fn getrandom(bytes: &mut [u8]) -> Result<(), Error> {
    File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, bytes))
        .map_err(|e| Error::io("read /dev/urandom", e))
}
