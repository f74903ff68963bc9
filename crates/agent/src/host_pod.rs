//! The agent of a pod without a VM, whose containers use namespaces of the host (agent-api,
//! `host_pod`). Protocol and containers are the same as in a guest; devices, clock and mounts of
//! the host are not changed.
//!
//! ```text
//!  launcher --(new mount namespace; PID, IPC, UTS as the pod requests)--> run
//!    sealed copy of the program -> join the pod's network namespace -> own root (pivot_root)
//!      -> move to a leaf of the pod's cgroup -> serve
//! ```
//! The root is an empty tmpfs, as in a guest, with the host's `/dev` and cgroup mount in it. Images
//! and volumes are cloned from the host's mount namespace by path (`guest::host_mounts`). All
//! mounts end with the mount namespace, so with the last process.
#![allow(unsafe_code)] // inherited descriptors

use std::fs;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use agent_api::host_pod::{CONTROL_FD, FORWARD_FD, MOUNTS_FD, NETNS_FD, STDIO_FD, Start};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::agent::{Config, Host};
use crate::error::{Context, Error, Result};
use crate::guest::host_mounts::HostMounts;
use crate::guest::{scratch, share};
use crate::listen::Listener;
use crate::oci::{apparmor, cgroup};
use crate::serve::{BASE, Listeners, serve};

/// oom_score_adj, as of containerd-shim: without this process the exit codes of the containers are
/// lost.
const OOM_SCORE: &str = "-998";

/// Serves the pod; returns on an error only.
pub fn run(args: &[String]) -> Result<()> {
    crate::log::install(std::env::var("NACELLE_LOG").ok().as_deref().or(Some("warn")));
    // First: the arguments and descriptors are needed by the re-executed program.
    crate::sealed::run_from_copy()?;
    let start = Start::from_args(args)
        .ok_or_else(|| Error::invalid("arguments", format!("{args:?} cannot be parsed")))?;
    let [mounts, control, stdio, forward] =
        [MOUNTS_FD, CONTROL_FD, STDIO_FD, FORWARD_FD].map(inherited);
    if !start.network {
        setns(inherited(NETNS_FD)?, CloneFlags::CLONE_NEWNET)
            .context(|| "join the pod's network namespace".to_owned())?;
    }
    // PID 1 of a PID namespace reaps orphans without this.
    nix::sys::prctl::set_child_subreaper(true).context(|| "become child subreaper".to_owned())?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let host =
        Host { mounts: Arc::new(HostMounts::new(mounts?)), network: start.network, ipc: start.ipc };
    make_root(&start, &host.mounts)?;
    let base = Path::new(BASE);
    fs::create_dir_all(base).context(|| format!("make {BASE}"))?;
    let config = Config {
        base: base.to_owned(),
        cgroup: start.cgroup,
        dirs_as_disks: false,
        host: Some(host),
        share: share::Source::Device,
        scratch: scratch::Source::Device,
        is_guest: false,
    };
    let (control, stdio, forward) = (control?, stdio?, forward?);
    serve(config, || {
        let listen =
            |fd: OwnedFd| Listener::inherited(fd).context(|| "use an inherited socket".to_owned());
        Ok(Listeners {
            control: listen(control)?,
            stdio: listen(stdio)?,
            forward: listen(forward)?,
        })
    })
}

/// Takes a descriptor that the launcher passed; sets close-on-exec, so that no helper inherits it.
fn inherited(number: i32) -> Result<OwnedFd> {
    // SAFETY: borrowed for one system call, which fails with EBADF if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .context(|| format!("take inherited descriptor {number}"))?;
    // SAFETY: it is open, and the launcher passed it to this process to own; called once for each
    // number at the start, before anything else could have been opened with it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Changes to an empty root with pivot_root(2) and unmounts the host's mounts in this mount
/// namespace.
fn make_root(start: &Start, host: &HostMounts) -> Result<()> {
    let root = start.root.as_path();
    let none = None::<&str>;
    let what = || format!("create the root at {}", root.display());
    // The launcher did this too, but nothing below may rely on it.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context(what)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("root"), root, Some("tmpfs"), flags, Some("mode=0755,size=64m")).context(what)?;
    for dir in ["proc", "sys", "dev", "run", "tmp", "old"] {
        fs::create_dir(root.join(dir)).context(what)?;
    }
    let quiet = flags | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &root.join("proc"), Some("proc"), quiet, none).context(what)?;
    mount(Some("sysfs"), &root.join("sys"), Some("sysfs"), quiet, none).context(what)?;
    let own_cgroups = cgroup::MOUNT.trim_start_matches('/');
    for (of_host, here) in [(Path::new("/dev"), "dev"), (&start.cgroup_mount, own_cgroups)] {
        let (tree, _) = host.copy(of_host)?;
        // Unmounting here must not unmount on the host.
        tree.propagation(MsFlags::MS_SLAVE).context(what)?;
        tree.attach(&root.join(here)).context(what)?;
    }
    nix::unistd::pivot_root(root, &root.join("old")).context(what)?;
    nix::unistd::chdir("/").context(what)?;
    umount2("/old", MntFlags::MNT_DETACH).context(what)?;
    fs::remove_dir("/old").context(what)?;
    // Containers may use AppArmor profiles that the host has loaded.
    apparmor::mount_securityfs()
}
