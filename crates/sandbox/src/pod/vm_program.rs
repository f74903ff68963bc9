//! The VMM of a pod: its files and sockets, and the configuration of the VM.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::SockType;
use vmm_api::{DiskConfig, Fd, JailConfig, RestoreConfig, VmConfig, VsockConfig};

use super::handle::Handle;
use crate::apparmor::AppArmor;
use crate::config::Config;
use crate::error::Error;
use crate::host::{cgroup, sockets};
use crate::launcher::{Namespaces, Program};
use crate::policy::Pod;
use crate::template::{Key, Template};

/// Number of the program's first descriptor (see [`crate::launcher`]).
const FIRST_FD: i32 = 3;

/// Descriptors to pass to the VMM, in order.
#[derive(Default)]
struct FdTable(Vec<OwnedFd>);

impl FdTable {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.0.push(fd.into());
        Fd(FIRST_FD + self.0.len() as i32 - 1)
    }
}

/// A VMM to start.
pub(super) struct Prepared {
    pub(super) program: Program,
    /// Of the template from which the VM starts, or as which it can be saved.
    pub(super) key: Option<Key>,
    /// From which the VM starts.
    pub(super) template: Option<Arc<Template>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Templates {
    /// Start from a template, or save the VM as one.
    Use,
    Ignore,
}

pub(super) fn program(
    handle: &Handle,
    pod: &Pod,
    leaf: &Path,
    templates: Templates,
) -> Result<Prepared, Error> {
    let (paths, node) = (&handle.paths, &handle.node);
    let failed = |what: &str, path: &Path, e| Error::io(format!("{what} {}", path.display()), e);
    for directory in [&paths.state_dir, &paths.directory] {
        node.failpoints.wrap_blocking("host: make a pod's directory", || {
            let mut directories = fs::DirBuilder::new();
            let made = directories.recursive(true).mode(0o700).create(directory);
            made.map_err(|e| failed("create", directory, e))
        })?;
    }
    let new_file = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        options.open(path).map_err(|e| failed("create", path, e))
    };
    let existing = |path: &Path| File::open(path).map_err(|e| failed("open", path, e));
    let socket = |path: &Path, kind| {
        sockets::listen_at(path, kind).map_err(|e| failed("listen at", path, e))
    };
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&paths.log);
    let log = log.map_err(|e| failed("create", &paths.log, e))?;
    let kvm = OpenOptions::new().read(true).write(true).open(&node.config.kvm);
    let kvm = kvm.map_err(|e| failed("open", &node.config.kvm, e))?;
    let mut fds = FdTable::default();
    let config_file = memfd_create(c"vm-config", MFdFlags::MFD_CLOEXEC)
        .map_err(|e| Error::io("create the memfd of the configuration", e.into()))?;
    let config_fd = fds.add(config_file.try_clone().map_err(|e| Error::io("dup", e))?);
    let config = vm_config(handle, pod, |what| {
        Ok(match what {
            VmFile::Kernel => fds.add(existing(&node.config.kernel)?),
            VmFile::Initramfs => fds.add(existing(&node.config.initramfs)?),
            VmFile::Kvm => fds.add(kvm.try_clone().map_err(|e| Error::io("dup", e))?),
            VmFile::Control => fds.add(socket(&paths.control, SockType::SeqPacket)?),
            VmFile::Vsock => fds.add(socket(&paths.vsock, SockType::Stream)?),
            VmFile::Status => fds.add(new_file(&paths.status)?),
            VmFile::Console => fds.add(new_file(&paths.console)?),
            VmFile::Log => fds.add(log.try_clone().map_err(|e| Error::io("dup", e))?),
        })
    })?;
    let scratch = node.failpoints.wrap_blocking("host: make the scratch disk", || {
        node.scratch.clone_to(&paths.scratch_disk, node.config.scratch_disk_size())
    })?;
    let serial = agent_api::SCRATCH_SERIAL.to_owned();
    let disks = vec![DiskConfig { serial, file: fds.add(scratch), read_only: false }];
    let key = match templates {
        Templates::Use if node.templates.enabled() => {
            let key = Key::new(&node.config, &config);
            key.inspect_err(|error| tracing::warn!(pod = pod.id, %error, "no template is used"))
                .ok()
        }
        Templates::Use | Templates::Ignore => None,
    };
    let template = key.as_ref().and_then(|key| node.templates.get(key));
    let restore = match &template {
        Some(template) => {
            let files = template.files().map_err(|e| Error::io("dup", e))?;
            Some(RestoreConfig { state: fds.add(files.0), memory: fds.add(files.1) })
        }
        None => None,
    };
    let config = VmConfig { disks, restore, ..config };

    let text = serde_json::to_vec(&config).map_err(|e| Error::Internal(e.into()))?;
    let mut file = File::from(config_file);
    std::io::Write::write_all(&mut file, &text)
        .map_err(|e| Error::io("write the VM's configuration", e))?;
    std::io::Seek::rewind(&mut file).map_err(|e| Error::io("rewind the VM's configuration", e))?;
    let cgroup = node.failpoints.wrap_blocking("host: make the cgroup", || {
        cgroup::make(leaf).map_err(|e| failed("create cgroup", leaf, e))
    })?;
    let program = Program {
        exe: node.config.vmm.clone(),
        args: vec!["--config-fd".into(), config_fd.0.to_string()],
        cgroup: cgroup.into(),
        stderr: log.into(),
        fds: fds.0,
        own: Namespaces::ALL,
    };
    Ok(Prepared { program, key, template })
}

enum VmFile {
    Kernel,
    Initramfs,
    Kvm,
    Control,
    Vsock,
    Status,
    Console,
    Log,
}

/// Replaces the guest kernel's default list, which has landlock and yama.
const WITH_APPARMOR: &str = "lsm=landlock,yama,apparmor";

/// Suffix of the guest kernel's command line; the last value of an option wins: the operator's.
fn cmdline(config: &Config, host_runs_apparmor: bool) -> String {
    if config.apparmor && host_runs_apparmor {
        format!("{WITH_APPARMOR} {}", config.cmdline_extra).trim_end().to_owned()
    } else {
        config.cmdline_extra.clone()
    }
}

fn vm_config(
    handle: &Handle,
    pod: &Pod,
    mut fd: impl FnMut(VmFile) -> Result<Fd, Error>,
) -> Result<VmConfig, Error> {
    let config = &handle.node.config;
    let vcpus = pod.spec.vcpus.unwrap_or(config.default_vcpus).max(1);
    let memory_mib = pod.spec.memory_mib.unwrap_or(config.default_memory_mib);
    Ok(VmConfig {
        version: vmm_api::VERSION,
        name: pod.id.clone(),
        vcpus,
        max_vcpus: config.max_vcpus_of(vcpus),
        memory_mib,
        max_memory_mib: config.max_memory_of(memory_mib),
        free_page_reporting: config.reclaim_memory,
        kernel: fd(VmFile::Kernel)?,
        initramfs: Some(fd(VmFile::Initramfs)?),
        cmdline: cmdline(config, AppArmor::of_host().runs()),
        kvm: fd(VmFile::Kvm)?,
        control: fd(VmFile::Control)?,
        status: fd(VmFile::Status)?,
        console: fd(VmFile::Console)?,
        log: Some(fd(VmFile::Log)?),
        vsock: Some(VsockConfig { guest_cid: agent_api::GUEST_CID, listener: fd(VmFile::Vsock)? }),
        disks: Vec::new(),
        nets: Vec::new(),
        serial_console: false,
        jail: Some(JailConfig { uid: pod.uid, gid: pod.uid }),
        restore: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_enables_apparmor_if_the_host_does_unless_configured_otherwise() {
        let mut config = Config::default();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor");
        assert_eq!(cmdline(&config, false), "");
        config.cmdline_extra = "quiet lsm=".to_owned();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor quiet lsm=");
        config.apparmor = false;
        assert_eq!(cmdline(&config, true), "quiet lsm=");
    }
}
