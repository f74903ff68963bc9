//! From an OCI runtime specification to a running process: completing the specification (`spec`,
//! `mounts`, `devices`, `apparmor`), users (`user`), cgroups (`cgroup`, `limits`,
//! `device_filter`), and the short-lived helper processes that build containers and execs
//! (`helper`, `create`, `exec`, `command`, `pod_pid`, `userns`).
//!
//! Containers are built by libcontainer: namespaces, mounts, devices, masked paths, seccomp,
//! capabilities, terminals. What is done here instead, and why:
//! - **cgroups**: the agent reads limits, statistics and OOM events anyway, and libcontainer's
//!   device rules for cgroup v2 need libbpf and libelf.
//! - **exec**: libcontainer's tenant container drops the container's seccomp filter.
//! - **seccomp** (`seccomp`): libcontainer's filters have no ENOSYS for calls newer than the profile,
//!   and those with no_new_privs it loads before it waits for the start.
//! - **running the program**: its errors reach the caller of StartContainer and Exec as such.

pub mod apparmor;
pub mod cgroup;
mod command;
pub mod console;
pub mod create;
pub mod device_filter;
pub mod devices;
pub mod exec;
pub mod helper;
pub mod limits;
mod mounts;
pub mod pod_pid;
mod seccomp;
pub mod spec;
pub mod user;
pub mod userns;

/// kill(2) with any signal number: nix names no real-time signals.
pub fn raw_kill(pid: i32, signal: i32) -> nix::Result<()> {
    kill::raw(pid, signal)
}

mod kill {
    #![allow(unsafe_code)] // see `raw_kill`

    pub(super) fn raw(pid: i32, signal: i32) -> nix::Result<()> {
        // SAFETY: kill has no pointer arguments.
        nix::errno::Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
    }
}
