//! Templates: saved VMs from which pods start instead of booting a kernel.
//!
//! ```text
//!   first pod of a kind:  boot, agent listens ----> [save] --> network, configuration, containers
//!   further ones:         memory and state of the saved VM --> network, configuration, containers
//! ```
//! A VM is saved when its agent listens and has received nothing, so a template contains nothing of
//! any pod. What must differ between VMs is set by the configuration that follows in both cases,
//! before the first container: entropy with a reseed of the guest's random number generator, wall
//! clock, hostname, network. The guest kernel's address layout is the same in all pods of a
//! template, which is why templates have a maximum age.
//!
//! A template belongs to a [`Key`]: with another kernel, agent, VMM or size a VM is booted. It is
//! held in sealed memfds of this process: charged to its cgroup, gone with the process, on no disk.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vmm_api::VmConfig;

use crate::config::Config;

/// Time without a new attempt after a template could not be made or used.
const RETRY: Duration = Duration::from_secs(600);
/// Longest state of a VM, bytes; that of 64 vCPUs has about 3 MiB.
const STATE_MAX: u64 = 16 << 20;
/// Most memory of a template, bytes. A guest touches about 60 MiB until its agent listens, and 1.6 % of
/// its boot memory for the kernel's page structures.
const MEMORY_MAX: u64 = 512 << 20;
/// A template that was used within this time is not replaced by one of another size: with more sizes in
/// turns than templates, each pod would boot and be saved.
const KEEP: Duration = Duration::from_secs(600);

/// What a VM must have in common with the saved one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    kernel: FileId,
    initramfs: FileId,
    vmm: FileId,
    cmdline: String,
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u32,
    max_memory_mib: u32,
    free_page_reporting: bool,
    scratch_disk_size: u64,
}

/// A file whose content has not changed since it was examined.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        let meta: Metadata = std::fs::metadata(path)?;
        Ok(Self {
            device: meta.st_dev(),
            inode: meta.st_ino(),
            size: meta.st_size(),
            modified: (meta.st_mtime(), meta.st_mtime_nsec()),
            changed: (meta.st_ctime(), meta.st_ctime_nsec()),
        })
    }
}

impl Key {
    /// Blocks.
    pub(crate) fn new(config: &Config, vm: &VmConfig) -> io::Result<Self> {
        Ok(Self {
            kernel: FileId::of(&config.kernel)?,
            initramfs: FileId::of(&config.initramfs)?,
            vmm: FileId::of(&config.vmm)?,
            cmdline: vm.cmdline.clone(),
            vcpus: vm.vcpus,
            max_vcpus: vm.max_vcpus,
            memory_mib: vm.memory_mib,
            max_memory_mib: vm.max_memory_mib,
            free_page_reporting: vm.free_page_reporting,
            scratch_disk_size: config.scratch_disk_size(),
        })
    }

    /// Size of the boot memory, bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

/// A saved VM.
#[derive(Debug)]
pub(crate) struct Template {
    state: File,
    memory: File,
    made: Instant,
    /// Bytes of memory that are not zero.
    bytes: u64,
}

impl Template {
    /// Copies a saved VM. The copy cannot be changed any more, not even by a VMM that gets its
    /// descriptors. `state` and `memory` come from a VMM, so their sizes are checked. Blocks.
    pub(crate) fn copy(key: &Key, state: &File, memory: &File) -> io::Result<Self> {
        let invalid = |what: &str, size: u64| {
            io::Error::new(io::ErrorKind::InvalidData, format!("the VM's {what} has {size} bytes"))
        };
        let (state_size, memory_size) = (state.metadata()?.len(), memory.metadata()?.len());
        if state_size == 0 || state_size > STATE_MAX {
            return Err(invalid("state", state_size));
        }
        if memory_size != key.memory_bytes() {
            return Err(invalid("memory", memory_size));
        }
        let used = memory.metadata()?.st_blocks() * 512;
        if used > MEMORY_MAX {
            return Err(invalid("memory, more than a template may have,", used));
        }
        let (state, _) = sealed_copy(c"template-state", state, state_size)?;
        let (memory, bytes) = sealed_copy(c"template-memory", memory, memory_size)?;
        Ok(Self { state, memory, made: Instant::now(), bytes })
    }

    /// Descriptors of state and memory for a VMM.
    pub(crate) fn files(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        Ok((self.state.try_clone()?.into(), self.memory.try_clone()?.into()))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn sealed_copy(name: &std::ffi::CStr, from: &File, len: u64) -> io::Result<(File, u64)> {
    let to = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    let bytes = vmm_api::snapshot::copy_memory(from, &to, len)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&to, FcntlArg::F_ADD_SEALS(seals))?;
    Ok((to, bytes))
}

/// The templates of a node.
#[derive(Debug)]
pub(crate) struct Templates {
    limit: usize,
    max_age: Duration,
    keep: Duration,
    slots: Mutex<HashMap<Key, Slot>>,
}

#[derive(Debug)]
enum Slot {
    /// A VM is being saved.
    Making,
    Ready {
        template: Arc<Template>,
        used: Instant,
    },
    /// It could not be made or used.
    Failed {
        at: Instant,
    },
}

impl Templates {
    /// At most `limit` templates, each used for `max_age`.
    pub(crate) fn new(limit: usize, max_age: Duration) -> Self {
        Self { limit, max_age, keep: KEEP, slots: Mutex::default() }
    }

    pub(crate) fn enabled(&self) -> bool {
        self.limit > 0
    }

    /// The template of `key`, if there is one that is not too old.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Template>> {
        let mut slots = self.lock();
        let Some(Slot::Ready { template, used }) = slots.get_mut(key) else { return None };
        if template.made.elapsed() < self.max_age {
            *used = Instant::now();
            return Some(template.clone());
        }
        slots.remove(key);
        None
    }

    /// Whether the caller is to save a VM of `key`. None if there is a template or an attempt to
    /// make one, or one has failed recently.
    pub(crate) fn begin(self: &Arc<Self>, key: &Key) -> Option<Making> {
        let mut slots = self.lock();
        match slots.get(key) {
            _ if !self.enabled() => return None,
            Some(Slot::Making | Slot::Ready { .. }) => return None,
            Some(Slot::Failed { at }) if at.elapsed() < RETRY => return None,
            Some(Slot::Failed { .. }) | None => {}
        }
        slots.retain(|_, slot| match slot {
            Slot::Ready { template, .. } => template.made.elapsed() < self.max_age,
            Slot::Making | Slot::Failed { .. } => true,
        });
        let in_use = |slot: &Slot| match slot {
            Slot::Ready { used, .. } => used.elapsed() < self.keep,
            Slot::Making => true,
            Slot::Failed { .. } => false,
        };
        if slots.values().filter(|slot| in_use(slot)).count() >= self.limit {
            return None;
        }
        slots.insert(key.clone(), Slot::Making);
        Some(Making { templates: self.clone(), key: key.clone(), made: None })
    }

    /// Drops a template that could not be used.
    pub(crate) fn discard(&self, key: &Key, unusable: &Arc<Template>) {
        let mut slots = self.lock();
        if let Some(Slot::Ready { template, .. }) = slots.get(key)
            && Arc::ptr_eq(template, unusable)
        {
            slots.insert(key.clone(), Slot::Failed { at: Instant::now() });
        }
    }

    fn finish(&self, key: &Key, made: Option<Template>) {
        let mut slots = self.lock();
        let now = Instant::now();
        let slot = match made {
            Some(template) => Slot::Ready { template: Arc::new(template), used: now },
            None => Slot::Failed { at: now },
        };
        slots.insert(key.clone(), slot);
        let ready = |slot: &Slot| match slot {
            Slot::Ready { used, .. } => Some(*used),
            Slot::Making | Slot::Failed { .. } => None,
        };
        // VMs that are started from a template hold its files.
        while slots.values().filter_map(ready).count() > self.limit {
            let last = slots.iter().filter_map(|(key, slot)| Some((ready(slot)?, key)));
            let Some(key) = last.min_by_key(|(used, _)| *used).map(|(_, key)| key.clone()) else {
                return;
            };
            slots.remove(&key);
        }
        slots.retain(|_, slot| !matches!(slot, Slot::Failed { at } if at.elapsed() >= RETRY));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to make a template; dropping it without one counts as a failure.
#[derive(Debug)]
pub(crate) struct Making {
    templates: Arc<Templates>,
    key: Key,
    made: Option<Template>,
}

impl Making {
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn finish(mut self, template: Template) {
        self.made = Some(template);
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.templates.finish(&self.key, self.made.take());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn key(vcpus: u8) -> Key {
        let file = FileId { device: 1, inode: 2, size: 3, modified: (4, 5), changed: (6, 7) };
        Key {
            kernel: file.clone(),
            initramfs: file.clone(),
            vmm: file,
            cmdline: String::new(),
            vcpus,
            max_vcpus: 8,
            memory_mib: 1,
            max_memory_mib: 1,
            free_page_reporting: true,
            scratch_disk_size: 1,
        }
    }

    fn template() -> Template {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        state.write_all_at(b"state", 0).unwrap();
        memory.set_len(1 << 20).unwrap();
        memory.write_all_at(b"memory", 8192).unwrap();
        Template::copy(&key(1), &state, &memory).unwrap()
    }

    #[test]
    fn a_copy_is_sealed_and_sparse() {
        let template = template();
        assert_eq!(template.bytes(), 4096);
        let (state, memory) = template.files().unwrap();
        let mut text = [0; 5];
        File::from(state).read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"state");
        let memory = File::from(memory);
        assert!(memory.write_all_at(b"x", 0).is_err(), "a VMM can change it");
        assert!(memory.set_len(0).is_err());
        memory.read_exact_at(&mut text, 8192).unwrap();
        assert_eq!(&text, b"memor");
    }

    #[test]
    fn files_of_a_wrong_size_are_refused() {
        let (empty, short) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        short.set_len(4096).unwrap();
        assert!(Template::copy(&key(1), &empty, &short).is_err());
        let error = Template::copy(&key(1), &short, &short).unwrap_err();
        assert_eq!(error.to_string(), "the VM's memory has 4096 bytes");
        short.set_len(STATE_MAX + 1).unwrap();
        assert!(Template::copy(&key(1), &short, &empty).is_err());
    }

    #[test]
    fn one_pod_at_a_time_makes_a_template_and_a_failure_is_not_repeated_at_once() {
        let templates = Arc::new(Templates::new(2, Duration::MAX));
        let making = templates.begin(&key(1)).unwrap();
        assert!(templates.begin(&key(1)).is_none());
        assert!(templates.get(&key(1)).is_none());
        making.finish(template());
        let made = templates.get(&key(1)).unwrap();
        assert!(templates.begin(&key(1)).is_none());
        assert!(templates.get(&key(2)).is_none());

        templates.discard(&key(1), &Arc::new(template()));
        assert!(templates.get(&key(1)).is_some(), "another template was discarded");
        templates.discard(&key(1), &made);
        assert!(templates.get(&key(1)).is_none());
        assert!(templates.begin(&key(1)).is_none());
        drop(templates.begin(&key(2)).unwrap());
        assert!(templates.begin(&key(2)).is_none());
    }

    /// Replaces also templates that were just used.
    fn replacing(limit: usize) -> Arc<Templates> {
        Arc::new(Templates { keep: Duration::ZERO, ..Templates::new(limit, Duration::MAX) })
    }

    #[test]
    fn a_template_that_was_just_used_is_not_replaced() {
        let templates = Arc::new(Templates::new(1, Duration::MAX));
        templates.begin(&key(1)).unwrap().finish(template());
        assert!(templates.begin(&key(2)).is_none());
        assert!(templates.get(&key(1)).is_some());
    }

    #[test]
    fn old_templates_and_those_over_the_limit_are_dropped() {
        let templates = replacing(2);
        for vcpus in 1..=2 {
            templates.begin(&key(vcpus)).unwrap().finish(template());
        }
        assert!(templates.get(&key(1)).is_some());
        templates.begin(&key(3)).unwrap().finish(template());
        assert!(templates.get(&key(2)).is_none(), "not the one that was unused for longest");
        assert!(templates.get(&key(1)).is_some() && templates.get(&key(3)).is_some());

        let templates = Arc::new(Templates::new(2, Duration::ZERO));
        templates.begin(&key(1)).unwrap().finish(template());
        assert!(templates.get(&key(1)).is_none());
        assert!(templates.begin(&key(1)).is_some(), "an old template is not replaced");
        assert!(Arc::new(Templates::new(0, Duration::MAX)).begin(&key(1)).is_none());
    }

    #[test]
    fn a_key_changes_with_every_file_and_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let config = Config {
            kernel: path("kernel"),
            initramfs: path("initramfs"),
            vmm: path("vmm"),
            ..Config::default()
        };
        let fd = vmm_api::Fd(-1);
        let vm = VmConfig {
            version: vmm_api::VERSION,
            name: "a".to_owned(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            free_page_reporting: true,
            kernel: fd,
            initramfs: None,
            cmdline: String::new(),
            kvm: fd,
            control: fd,
            status: fd,
            console: fd,
            log: None,
            vsock: None,
            disks: Vec::new(),
            nets: Vec::new(),
            serial_console: false,
            jail: None,
            restore: None,
        };
        let first = Key::new(&config, &vm).unwrap();
        let named = VmConfig { name: "b".to_owned(), ..vm.clone() };
        assert_eq!(Key::new(&config, &named).unwrap(), first);
        let larger = VmConfig { memory_mib: 65, max_memory_mib: 65, ..vm.clone() };
        assert_ne!(Key::new(&config, &larger).unwrap(), first);
        for name in ["kernel", "initramfs", "vmm"] {
            // Another file of the same length.
            std::fs::remove_file(dir.path().join(name)).unwrap();
            let before = Key::new(&Config { ..config.clone() }, &vm).is_err();
            assert!(before, "a missing file");
            path(name);
            assert_ne!(Key::new(&config, &vm).unwrap(), first, "{name}");
        }
    }
}
