//! The container's lower layer on the host: the snapshotter's mounts, mounted read-only in the bundle
//! and shared with the guest. The writable layer is in the guest.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const NONE: Option<&str> = None;
/// mount(2) accepts one page of data.
const MAX_MOUNT_DATA: usize = 4000;
/// Maximum number of mounts stacked on one directory that are unmounted.
const MAX_STACKED_MOUNTS: usize = 16;

/// A mount as a snapshotter returns it (containerd's core/mount).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotMount {
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum MountPlan {
    Bind(PathBuf),
    /// Directories, the uppermost first; two or more.
    Overlay {
        lower: Vec<PathBuf>,
        options: Vec<String>,
    },
    Filesystem {
        kind: String,
        device: PathBuf,
        options: Vec<String>,
    },
}

fn plan(mounts: &[SnapshotMount]) -> Result<MountPlan> {
    let [mount] = mounts else {
        bail!(
            "the snapshotter returned {} mounts for the root file system; exactly one is supported",
            mounts.len()
        );
    };
    let SnapshotMount { kind, source, options } = mount;
    match kind.as_str() {
        "bind" | "rbind" => Ok(MountPlan::Bind(source.clone())),
        "overlay" => {
            let value = |name: &str| options.iter().find_map(|option| option.strip_prefix(name));
            let lower = value("lowerdir=").context("overlay mount without lowerdir")?;
            // Not empty if the container ran before, or if containerd has prepared its content.
            let upper = value("upperdir=").map(PathBuf::from);
            let lower: Vec<PathBuf> = upper.into_iter().chain(split_lowerdir(lower)).collect();
            let kept = ["userxattr", "index=off", "metacopy=on", "redirect_dir=on"];
            let options: Vec<String> =
                options.iter().filter(|o| kept.contains(&o.as_str())).cloned().collect();
            match lower.len() {
                1 => Ok(MountPlan::Bind(lower.into_iter().next().unwrap_or_default())),
                _ => Ok(MountPlan::Overlay { lower, options }),
            }
        }
        "ext4" | "xfs" | "erofs" | "btrfs" => {
            if options.iter().any(|option| option == "loop") {
                bail!("{}: loop mounts of a snapshotter are not supported", source.display());
            }
            let plain = |option: &&String| !matches!(option.as_str(), "ro" | "rw");
            let options = options.iter().filter(plain).cloned().collect();
            Ok(MountPlan::Filesystem { kind: kind.clone(), device: source.clone(), options })
        }
        other => bail!("mounts of type {other:?} are not supported as root file system"),
    }
}

/// Parses overlayfs' lowerdir: colon-separated, with backslash escapes.
fn split_lowerdir(list: &str) -> Vec<PathBuf> {
    let (mut all, mut current, mut escaped) = (Vec::new(), String::new(), false);
    for c in list.chars() {
        match c {
            _ if escaped => {
                current.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            ':' => all.push(std::mem::take(&mut current)),
            c => current.push(c),
        }
    }
    all.push(current);
    all.into_iter().map(PathBuf::from).collect()
}

fn escape(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().fold(String::new(), |mut all, c| {
        if matches!(c, ':' | ',' | '\\') {
            all.push('\\');
        }
        all.push(c);
        all
    })
}

fn lowerdir(lower: &[PathBuf]) -> String {
    let lower: Vec<String> = lower.iter().map(|path| escape(path)).collect();
    format!("lowerdir={}", lower.join(":"))
}

/// The common parent directory, and the paths relative to it.
fn relative_to_common_parent(paths: &[PathBuf]) -> (PathBuf, Vec<PathBuf>) {
    let mut common = paths.first().and_then(|p| p.parent()).unwrap_or(Path::new("/")).to_owned();
    while !paths.iter().all(|path| path.starts_with(&common) && *path != common) {
        if !common.pop() {
            break;
        }
    }
    let inside = |path: &PathBuf| path.strip_prefix(&common).unwrap_or(path).to_owned();
    let inside = paths.iter().map(inside).collect();
    (common, inside)
}

/// Mounts the lower layer read-only at `target`. Blocks.
pub(crate) fn mount_read_only(mounts: &[SnapshotMount], target: &Path) -> Result<()> {
    let what = || format!("mounting the lower layer at {}", target.display());
    fs::create_dir_all(target).with_context(what)?;
    match plan(mounts)? {
        MountPlan::Bind(source) => {
            mount(Some(&source), target, NONE, MsFlags::MS_BIND, NONE)
                .with_context(|| format!("binding {} to {}", source.display(), target.display()))?;
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NONE, target, NONE, read_only, NONE).with_context(what)?;
        }
        MountPlan::Overlay { lower, options } => {
            overlay(&lower, &options, target).with_context(what)?;
        }
        MountPlan::Filesystem { kind, device, options } => {
            let options = options.join(",");
            let (flags, options) = (MsFlags::MS_RDONLY, Some(options.as_str()));
            mount(Some(&device), target, Some(kind.as_str()), flags, options).with_context(what)?;
        }
    }
    // Unmounting here must not propagate to the source.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, target, NONE, private, NONE).with_context(what)
}

fn overlay(lower: &[PathBuf], options: &[String], target: &Path) -> Result<()> {
    let data = |lower: &[PathBuf]| {
        let parts = std::iter::once(lowerdir(lower)).chain(options.iter().cloned());
        parts.collect::<Vec<_>>().join(",")
    };
    let data_all = data(lower);
    let mount_overlay = |data: &str| {
        mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_RDONLY, Some(data))
    };
    if data_all.len() <= MAX_MOUNT_DATA {
        return Ok(mount_overlay(&data_all)?);
    }
    let (common, inside) = relative_to_common_parent(lower);
    let short = data(&inside);
    if short.len() > MAX_MOUNT_DATA {
        bail!("{} layers: their paths exceed the limit of mount(2)", lower.len());
    }
    // Relative paths, from a thread with its own working directory.
    let joined = std::thread::scope(|scope| {
        let work = || -> Result<()> {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&common)?;
            Ok(mount_overlay(&short)?)
        };
        scope.spawn(work).join()
    });
    joined.unwrap_or_else(|_| bail!("the mount thread panicked"))
}

/// Unmounts everything at `target`; succeeds if nothing is mounted. Blocks.
pub(crate) fn unmount(target: &Path) -> Result<()> {
    for _ in 0..MAX_STACKED_MOUNTS {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("unmounting {}", target.display()));
            }
        }
    }
    Ok(())
}

/// Mount point of a container's lower layer: in its bundle, where containerd unmounts it too.
pub(crate) fn rootfs_path(bundle: &Path) -> PathBuf {
    bundle.join(OsString::from("rootfs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot_mount(kind: &str, source: &str, options: &[&str]) -> Vec<SnapshotMount> {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        vec![SnapshotMount { kind: kind.into(), source: source.into(), options }]
    }

    #[test]
    fn the_upper_layer_becomes_the_uppermost_lower_layer() {
        let given =
            ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let lower = ["/s/3/fs", "/s/2/fs", "/s/1/fs"].map(PathBuf::from).to_vec();
        let options = vec!["index=off".to_owned()];
        let found = plan(&snapshot_mount("overlay", "overlay", &given)).unwrap();
        assert_eq!(found, MountPlan::Overlay { lower, options });
        // A view of an image with one layer.
        let view = plan(&snapshot_mount("overlay", "overlay", &["lowerdir=/s/1/fs"])).unwrap();
        assert_eq!(view, MountPlan::Bind("/s/1/fs".into()));
        let native = plan(&snapshot_mount("bind", "/n/7", &["rbind", "rw"])).unwrap();
        assert_eq!(native, MountPlan::Bind("/n/7".into()));
    }

    #[test]
    fn unsupported_root_file_systems_are_refused() {
        assert!(plan(&[]).is_err());
        assert!(plan(&snapshot_mount("overlay", "overlay", &["upperdir=/u"])).is_err());
        assert!(plan(&snapshot_mount("ext4", "/f", &["loop"])).is_err());
        assert!(plan(&snapshot_mount("format/mkdir/overlay", "overlay", &[])).is_err());
        let two = [snapshot_mount("erofs", "/a", &[]), snapshot_mount("erofs", "/b", &[])].concat();
        assert!(plan(&two).is_err());
    }

    #[test]
    fn lowerdir_is_parsed_as_it_is_written() {
        let paths = vec![PathBuf::from(r"/a:b"), PathBuf::from(r"/c\d"), PathBuf::from("/e")];
        let text = lowerdir(&paths);
        assert_eq!(text, r"lowerdir=/a\:b:/c\\d:/e");
        assert_eq!(split_lowerdir(text.strip_prefix("lowerdir=").unwrap()), paths);
    }

    #[test]
    fn long_lowerdirs_are_relative_to_the_common_parent() {
        let paths = ["/v/s/12/fs", "/v/s/3/fs"].map(PathBuf::from);
        let (common, inside) = relative_to_common_parent(&paths);
        assert_eq!(common, Path::new("/v/s"));
        assert_eq!(inside, ["12/fs", "3/fs"].map(PathBuf::from));
        let (common, inside) = relative_to_common_parent(&["/a/b".into(), "/c".into()]);
        assert_eq!((common, inside), ("/".into(), ["a/b", "c"].map(PathBuf::from).to_vec()));
    }

    /// Needs root.
    #[test]
    fn sixty_layers_are_mounted_read_only() {
        let joined = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(NONE, "/", NONE, private, NONE).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let long = dir.path().join("l".repeat(80));
            let layer = |n: usize| long.join(n.to_string());
            for n in 0..60 {
                fs::create_dir_all(layer(n)).unwrap();
                fs::write(layer(n).join("top"), n.to_string()).unwrap();
                fs::write(layer(n).join(format!("own-{n}")), "").unwrap();
            }
            let lower: Vec<String> = (0..60).map(|n| layer(n).display().to_string()).collect();
            let option = format!("lowerdir={}", lower.join(":"));
            let target = dir.path().join("rootfs");
            let before = std::env::current_dir().unwrap();
            mount_read_only(&snapshot_mount("overlay", "overlay", &[&option]), &target).unwrap();
            assert_eq!(std::env::current_dir().unwrap(), before);
            assert_eq!(fs::read_to_string(target.join("top")).unwrap(), "0");
            assert!(target.join("own-59").exists());
            assert!(fs::write(target.join("x"), "").is_err());
            unmount(&target).unwrap();
            assert!(!target.join("top").exists());
            unmount(&target).unwrap();
        });
        joined.join().unwrap();
    }
}
