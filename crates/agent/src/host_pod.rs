//! The agent of a pod without a VM: its containers have namespaces of the host (agent-api,
//! `host_pod`). Same protocol, same containers; what differs is that the machine is not the agent's.
//!
//! ```text
//!  launcher --(own mount namespace; PID, IPC, UTS as the pod asks)--> here
//!    a sealed copy of the program -> join the pod's network namespace -> a root of its own
//!      -> move aside in the pod's cgroup -> serve
//! ```
//! The root is an empty tmpfs, as in a guest, with the host's `/dev` and cgroups in it. Images and
//! volumes are fetched from the host's mount namespace by path (`guest::host_mounts`). Everything
//! that is mounted ends with the last process, whatever kills it.
//!
//! Never touched: clock, entropy, devices, CPUs, modules and mounts of the host.
#![allow(unsafe_code)] // inherited descriptors

use std::collections::HashMap;
use std::fs;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use agent_api::host_pod::{CONTROL_FD, FORWARD_FD, MOUNTS_FD, NETNS_FD, STDIO_FD, Start};
use agent_api::v1;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::agent::{Config, Host};
use crate::error::{Doing, Error, Result};
use crate::guest::host_mounts::HostMounts;
use crate::guest::{identity, scratch, share, shm};
use crate::listen::Listener;
use crate::oci::{apparmor, cgroup};
use crate::{BASE, Doors, block_on};

/// Killed late when the host is out of memory, as the parents of containers are elsewhere: without
/// it nobody knows how they end.
const OOM_SCORE: &str = "-998";

/// Sysctls of the namespaces that a pod has of its own; all others are the host's.
const OF_IPC: [&str; 4] = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
const OF_NETWORK: &str = "net.";

/// Returns when it cannot serve.
pub fn run(args: &[String]) -> Result<()> {
    crate::log::install(std::env::var("NACELLE_LOG").ok().as_deref().or(Some("warn")));
    // Before anything is taken over: what was given has to come through once more.
    crate::sealed::run_from_copy()?;
    let start = Start::from_args(args)
        .ok_or_else(|| Error::invalid("arguments", format!("{args:?} are not understood")))?;
    let [mounts, control, stdio, forward] =
        [MOUNTS_FD, CONTROL_FD, STDIO_FD, FORWARD_FD].map(inherited);
    if !start.network {
        setns(inherited(NETNS_FD)?, CloneFlags::CLONE_NEWNET)
            .doing(|| "enter the pod's network namespace".to_owned())?;
    }
    // PID 1 of its own namespace is what orphans come to anyway.
    nix::sys::prctl::set_child_subreaper(true).doing(|| "adopt orphans".to_owned())?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let host =
        Host { mounts: Arc::new(HostMounts::new(mounts?)), network: start.network, ipc: start.ipc };
    make_root(&start, &host.mounts)?;
    let base = Path::new(BASE);
    fs::create_dir_all(base).doing(|| format!("make {BASE}"))?;
    let config = Config {
        base: base.to_owned(),
        cgroup: start.cgroup,
        folders_as_disks: false,
        host: Some(host),
        share: share::Source::Device,
        scratch: scratch::Source::Device,
        is_guest: false,
    };
    let (control, stdio, forward) = (control?, stdio?, forward?);
    block_on(config, || {
        let listen =
            |fd: OwnedFd| Listener::inherited(fd).doing(|| "listen for the host".to_owned());
        Ok(Doors { control: listen(control)?, stdio: listen(stdio)?, forward: listen(forward)? })
    })
}

/// A descriptor that the launcher has put there; no helper inherits it again.
fn inherited(number: i32) -> Result<OwnedFd> {
    // SAFETY: borrowed for one system call, which says so if nothing stands there.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .doing(|| format!("take over descriptor {number}"))?;
    // SAFETY: it is open, and this process was given it to own; called once a number, at the start,
    // before anything else could have been opened at it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Leaves the host's root for an empty one, and lets go of the host's mounts.
fn make_root(start: &Start, host: &HostMounts) -> Result<()> {
    let root = start.root.as_path();
    let none = None::<&str>;
    let what = || format!("make a root at {}", root.display());
    // The launcher has done so; nothing that follows may depend on it.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).doing(what)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("root"), root, Some("tmpfs"), flags, Some("mode=0755,size=64m")).doing(what)?;
    for folder in ["proc", "sys", "dev", "run", "tmp", "old"] {
        fs::create_dir(root.join(folder)).doing(what)?;
    }
    let quiet = flags | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &root.join("proc"), Some("proc"), quiet, none).doing(what)?;
    mount(Some("sysfs"), &root.join("sys"), Some("sysfs"), quiet, none).doing(what)?;
    let own_cgroups = cgroup::MOUNT.trim_start_matches('/');
    for (of_host, here) in [(Path::new("/dev"), "dev"), (&start.cgroup_mount, own_cgroups)] {
        let (tree, _) = host.copy(of_host)?;
        // What is unmounted here stays on the host.
        tree.propagation(MsFlags::MS_SLAVE).doing(what)?;
        tree.attach(&root.join(here)).doing(what)?;
    }
    nix::unistd::pivot_root(root, &root.join("old")).doing(what)?;
    nix::unistd::chdir("/").doing(what)?;
    umount2("/old", MntFlags::MNT_DETACH).doing(what)?;
    fs::remove_dir("/old").doing(what)?;
    // Profiles that the host has loaded are looked up there.
    apparmor::set_up()
}

/// The host's shared memory as the pod's.
pub fn share_shm(at: &Path) -> Result<()> {
    let what = || "share the host's /dev/shm".to_owned();
    fs::create_dir_all(at).doing(what)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some("/dev/shm"), at, None::<&str>, flags, None::<&str>).doing(what)
}

/// ConfigurePod, as far as there is something of the pod's own.
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
        let (own, whose) = if dotted.starts_with(OF_NETWORK) {
            (!host.network, "the host's network has it: hostNetwork")
        } else if OF_IPC.iter().any(|prefix| dotted.starts_with(prefix)) {
            (!host.ipc, "the host's shared memory has it: hostIPC")
        } else {
            (false, "it is the whole host's")
        };
        if !own {
            return Err(Error::invalid("sysctls", format!("{name:?} is not the pod's: {whose}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_of_the_host_are_refused_and_those_of_own_namespaces_are_not() {
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
