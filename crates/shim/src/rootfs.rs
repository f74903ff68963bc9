//! The container's lower layer on the host: what the snapshotter offers, mounted read-only below the
//! bundle and shared with the guest. What the container writes stays in the guest.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const NONE: Option<&str> = None;
/// mount(2) takes a page of options.
const MAX_OPTIONS: usize = 4000;
/// Mounts stacked on one place before we stop believing that each umount takes one away.
const MAX_STACK: usize = 16;

/// As a snapshotter gives it (containerd's core/mount).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Bind(PathBuf),
    /// Folders, the uppermost first; two or more.
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

fn plan(wanted: &[Wanted]) -> Result<Plan> {
    let [wanted] = wanted else {
        bail!("the snapshotter gives {} mounts for one root, one is supported", wanted.len());
    };
    let Wanted { kind, source, options } = wanted;
    match kind.as_str() {
        "bind" | "rbind" => Ok(Plan::Bind(source.clone())),
        "overlay" => {
            let value = |name: &str| options.iter().find_map(|option| option.strip_prefix(name));
            let lower = value("lowerdir=").context("an overlay without lowerdir")?;
            // Of a container that has run before, or of one whose content containerd has prepared.
            let upper = value("upperdir=").map(PathBuf::from);
            let lower: Vec<PathBuf> = upper.into_iter().chain(split(lower)).collect();
            let kept = ["userxattr", "index=off", "metacopy=on", "redirect_dir=on"];
            let options: Vec<String> =
                options.iter().filter(|o| kept.contains(&o.as_str())).cloned().collect();
            match lower.len() {
                1 => Ok(Plan::Bind(lower.into_iter().next().unwrap_or_default())),
                _ => Ok(Plan::Overlay { lower, options }),
            }
        }
        "ext4" | "xfs" | "erofs" | "btrfs" => {
            if options.iter().any(|option| option == "loop") {
                bail!("{}: loop mounts of a snapshotter are not supported", source.display());
            }
            let plain = |option: &&String| !matches!(option.as_str(), "ro" | "rw");
            let options = options.iter().filter(plain).cloned().collect();
            Ok(Plan::Filesystem { kind: kind.clone(), device: source.clone(), options })
        }
        other => bail!("mounts of type {other:?} are not supported as a root"),
    }
}

/// overlayfs' list: colons divide, a backslash takes the meaning of what follows.
fn split(list: &str) -> Vec<PathBuf> {
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

/// The folder that all have in common, and their paths in it.
fn below_common(paths: &[PathBuf]) -> (PathBuf, Vec<PathBuf>) {
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
pub(crate) fn mount_lower(wanted: &[Wanted], target: &Path) -> Result<()> {
    let what = || format!("mounting the lower layer at {}", target.display());
    fs::create_dir_all(target).with_context(what)?;
    match plan(wanted)? {
        Plan::Bind(source) => {
            mount(Some(&source), target, NONE, MsFlags::MS_BIND, NONE)
                .with_context(|| format!("binding {} to {}", source.display(), target.display()))?;
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NONE, target, NONE, read_only, NONE).with_context(what)?;
        }
        Plan::Overlay { lower, options } => overlay(&lower, &options, target).with_context(what)?,
        Plan::Filesystem { kind, device, options } => {
            let options = options.join(",");
            let (flags, options) = (MsFlags::MS_RDONLY, Some(options.as_str()));
            mount(Some(&device), target, Some(kind.as_str()), flags, options).with_context(what)?;
        }
    }
    // What is unmounted here later stays where it comes from.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, target, NONE, private, NONE).with_context(what)
}

fn overlay(lower: &[PathBuf], options: &[String], target: &Path) -> Result<()> {
    let data = |lower: &[PathBuf]| {
        let parts = std::iter::once(lowerdir(lower)).chain(options.iter().cloned());
        parts.collect::<Vec<_>>().join(",")
    };
    let whole = data(lower);
    let join = |data: &str| {
        mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_RDONLY, Some(data))
    };
    if whole.len() <= MAX_OPTIONS {
        return Ok(join(&whole)?);
    }
    let (common, inside) = below_common(lower);
    let short = data(&inside);
    if short.len() > MAX_OPTIONS {
        bail!("{} layers: their paths are longer than mount(2) takes", lower.len());
    }
    // Relative paths, from a thread that has a working folder of its own.
    let joined = std::thread::scope(|scope| {
        let work = || -> Result<()> {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&common)?;
            Ok(join(&short)?)
        };
        scope.spawn(work).join()
    });
    joined.unwrap_or_else(|_| bail!("the thread that mounts panicked"))
}

/// Takes away what is mounted there; fine when there is nothing. Blocks.
pub(crate) fn unmount(target: &Path) -> Result<()> {
    for _ in 0..MAX_STACK {
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

/// Where a container's lower layer is mounted: in its bundle, where containerd unmounts it too.
pub(crate) fn place(bundle: &Path) -> PathBuf {
    bundle.join(OsString::from("rootfs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(kind: &str, source: &str, options: &[&str]) -> Vec<Wanted> {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        vec![Wanted { kind: kind.into(), source: source.into(), options }]
    }

    #[test]
    fn an_upper_layer_is_the_uppermost_lower_one() {
        let given =
            ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let lower = ["/s/3/fs", "/s/2/fs", "/s/1/fs"].map(PathBuf::from).to_vec();
        let options = vec!["index=off".to_owned()];
        let found = plan(&wanted("overlay", "overlay", &given)).unwrap();
        assert_eq!(found, Plan::Overlay { lower, options });
        // A view of an image with one layer.
        let view = plan(&wanted("overlay", "overlay", &["lowerdir=/s/1/fs"])).unwrap();
        assert_eq!(view, Plan::Bind("/s/1/fs".into()));
        let native = plan(&wanted("bind", "/n/7", &["rbind", "rw"])).unwrap();
        assert_eq!(native, Plan::Bind("/n/7".into()));
    }

    #[test]
    fn what_cannot_be_a_root_is_refused() {
        assert!(plan(&[]).is_err());
        assert!(plan(&wanted("overlay", "overlay", &["upperdir=/u"])).is_err());
        assert!(plan(&wanted("ext4", "/f", &["loop"])).is_err());
        assert!(plan(&wanted("format/mkdir/overlay", "overlay", &[])).is_err());
        let two = [wanted("erofs", "/a", &[]), wanted("erofs", "/b", &[])].concat();
        assert!(plan(&two).is_err());
    }

    #[test]
    fn lists_of_layers_are_read_and_written_alike() {
        let paths = vec![PathBuf::from(r"/a:b"), PathBuf::from(r"/c\d"), PathBuf::from("/e")];
        let text = lowerdir(&paths);
        assert_eq!(text, r"lowerdir=/a\:b:/c\\d:/e");
        assert_eq!(split(text.strip_prefix("lowerdir=").unwrap()), paths);
    }

    #[test]
    fn long_lists_are_written_below_the_common_folder() {
        let paths = ["/v/s/12/fs", "/v/s/3/fs"].map(PathBuf::from);
        let (common, inside) = below_common(&paths);
        assert_eq!(common, Path::new("/v/s"));
        assert_eq!(inside, ["12/fs", "3/fs"].map(PathBuf::from));
        let (common, inside) = below_common(&["/a/b".into(), "/c".into()]);
        assert_eq!((common, inside), ("/".into(), ["a/b", "c"].map(PathBuf::from).to_vec()));
    }

    /// Needs root.
    #[test]
    fn sixty_layers_are_one_folder_that_cannot_be_written_to() {
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
            mount_lower(&wanted("overlay", "overlay", &[&option]), &target).unwrap();
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
