//! Mounts of a container, by containerd's rules (internal/cri/opts/spec_linux_opts.go) where a VM
//! can follow them.
//!
//! | what is mounted | how it reaches the container |
//! |---|---|
//! | ConfigMap, Secret, projected: a read-only folder with a `..data` link | copied and kept in step |
//! | a small file on /etc/hosts, /etc/hostname or /etc/resolv.conf | copied |
//! | the termination log | a copy that is written back at the end |
//! | an image | its EROFS disk |
//! | an `emptyDir`, or a part of one | made in the guest ([`empty_dir`]) |
//! | a hugetlbfs (`emptyDir` with medium HugePages) | one of the guest's, empty |
//! | any other file or folder of the host | shared |
//!
//! The image's own volumes (VOLUME) are folders in the container's writable layer, which can be
//! written to even where the rest is read-only; containerd copies them to the host, where nobody looks.
//!
//! A pod without a VM has everything but images from the host itself.
//!
//! Refused in a VM: sockets, pipes and devices of the host, for they are ends of something in its
//! kernel; BIDIRECTIONAL propagation but in an emptyDir, for a guest's mounts cannot appear on the
//! host. Refused everywhere: mount options.
//! `selinux_relabel` has nothing to do: where labels count, [`super::security`] has refused before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{FileType, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{HUGETLBFS_MAGIC, PROC_SUPER_MAGIC, statfs};
use oci_spec::image::Config as ImageConfig;
use sandbox::model::{Access, Propagation, Volume, VolumeSource};

use super::container_path::{container_path, leads_upwards};
use super::userns::UserNamespace;
use super::{Refusal, devices, known, mountinfo};
use crate::v1;

pub mod empty_dir;
mod strict;
#[cfg(test)]
mod tests;

pub use self::strict::strict;

/// A kubelet writes them for each pod (the first) or might; a copy saves the pod a shared folder.
const SMALL_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
/// Larger files are shared instead of copied into a guest's memory.
const SMALL: u64 = 1 << 20;
/// Default path of the termination message.
const TERMINATION_LOG: &str = "/dev/termination-log";
const TERMINATION_LOG_ANNOTATION: &str = "io.kubernetes.container.terminationMessagePath";
/// The link that a kubelet's AtomicWriter replaces to update a directory.
const ATOMIC_LINK: &str = "..data";
/// Attack: a request with a hundred thousand mounts, each of which the host would have to check;
/// Kubernetes' own use stays below a hundred.
const MAX_MOUNTS: usize = 512;
/// The size of page that a guest's huge pages have, bytes.
const HUGE_PAGE: u64 = 2 << 20;
/// Mount points of the container's devices and processes.
const DEV: &str = "/dev";
const PROC: &str = "/proc";
/// Files of it that others may stand for, as with runc (`checkProcMount`): those that lxcfs serves.
const REPLACED_IN_PROC: [&str; 10] = [
    "cpuinfo",
    "diskstats",
    "loadavg",
    "meminfo",
    "slabinfo",
    "stat",
    "swaps",
    "sys/crypto/fips_enabled",
    "sys/kernel/ns_last_pid",
    "uptime",
];
/// Kernel file systems: not allowed for VOLUMEs of an image.
const KERNEL_MOUNTS: [&str; 3] = [DEV, PROC, "/sys"];
/// Error text that a kubelet matches (cri-api, pkg/errors).
const IMAGE_VOLUME_FAILED: &str = "ImageVolumeMountFailed";

/// Other parts of the request that matter for mounts.
pub struct Context<'a> {
    pub annotations: &'a BTreeMap<String, String>,
    pub user_namespace: Option<UserNamespace>,
    /// The request of the pod.
    pub pod: &'a v1::PodSandboxConfig,
    /// The pod has no VM.
    pub on_host: bool,
    pub privileged: bool,
    /// An image's EROFS file by its name or id.
    pub images: &'a dyn Fn(&str) -> Option<PathBuf>,
}

/// Resolves the host's paths, and creates missing directories, as containerd does; only after
/// every mount has been validated by itself. Blocks.
pub fn volumes(mounts: &[v1::Mount], context: &Context<'_>) -> Result<Vec<Volume>, Refusal> {
    if mounts.len() > MAX_MOUNTS {
        return Err(Refusal::invalid(
            "mounts",
            format!("{} of them; at most {MAX_MOUNTS} are taken", mounts.len()),
        ));
    }
    let each = |index: usize, refusal: Refusal| refusal.in_field(&format!("mounts[{index}]"));
    let mut checked = Vec::with_capacity(mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        checked.push(check(mount, context).map_err(|refusal| each(index, refusal))?);
    }
    let mut volumes = Vec::with_capacity(mounts.len());
    for (index, (mount, checked)) in mounts.iter().zip(checked).enumerate() {
        if !context.on_host && is_of_guest(mount, &checked) {
            continue;
        }
        volumes.push(volume(mount, checked, context).map_err(|refusal| each(index, refusal))?);
    }
    // Parents before the mounts inside them.
    volumes.sort_by_key(|volume| Path::new(&volume.container_path).components().count());
    Ok(volumes)
}

/// What the guest has itself, so that nothing of the host is mounted: a device (see
/// [`devices::of_mounts`]), or all of them, which a privileged container has anyway.
fn is_of_guest(mount: &v1::Mount, checked: &Checked) -> bool {
    devices::of_mount(mount).is_some() || checked.container_path == DEV
}

/// Where container engines and image builders keep their layers. Overlayfs does not take a folder of
/// overlayfs as its upper layer, so that they would have to do without it in a container's own layer.
const ENGINES: [&str; 4] =
    ["/var/lib/buildkit", "/var/lib/containerd", "/var/lib/containers", "/var/lib/docker"];

/// Volumes of a privileged container with a kernel of its own beside those of its image, so that
/// engines in it can use overlayfs. Mounts of the request and VOLUMEs that lie above or below one of
/// these folders say themselves what is there.
pub fn of_engines(volumes: &[Volume], of_image: &[String]) -> Vec<String> {
    let taken: Vec<&Path> = volumes
        .iter()
        .map(|volume| volume.container_path.as_ref())
        .chain(of_image.iter().map(Path::new))
        .collect();
    let is_free =
        |path: &Path| !taken.iter().any(|taken| path.starts_with(taken) || taken.starts_with(path));
    let free = ENGINES.into_iter().filter(|path| is_free(Path::new(path)));
    free.map(str::to_owned).collect()
}

/// The image's own volumes, but for those in whose place the request mounts something, and those in
/// which the kernel's file systems stand.
pub fn of_image(config: Option<&ImageConfig>, volumes: &[Volume]) -> Result<Vec<String>, Refusal> {
    let named = config.and_then(|config| config.volumes().as_deref()).unwrap_or_default();
    if named.len() + volumes.len() > MAX_MOUNTS {
        return Err(Refusal::invalid(
            "mounts",
            format!(
                "{} of them and {} volumes of the image; at most {MAX_MOUNTS} are taken",
                volumes.len(),
                named.len()
            ),
        ));
    }
    let mut own = BTreeSet::new();
    for path in named {
        let mut clean = PathBuf::from("/");
        for component in Path::new(path).components() {
            match component {
                Component::Normal(name) => clean.push(name),
                Component::ParentDir => drop(clean.pop()),
                _ => {}
            }
        }
        // The root is no place for a mount.
        let is_valid =
            clean != Path::new("/") && !KERNEL_MOUNTS.iter().any(|mount| clean.starts_with(mount));
        let path = clean.to_string_lossy().into_owned();
        let is_taken = volumes.iter().any(|volume| volume.container_path == path);
        if is_valid && !path.contains('\0') && !is_taken {
            own.insert(path);
        }
    }
    Ok(own.into_iter().collect())
}

/// A mount validated without access to the host.
struct Checked {
    container_path: String,
    access: Access,
    propagation: Propagation,
}

fn check(mount: &v1::Mount, context: &Context<'_>) -> Result<Checked, Refusal> {
    let container_path = container_path(&mount.container_path)?;
    check_place(&container_path, mount, context)?;
    let propagation = known("propagation", mount.propagation)?;
    let access = access(mount, propagation)?;
    let propagation = match propagation {
        v1::MountPropagation::PropagationPrivate => Propagation::Private,
        v1::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        v1::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
    };
    if !mount.mount_options.is_empty() {
        return Err(Refusal::unsupported(
            "mount_options",
            format!("{:?}: options of mounts are not served", mount.mount_options),
        ));
    }
    check_mapping(mount, context.user_namespace)?;
    check_source(mount)?;
    let checked = Checked { container_path, access, propagation };
    if propagation == Propagation::Bidirectional && !context.on_host {
        // Before any folder is made for another mount.
        let real = Path::new(&mount.host_path).canonicalize();
        let path = real.as_deref().unwrap_or(Path::new(&mount.host_path));
        if mount.image.is_some() || find_empty_dir(path, context)?.is_none() {
            return Err(bidirectional());
        }
    }
    Ok(checked)
}

fn bidirectional() -> Refusal {
    Refusal::unsupported(
        "propagation",
        "PROPAGATION_BIDIRECTIONAL: what a container mounts is mounted in its VM and cannot appear \
         on the host; use PROPAGATION_HOST_TO_CONTAINER, or run the pod with a runtime class that is \
         not a VM",
    )
}

fn find_empty_dir(path: &Path, context: &Context<'_>) -> Result<Option<empty_dir::Found>, Refusal> {
    let uid = context.pod.metadata.as_ref().map(|metadata| metadata.uid.as_str());
    empty_dir::find(path, uid.unwrap_or_default())
}

/// A mount replaces the default mount at the same path, except for the file systems
/// that a process needs.
fn check_place(
    container_path: &str,
    mount: &v1::Mount,
    context: &Context<'_>,
) -> Result<(), Refusal> {
    let refuse =
        |why: &str| Err(Refusal::unsupported("container_path", format!("{container_path}: {why}")));
    if container_path == DEV {
        return match mount.host_path.trim_end_matches('/') == DEV {
            // Those of the guest, which stands for the node.
            true if context.privileged && !context.on_host => Ok(()),
            true => refuse(
                "only a privileged container of a pod with a VM has all devices; name those that are \
                 needed in `devices`",
            ),
            false => refuse("is made for the container; mount below it"),
        };
    }
    let Ok(inside) = Path::new(container_path).strip_prefix(PROC) else { return Ok(()) };
    if inside == Path::new("") {
        let is_proc = |path: &str| {
            statfs(path).is_ok_and(|system| system.filesystem_type() == PROC_SUPER_MAGIC)
        };
        return match context.on_host && is_proc(&mount.host_path) {
            true => Ok(()),
            false => refuse("shows the container's own processes; mount elsewhere"),
        };
    }
    match REPLACED_IN_PROC.iter().any(|file| inside == Path::new(file)) {
        true => Ok(()),
        false => refuse("nothing is mounted inside /proc but for a few files, such as meminfo"),
    }
}

fn access(mount: &v1::Mount, propagation: v1::MountPropagation) -> Result<Access, Refusal> {
    match (mount.readonly, mount.recursive_read_only) {
        (false, false) => Ok(Access::ReadWrite),
        (true, false) => Ok(Access::ReadOnly),
        (false, true) => Err(Refusal::invalid("recursive_read_only", "needs readonly")),
        (true, true) if propagation != v1::MountPropagation::PropagationPrivate => {
            Err(Refusal::invalid(
                "recursive_read_only",
                format!("needs PROPAGATION_PRIVATE and not {}", propagation.as_str_name()),
            ))
        }
        (true, true) => Ok(Access::ReadOnlyRecursive),
    }
}

/// A mount is mapped as its pod is, or not at all.
fn check_mapping(mount: &v1::Mount, pod: Option<UserNamespace>) -> Result<(), Refusal> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(());
    }
    let pods =
        pod.is_some_and(|pod| pod.uids.is(&mount.uid_mappings) && pod.gids.is(&mount.gid_mappings));
    if pods {
        return Ok(());
    }
    Err(Refusal::unsupported(
        "uidMappings",
        "only the mapping of the pod's own user namespace is served",
    ))
}

fn check_source(mount: &v1::Mount) -> Result<(), Refusal> {
    let Some(image) = &mount.image else {
        if !mount.image_sub_path.is_empty() {
            return Err(Refusal::invalid("image_sub_path", "given without an image"));
        }
        if mount.host_path.is_empty() {
            return Err(Refusal::invalid("host_path", "empty, and no image is named either"));
        }
        let path = Path::new(&mount.host_path);
        if !path.is_absolute() || mount.host_path.contains('\0') {
            return Err(Refusal::invalid("host_path", format!("{path:?} is not absolute")));
        }
        return Ok(());
    };
    let wrong =
        |reason: &str| Err(Refusal::invalid("image", format!("{IMAGE_VOLUME_FAILED}: {reason}")));
    if image.image.is_empty() {
        return wrong("no image is named");
    }
    if !mount.host_path.is_empty() {
        return wrong("host_path has to be empty other it");
    }
    if !mount.readonly {
        return wrong("an image can only be mounted with readonly");
    }
    if leads_upwards(Path::new(&mount.image_sub_path)) || mount.image_sub_path.contains('\0') {
        return wrong("image_sub_path leads out of it");
    }
    Ok(())
}

fn volume(mount: &v1::Mount, checked: Checked, context: &Context<'_>) -> Result<Volume, Refusal> {
    let Checked { container_path, access, propagation } = checked;
    if let Some(spec) = &mount.image {
        let image = (context.images)(&spec.image).ok_or_else(|| {
            Refusal::invalid(
                "image",
                format!("{IMAGE_VOLUME_FAILED}: {:?} is not on this node: pull it", spec.image),
            )
        })?;
        let sub_path = mount.image_sub_path.trim_start_matches('/').to_string();
        let source = VolumeSource::Image { image, sub_path };
        return Ok(Volume {
            container_path,
            source,
            access: Access::ReadOnlyRecursive,
            propagation,
        });
    }
    let (host_path, metadata) = resolve(Path::new(&mount.host_path))?;
    let kind = metadata.file_type();
    if context.on_host {
        if propagation != Propagation::Private {
            check_propagates(&host_path, propagation)?;
        }
        let source = VolumeSource::Shared { host_path };
        return Ok(Volume { container_path, source, access, propagation });
    }
    if let Some(name) = special(kind) {
        return Err(Refusal::unsupported(
            "host_path",
            format!(
                "{} is {name}: its other end is in the host's kernel, which a pod in a VM does \
                 not reach",
                mount.host_path
            ),
        ));
    }
    if kind.is_dir()
        && let Some(source) = huge_pages(&host_path, &metadata)?
    {
        if propagation != Propagation::Private {
            return Err(Refusal::unsupported("propagation", "huge pages have no mounts below"));
        }
        return Ok(Volume { container_path, source, access, propagation });
    }
    if let Some(found) = find_empty_dir(&host_path, context)? {
        let size_limit = empty_dir::limit(context.pod, &found.name)?;
        let empty_dir::Found { folder, sub_path, .. } = found;
        let source = VolumeSource::EmptyDir { host_path, directory: folder, sub_path, size_limit };
        return Ok(Volume { container_path, source, access, propagation });
    }
    if propagation == Propagation::Bidirectional {
        return Err(bidirectional());
    }
    let small = kind.is_file() && metadata.len() <= SMALL;
    let private = propagation == Propagation::Private;
    let source = if small && SMALL_FILES.contains(&container_path.as_str()) {
        VolumeSource::Copied { host_path }
    } else if small && !mount.readonly && is_termination_log(&container_path, context.annotations) {
        VolumeSource::WrittenBack { host_path }
    } else if kind.is_dir() && mount.readonly && private && is_atomic(&host_path) {
        VolumeSource::Synced { host_path }
    } else {
        if propagation == Propagation::HostToContainer {
            check_propagates(&host_path, propagation)?;
        }
        VolumeSource::Shared { host_path }
    };
    Ok(Volume { container_path, source, access, propagation })
}

/// Huge pages are memory: those of the host are no use in a VM, which has its own.
fn huge_pages(path: &Path, metadata: &Metadata) -> Result<Option<VolumeSource>, Refusal> {
    let failed = |error: std::io::Error| {
        Refusal::invalid("host_path", format!("{}: {error}", path.display()))
    };
    let system = statfs(path).map_err(|error| failed(error.into()))?;
    if system.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    let refuse =
        |why: String| Err(Refusal::unsupported("host_path", format!("{}: {why}", path.display())));
    let size = system.block_size() as u64;
    if size != HUGE_PAGE {
        return refuse(format!("pages of {} MiB; a pod's VM has those of 2 MiB", size >> 20));
    }
    let whole = mountinfo::of(path)
        .map_err(failed)?
        .is_some_and(|mount| mount.point == path && mount.root == Path::new("/"));
    if !whole {
        return refuse("a folder of a hugetlbfs; a pod in a VM has a whole one or none".into());
    }
    // Each has a device number of its own for as long as it is mounted.
    Ok(Some(VolumeSource::HugePages { name: format!("huge-{:x}", metadata.dev()) }))
}

/// Resolves symbolic links now, so that a later change of a link has no effect.
fn resolve(path: &Path) -> Result<(PathBuf, Metadata), Refusal> {
    let failed = |what: &str, error: std::io::Error| {
        Refusal::invalid("host_path", format!("{}: {what}{error}", path.display()))
    };
    if let Err(error) = std::fs::metadata(path) {
        if error.kind() != std::io::ErrorKind::NotFound {
            return Err(failed("", error));
        }
        std::fs::create_dir_all(path).map_err(|error| failed("making the folder: ", error))?;
    }
    let real = path.canonicalize().map_err(|error| failed("", error))?;
    let metadata = real.symlink_metadata().map_err(|error| failed("", error))?;
    Ok((real, metadata))
}

fn special(kind: FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() || kind.is_dir() => None,
        kind if kind.is_socket() => Some("a socket"),
        kind if kind.is_fifo() => Some("a pipe"),
        kind if kind.is_block_device() => Some("a block device (ask for it in `devices`)"),
        _ => Some("a device"),
    }
}

fn is_termination_log(container_path: &str, annotations: &BTreeMap<String, String>) -> bool {
    let asked = annotations.get(TERMINATION_LOG_ANNOTATION).filter(|path| !path.is_empty());
    container_path == asked.map_or(TERMINATION_LOG, String::as_str)
}

fn is_atomic(folder: &Path) -> bool {
    folder.join(ATOMIC_LINK).symlink_metadata().is_ok_and(|found| found.is_symlink())
}

/// Propagation needs a shared mount, or for HostToContainer a slave.
fn check_propagates(path: &Path, propagation: Propagation) -> Result<(), Refusal> {
    let mount = mountinfo::of(path).map_err(|error| {
        Refusal::invalid("propagation", format!("/proc/self/mountinfo: {error}"))
    })?;
    match mount {
        Some(mount) if mount.shared => Ok(()),
        Some(mount) if mount.slave && propagation != Propagation::Bidirectional => Ok(()),
        mount => Err(Refusal::invalid(
            "propagation",
            format!(
                "{} lies on the mount {}, which does not pass mounts on: make it shared \
                 (mount --make-rshared), or use PROPAGATION_PRIVATE",
                path.display(),
                mount.map_or(PathBuf::from("/"), |mount| mount.point).display()
            ),
        )),
    }
}
