//! From an OCI runtime spec to a running process: completion of the spec (`spec`, `mounts`,
//! `devices`, `apparmor`), users (`user`), cgroups (`cgroup`, `limits`, `device_filter`), and the
//! helper processes that create containers and execs (`helper`, `create`, `exec`, `command`,
//! `pod_pid`, `userns`).
//!
//! libcontainer creates containers: namespaces, mounts, devices, masked paths, capabilities,
//! terminals. Done here instead:
//! - **cgroups**: the agent reads limits, statistics and OOM events anyway, and libcontainer's
//!   device rules for cgroup v2 need libbpf and libelf.
//! - **exec**: libcontainer's tenant container does not load the container's seccomp filter.
//! - **seccomp** (`seccomp`): libcontainer does not return ENOSYS for calls newer than the profile,
//!   and loads filters with no_new_privs before the wait for the start.
//! - **execve**: its errors are returned by StartContainer and Exec.

pub mod apparmor;
pub mod cgroup;
mod command;
pub mod console;
pub mod create;
pub mod device_filter;
pub mod devices;
pub mod dispatch;
pub mod exec;
pub mod helper;
pub mod limits;
mod mounts;
pub mod pod_pid;
pub mod seccomp;
pub mod spec;
mod spec_context;
pub mod user;
pub mod userns;

pub use calls::{pidfd, raw_kill};

mod calls {
    #![allow(unsafe_code)] // system calls that nix does not have

    use std::os::fd::{FromRawFd, OwnedFd, RawFd};

    use nix::errno::Errno;

    /// kill(2) with any signal number; nix has no real-time signals.
    pub fn raw_kill(pid: i32, signal: i32) -> nix::Result<()> {
        // SAFETY: kill has no pointer arguments.
        Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
    }

    /// pidfd_open(2).
    pub fn pidfd(pid: i32) -> nix::Result<OwnedFd> {
        // SAFETY: pidfd_open has no pointer arguments.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just created this descriptor; nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }
}
