//! The machine below the containers: boot, devices, network, file systems and limits of the guest;
//! also the files of these that the agent of a pod without a VM uses (`host_mounts`,
//! `loop_device`).

pub mod boot;
pub mod copy;
pub mod cpus;
pub mod devices;
pub mod empty_dirs;
pub mod host_mounts;
pub mod huge_pages;
pub mod identity;
pub mod inroot;
pub mod loop_device;
pub mod modules;
mod netlink;
pub mod network;
pub mod quota;
pub mod reclaim;
pub mod remove;
pub mod reserve;
pub mod scratch;
pub mod share;
pub mod shm;
pub mod shutdown;
pub mod tree;
pub mod volumes;
