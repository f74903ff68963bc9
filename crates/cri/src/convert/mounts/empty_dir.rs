//! A kubelet's emptyDirs, known by where it makes them
//! (pkg/volume/emptydir, pkg/volume/util/subpath):
//! ```text
//! <root>/pods/<pod uid>/volumes/kubernetes.io~empty-dir/<volume>
//! <root>/pods/<pod uid>/volume-subpaths/<volume>/<container>/<n>   a bind mount of a part of it
//! ```
//! Their sizes are not in the CRI; an annotation of the pod can set them.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::{Refusal, mountinfo};
use crate::v1;

const PLUGIN: &str = "kubernetes.io~empty-dir";
/// `<volume>=<quantity>`, with commas between: `cache=1Gi,data=500Mi`.
pub const LIMITS_ANNOTATION: &str = "nacelle.dev/empty-dir-limits";

/// An emptyDir, and the path in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub folder: PathBuf,
    pub name: String,
    /// Empty: all of it.
    pub sub_path: String,
}

/// `path` is absolute and without links. Looks at the host's mounts. None: it is something else.
pub fn find(path: &Path, pod_uid: &str) -> Result<Option<Found>, Refusal> {
    let Some(place) = Place::of(path, pod_uid) else { return Ok(None) };
    let unknown = |why: String| {
        let reason = format!("{} is no place in emptyDir {:?}: {why}", path.display(), place.name);
        Err(Refusal::invalid("host_path", reason))
    };
    let sub_path = match &place.sub_path {
        Some(below) => below.clone(),
        None => match bound(path, &place.folder) {
            Ok(Some(below)) => below,
            Ok(None) => return unknown("it is not a mount of a part of it".to_owned()),
            Err(error) => return unknown(error.to_string()),
        },
    };
    let Some(sub_path) = sub_path.to_str().map(str::to_owned) else {
        return unknown("its name is not UTF-8".to_owned());
    };
    Ok(Some(Found { folder: place.folder, name: place.name, sub_path }))
}

/// The result of parsing a path.
struct Place {
    folder: PathBuf,
    name: String,
    /// None: a bind mount of a part of the volume.
    sub_path: Option<PathBuf>,
}

impl Place {
    fn of(path: &Path, pod_uid: &str) -> Option<Self> {
        if pod_uid.is_empty() {
            return None;
        }
        let parts: Vec<&OsStr> = path.iter().collect();
        let pod = parts.windows(2).position(|two| two[0] == "pods" && two[1] == pod_uid)?;
        let pod_folder: PathBuf = parts[..pod + 2].iter().collect();
        let (name, sub_path) = match &parts[pod + 2..] {
            [volumes, plugin, name, below @ ..] if *volumes == "volumes" && *plugin == PLUGIN => {
                (name, Some(below.iter().collect()))
            }
            [sub_paths, name, _container, _index] if *sub_paths == "volume-subpaths" => {
                (name, None)
            }
            _ => return None,
        };
        let folder = pod_folder.join("volumes").join(PLUGIN).join(name);
        // Sub-paths of volumes of other kinds are named in the same way.
        if sub_path.is_none() && !folder.is_dir() {
            return None;
        }
        let name = name.to_str().filter(|name| is_label(name))?.to_owned();
        Some(Self { folder, name, sub_path })
    }
}

/// As Kubernetes names volumes (RFC 1123).
fn is_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.len() <= 63 && name.chars().all(plain) && !name.starts_with('-')
}

/// Which part of `folder` is mounted at `path`.
fn bound(path: &Path, folder: &Path) -> std::io::Result<Option<PathBuf>> {
    let (Some(part), Some(whole)) = (mountinfo::of(path)?, mountinfo::of(folder)?) else {
        return Ok(None);
    };
    let same = std::fs::metadata(path)?.dev() == std::fs::metadata(folder)?.dev();
    if part.point != path || !same {
        return Ok(None);
    }
    // Where the folder is in its file system.
    let folder = whole.root.join(folder.strip_prefix(&whole.point).unwrap_or(folder));
    let below = part.root.strip_prefix(&folder).ok();
    // A folder that was deleted since is told with this ending.
    Ok(below
        .filter(|below| !below.as_os_str().as_encoded_bytes().ends_with(b"//deleted"))
        .map(Path::to_owned))
}

/// Bytes that the pod's annotation allows a volume.
pub fn limit(pod: &v1::PodSandboxConfig, volume: &str) -> Result<Option<u64>, Refusal> {
    let Some(text) = pod.annotations.get(LIMITS_ANNOTATION) else { return Ok(None) };
    let mut found = None;
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let limit = word.split_once('=').and_then(|(name, size)| Some((name, quantity(size)?)));
        let Some((name, bytes)) = limit else {
            return Err(Refusal::invalid(
                format!("annotations[{LIMITS_ANNOTATION:?}]"),
                format!("{word:?} is not like cache=1Gi"),
            ));
        };
        if name == volume {
            found = Some(bytes);
        }
    }
    Ok(found)
}

/// A positive quantity as Kubernetes writes it (apimachinery, pkg/api/resource), rounded up.
fn quantity(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 12] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("Ei", 1 << 60),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("", 1),
    ];
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit)?;
    let bytes = if number.contains('.') {
        let bytes = number.parse::<f64>().ok()? * *unit as f64;
        (bytes < u64::MAX as f64).then(|| bytes.ceil() as u64)?
    } else {
        number.parse::<u64>().ok()?.checked_mul(*unit)?
    };
    (bytes > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_dir_is_recognized_by_its_path() {
        let found = |path: &str| find(Path::new(path), "u-1").unwrap();
        let top = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir";
        let cache = |sub_path: &str| Found {
            folder: format!("{top}/cache").into(),
            name: "cache".into(),
            sub_path: sub_path.into(),
        };
        assert_eq!(found(&format!("{top}/cache")), Some(cache("")));
        assert_eq!(found(&format!("{top}/cache/a/b")), Some(cache("a/b")));
        assert_eq!(found(&format!("/elsewhere{top}/cache")).unwrap().name, "cache");
        for other in [
            top.to_owned(),
            format!("{top}/Not-A-Name"),
            top.replace("u-1", "u-2") + "/cache",
            top.replace("pods", "pod") + "/cache",
            top.replace("empty-dir", "csi") + "/cache",
            "/var/lib/kubelet/pods/u-1/volume-subpaths/cache/c/0".to_owned(),
            "/data".to_owned(),
        ] {
            assert_eq!(found(&other), None, "{other}");
        }
        assert_eq!(find(Path::new(&format!("{top}/cache").replace("u-1/", "")), "").unwrap(), None);
    }

    #[test]
    fn a_sub_path_that_is_not_a_mount_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().canonicalize().unwrap().join("pods/u-1");
        let sub = pod.join("volume-subpaths/cache/c/0");
        std::fs::create_dir_all(&sub).unwrap();
        assert_eq!(find(&sub, "u-1").unwrap(), None);
        std::fs::create_dir_all(pod.join("volumes").join(PLUGIN).join("cache")).unwrap();
        let refused = find(&sub, "u-1").unwrap_err().to_string();
        assert!(refused.contains("emptyDir \"cache\""), "{refused}");
    }

    #[test]
    fn bind_mounts_of_sub_paths_are_resolved_to_their_volumes() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: needs root for mounts");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().canonicalize().unwrap().join("pods/u-1");
        let volume = |name: &str| pod.join("volumes").join(PLUGIN).join(name);
        let none = None::<&str>;
        for name in ["disk", "memory"] {
            std::fs::create_dir_all(volume(name)).unwrap();
            if name == "memory" {
                let flags = MsFlags::empty();
                mount(Some("tmpfs"), &volume(name), Some("tmpfs"), flags, none).unwrap();
            }
            let (part, at) = (volume(name).join("a b/c"), pod.join("volume-subpaths").join(name));
            let at = at.join("c/0");
            std::fs::create_dir_all(&part).unwrap();
            std::fs::create_dir_all(&at).unwrap();
            mount(Some(&part), &at, none, MsFlags::MS_BIND, none).unwrap();
            let found = find(&at, "u-1");
            std::fs::remove_dir_all(&part).unwrap();
            let deleted = find(&at, "u-1");
            umount2(&at, MntFlags::MNT_DETACH).unwrap();
            if name == "memory" {
                umount2(&volume(name), MntFlags::MNT_DETACH).unwrap();
            }
            let found = found.unwrap().unwrap();
            assert_eq!((found.name.as_str(), found.sub_path.as_str()), (name, "a b/c"));
            assert_eq!(found.folder, volume(name));
            assert!(deleted.is_err());
        }
    }

    #[test]
    fn an_annotation_limits_the_volumes_that_it_names() {
        let pod = |text: &str| v1::PodSandboxConfig {
            annotations: [(LIMITS_ANNOTATION.to_owned(), text.to_owned())].into(),
            ..Default::default()
        };
        let two = pod("cache=1Gi, data=1.5k,");
        assert_eq!(limit(&two, "cache"), Ok(Some(1 << 30)));
        assert_eq!(limit(&two, "data"), Ok(Some(1500)));
        assert_eq!(limit(&two, "other"), Ok(None));
        assert_eq!(limit(&v1::PodSandboxConfig::default(), "cache"), Ok(None));
        for wrong in ["cache", "cache=", "cache=0", "cache=1X", "cache=-1", "cache=1e3", "a=99Ei"] {
            assert!(limit(&pod(wrong), "cache").is_err(), "{wrong}");
        }
    }
}
