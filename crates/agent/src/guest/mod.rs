//! The guest as a machine: what stands before and below the containers.

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
pub mod scratch;
pub mod share;
pub mod shm;
pub mod shutdown;
pub mod tree;
pub mod volumes;
