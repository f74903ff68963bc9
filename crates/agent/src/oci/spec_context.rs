//! What the guest knows of a container, for the completion of its OCI spec.

use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxDevice;

use super::userns::Mapping;

/// PID namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    Own,
    /// A path that the helper can open.
    Join(PathBuf),
    /// The agent's.
    Guest,
}

/// A bind mount from the guest into the container.
#[derive(Debug, Clone)]
pub struct Bind {
    pub source: PathBuf,
    pub destination: PathBuf,
    /// The destination is a directory, otherwise a file.
    pub directory: bool,
}

/// The pod's user namespace.
#[derive(Debug)]
pub struct UserNamespaceContext<'a> {
    pub path: &'a Path,
    pub mapping: &'a Mapping,
    /// Mount point of the pod's mqueue file system.
    pub mqueue: &'a Path,
}

/// Values of the guest for the completion of a spec.
#[derive(Debug)]
pub struct SpecContext<'a> {
    pub rootfs: &'a Path,
    pub read_only: bool,
    pub cgroup: &'a Path,
    pub pid: PidNamespace,
    pub shm: &'a Path,
    pub binds: &'a [Bind],
    /// A volume has shared propagation.
    pub shared_mounts: bool,
    /// Nodes in addition to those of the OCI spec.
    pub devices: Vec<LinuxDevice>,
    pub userns: Option<UserNamespaceContext<'a>>,
    pub hostname: &'a str,
    pub tty: bool,
    /// User as in an image config (`user[:group]`); overrides the OCI spec's user unless empty.
    pub user: &'a str,
    /// Do not add groups of the image's `/etc/group`.
    pub strict_groups: bool,
    pub cwd: &'a str,
}
