//! What a pod without a VM shares with the host, and what ConfigurePod sets in the namespaces of its own.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use agent_api::v1;
use nix::mount::{MsFlags, mount};

use crate::agent::Host;
use crate::error::{Context, Error, Result};
use crate::guest::{identity, shm};

/// Sysctls of namespaces that a pod may have of its own; all others are global.
const IPC_SYSCTLS: [&str; 4] = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
const NETWORK_SYSCTLS: &str = "net.";

/// Bind-mounts the host's `/dev/shm` as the pod's.
pub fn share_shm(at: &Path) -> Result<()> {
    let what = || "share the host's /dev/shm".to_owned();
    fs::create_dir_all(at).context(what)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some("/dev/shm"), at, None::<&str>, flags, None::<&str>).context(what)
}

/// ConfigurePod for the namespaces that are the pod's own.
pub fn configure(host: &Host, base: &Path, request: &v1::ConfigurePodRequest) -> Result<()> {
    check_sysctls(host, &request.sysctls)?;
    if !host.network {
        identity::set_hostname(&request.hostname)?;
    }
    identity::set_sysctls(&request.sysctls)?;
    if !host.ipc {
        shm::set_up(&base.join("shm"), request.shm_size)?;
    }
    Ok(())
}

fn check_sysctls(host: &Host, sysctls: &HashMap<String, String>) -> Result<()> {
    let mut names: Vec<&String> = sysctls.keys().collect();
    names.sort();
    for name in names {
        let dotted = name.replace('/', ".");
        let (own, whose) = if dotted.starts_with(NETWORK_SYSCTLS) {
            (!host.network, "the pod uses the host's network namespace (hostNetwork)")
        } else if IPC_SYSCTLS.iter().any(|prefix| dotted.starts_with(prefix)) {
            (!host.ipc, "the pod uses the host's IPC namespace (hostIPC)")
        } else {
            (false, "it is not namespaced")
        };
        if !own {
            return Err(Error::invalid("sysctls", format!("{name:?} cannot be set: {whose}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::host_mounts::HostMounts;
    use std::sync::Arc;

    #[test]
    fn sysctls_of_host_namespaces_are_refused_and_those_of_own_namespaces_are_accepted() {
        let namespace = fs::File::open("/proc/self/ns/mnt").unwrap();
        let mounts = Arc::new(HostMounts::new(namespace.into()));
        let check = |network, ipc, name: &str| {
            let host = Host { mounts: mounts.clone(), network, ipc };
            check_sysctls(&host, &[(name.to_owned(), "1".to_owned())].into()).is_ok()
        };
        for (network, ipc, name, fine) in [
            (false, false, "net.ipv4.ip_forward", true),
            (false, false, "net/ipv4/ip_forward", true),
            (true, false, "net.ipv4.ip_forward", false),
            (true, false, "kernel.shmmax", true),
            (false, true, "kernel.shmmax", false),
            (false, false, "fs.mqueue.msg_max", true),
            (false, false, "vm.swappiness", false),
            (false, false, "kernel.core_pattern", false),
        ] {
            assert_eq!(check(network, ipc, name), fine, "{network} {ipc} {name}");
        }
    }
}
