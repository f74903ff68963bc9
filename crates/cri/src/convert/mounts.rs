//! Mounts of a container.
//!
//! A pod in a microVM does not share the host's file systems. What can be had is a copy, made when
//! the container is created: read-only mounts of files and folders (secrets, configuration,
//! certificates), and the three files that a kubelet writes for every pod and mounts writable
//! though nobody outside reads them again. Everything else would seem to work and lose data, so it
//! is refused.
//!
//! `selinux_relabel` is about labels on the host's file, which a copy leaves alone; a recursive
//! read-only mount is what a copy is anyway.

use std::path::{Path, PathBuf};

use sandbox::model::{Access, Propagation, Volume, VolumeSource};

use super::{Refusal, known};
use crate::v1;

/// Writable in the container, and private to it.
const PRIVATE_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
/// A request that names a hundred thousand folders would have the host read them all; Kubernetes' own
/// use stays below a hundred.
const MAX_MOUNTS: usize = 512;

pub fn volumes(mounts: &[v1::Mount]) -> Result<Vec<Volume>, Refusal> {
    if mounts.len() > MAX_MOUNTS {
        return Err(Refusal::invalid(
            "mounts",
            format!("{} of them; at most {MAX_MOUNTS} are taken", mounts.len()),
        ));
    }
    mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| copy(mount).map_err(|r| r.inside(&format!("mounts[{index}]"))))
        .collect()
}

fn copy(mount: &v1::Mount) -> Result<Volume, Refusal> {
    let target = container_path(&mount.container_path)?;
    unsupported_parts(mount)?;
    if mount.host_path.is_empty() {
        return Err(Refusal::invalid("host_path", "empty, and no image is named either"));
    }
    let host_path = Path::new(&mount.host_path);
    if !host_path.is_absolute() {
        return Err(Refusal::invalid("host_path", format!("{host_path:?} is not absolute")));
    }
    // What the path leads to now; a link put there later leads nowhere else.
    let host_path = host_path
        .canonicalize()
        .map_err(|error| Refusal::invalid("host_path", format!("{}: {error}", mount.host_path)))?;
    let metadata = host_path
        .symlink_metadata()
        .map_err(|error| Refusal::invalid("host_path", format!("{}: {error}", mount.host_path)))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_dir() {
        return Err(Refusal::unsupported(
            "host_path",
            format!(
                "{} is neither a file nor a folder; sockets, pipes and devices of the host do not \
                 reach into a pod's VM",
                mount.host_path
            ),
        ));
    }
    let private = kind.is_file() && PRIVATE_FILES.contains(&target.as_str());
    if !mount.readonly && !private {
        return Err(Refusal::unsupported(
            "readonly",
            format!(
                "{} on {target} is to be writable: the host would never see what the pod writes. \
                 Only read-only mounts are served; data goes into the container's own file system",
                mount.host_path
            ),
        ));
    }
    Ok(Volume {
        container_path: target,
        source: VolumeSource::Copied { host_path },
        access: if mount.readonly { Access::ReadOnlyRecursive } else { Access::ReadWrite },
        propagation: Propagation::Private,
    })
}

fn unsupported_parts(mount: &v1::Mount) -> Result<(), Refusal> {
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty())
        || !mount.image_sub_path.is_empty()
    {
        return Err(Refusal::unsupported("image", "image volumes are not served"));
    }
    match known("propagation", mount.propagation)? {
        v1::MountPropagation::PropagationPrivate => {}
        other => {
            return Err(Refusal::unsupported(
                "propagation",
                format!(
                    "{}: mounts do not cross the border between the host and a pod's VM; use \
                     PROPAGATION_PRIVATE",
                    other.as_str_name()
                ),
            ));
        }
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(Refusal::unsupported("uidMappings", "id-mapped mounts are not served"));
    }
    if !mount.mount_options.is_empty() {
        return Err(Refusal::unsupported(
            "mount_options",
            format!("{:?}: a copied volume takes no options", mount.mount_options),
        ));
    }
    if mount.recursive_read_only && !mount.readonly {
        return Err(Refusal::invalid("recursive_read_only", "needs readonly"));
    }
    Ok(())
}

/// Absolute, and without a way up: the guest resolves it inside the container's root.
fn container_path(path: &str) -> Result<String, Refusal> {
    // Kubernetes takes a relative path as one from the root.
    let absolute = Path::new("/").join(path);
    if path.is_empty() || path.contains('\0') || absolute == Path::new("/") {
        return Err(Refusal::invalid(
            "container_path",
            format!("{path:?} is no place for a mount"),
        ));
    }
    let mut clean = PathBuf::from("/");
    for part in absolute.components() {
        match part {
            std::path::Component::Normal(name) => clean.push(name),
            std::path::Component::RootDir | std::path::Component::CurDir => {}
            std::path::Component::ParentDir | std::path::Component::Prefix(_) => {
                return Err(Refusal::invalid("container_path", format!("{path:?} leads upwards")));
            }
        }
    }
    Ok(clean.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(host: &Path, container: &str) -> v1::Mount {
        v1::Mount {
            host_path: host.to_string_lossy().into_owned(),
            container_path: container.into(),
            readonly: true,
            ..Default::default()
        }
    }

    fn refused(mount: v1::Mount) -> String {
        volumes(&[mount]).unwrap_err().to_string()
    }

    #[test]
    fn read_only_files_and_folders_are_copied_from_where_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::write(root.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", root.join("link")).unwrap();
        let found = volumes(&[mount(&root, "/etc//x/."), mount(&root.join("link"), "y")]).unwrap();
        let from = |path: PathBuf| VolumeSource::Copied { host_path: path };
        assert_eq!(found[0].source, from(root.clone()));
        assert_eq!(found[0].container_path, "/etc/x");
        assert_eq!(found[1].source, from(root.join("file")));
        assert_eq!(found[1].container_path, "/y");
        assert!(found.iter().all(|volume| volume.access == Access::ReadOnlyRecursive));
    }

    #[test]
    fn only_the_kubelets_own_files_may_be_writable() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let writable = |path: &str| v1::Mount { readonly: false, ..mount(&file, path) };
        for path in PRIVATE_FILES {
            assert_eq!(volumes(&[writable(path)]).unwrap()[0].access, Access::ReadWrite);
        }
        assert!(refused(writable("/data")).starts_with("mounts[0].readonly"));
        assert!(refused(writable("/dev/termination-log")).contains("never see"));
        let folder = v1::Mount { readonly: false, ..mount(dir.path(), "/etc/hosts") };
        assert!(refused(folder).starts_with("mounts[0].readonly"));
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let base = mount(dir.path(), "/x");
        let two_way = v1::MountPropagation::PropagationBidirectional as i32;
        let table = [
            (v1::Mount { propagation: two_way, ..base.clone() }, "propagation"),
            (v1::Mount { propagation: 9, ..base.clone() }, "propagation"),
            (v1::Mount { image_sub_path: "x".into(), ..base.clone() }, "image"),
            (v1::Mount { mount_options: vec!["noexec".into()], ..base.clone() }, "mount_options"),
            (v1::Mount { uid_mappings: vec![v1::IdMapping::default()], ..base.clone() }, "uidMap"),
            (
                v1::Mount { recursive_read_only: true, readonly: false, ..base.clone() },
                "recursive_read_only",
            ),
            (mount(Path::new(""), "/x"), "host_path"),
            (mount(Path::new("relative"), "/x"), "host_path"),
            (mount(&dir.path().join("missing"), "/x"), "host_path"),
            (mount(Path::new("/dev/null"), "/x"), "host_path"),
            (mount(dir.path(), ""), "container_path"),
            (mount(dir.path(), "/"), "container_path"),
            (mount(dir.path(), "/a/../b"), "container_path"),
        ];
        for (mount, field) in table {
            let text = refused(mount);
            assert!(text.starts_with(&format!("mounts[0].{field}")), "{text}");
        }
    }
}
