//! Volumes of small files (ConfigMaps, Secrets, `/etc/hosts`): one tmpfs for each, written by the
//! host, bind-mounted into containers.
//!
//! With `swap`, the files of one write appear atomically, in the layout of kubelet's own volumes
//! (AtomicWriter), so that programs see the same inotify events:
//! ```text
//! name   -> ..data/name
//! ..data -> ..v7          replaced by one rename(2)
//! ..v7/name               previous generations are removed
//! ```

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use agent_api::v1;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};

use crate::error::{Context, Error, Result};
use crate::oci::userns::Mapping;

const DEFAULT_SIZE: u64 = 64 << 20;
/// Maximum size of one volume, bytes; pages of a tmpfs are memory of the pod.
const MAX_SIZE: u64 = 16 << 30;
/// Maximum files of one volume; each uses kernel memory.
const MAX_INODES: u64 = 65536;
/// Maximum volumes of a pod; each is a mount, and mounts slow down every container start.
const MAX_VOLUMES: usize = 1024;

/// Maximum bytes of one [`Volumes::read`]; below the message size limit.
const MAX_READ: u64 = 1 << 20;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

#[derive(Debug)]
pub struct Volumes {
    base: PathBuf,
    volumes: HashMap<String, Volume>,
    /// Mapping of the pod's user namespace, for the owners of files.
    mapping: Option<Mapping>,
}

#[derive(Debug, Default)]
struct Volume {
    /// Number of the current `..data` generation.
    generation: u64,
    /// Directory of a swap that further requests continue.
    staged: Option<PathBuf>,
}

impl Volumes {
    pub fn new(base: PathBuf) -> Self {
        Self { base, volumes: HashMap::new(), mapping: None }
    }

    /// Returns the directory of a volume; creates an empty volume if it does not exist.
    pub fn ensure(&mut self, id: &str, size_limit: u64) -> Result<PathBuf> {
        crate::ids::check("volume id", id)?;
        let dir = self.base.join(id);
        if self.volumes.contains_key(id) {
            return Ok(dir);
        }
        if self.volumes.len() >= MAX_VOLUMES {
            return Err(Error::Exhausted { what: "volumes of a pod", limit: MAX_VOLUMES as u64 });
        }
        let size = if size_limit == 0 { DEFAULT_SIZE } else { size_limit.min(MAX_SIZE) };
        let what = || format!("create volume {id}");
        fs::create_dir_all(&dir).context(what)?;
        let data = format!("mode=0755,size={size},nr_inodes={MAX_INODES}");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if let Err(error) = mount(Some("volume"), &dir, Some("tmpfs"), flags, Some(data.as_str())) {
            let _ = fs::remove_dir(&dir);
            return Err(error).context(what);
        }
        // Shared, so that mounts propagate between containers with such a propagation.
        let shared = mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>);
        if let Err(error) = shared {
            let _ = umount2(&dir, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&dir);
            return Err(error).context(what);
        }
        self.volumes.insert(id.to_owned(), Volume::default());
        if let Some(mapping) = &self.mapping {
            map_owners(&dir, mapping).context(what)?;
        }
        Ok(dir)
    }

    /// Maps the owners of all files, existing and future, with the user namespace's mapping: tmpfs
    /// supports id-mapped mounts since Linux 6.3 only.
    pub fn set_mapping(&mut self, mapping: &Mapping) -> Result<()> {
        if self.mapping.is_some() {
            return Ok(());
        }
        for id in self.volumes.keys() {
            let dir = self.base.join(id);
            map_owners(&dir, mapping).context(|| format!("map the owners in volume {id}"))?;
        }
        self.mapping = Some(mapping.clone());
        Ok(())
    }

    /// Writes files. A failed swap keeps the previous content.
    pub fn write(&mut self, request: &v1::WriteVolumeRequest) -> Result<()> {
        let dir = self.ensure(&request.volume_id, request.size_limit)?;
        let Some(volume) = self.volumes.get_mut(&request.volume_id) else { return Ok(()) };
        let owner = |file: &v1::VolumeFile| {
            let owner = (file.uid, file.gid);
            // Ids that are not mapped are kept; they appear as the overflow id in containers.
            self.mapping
                .as_ref()
                .and_then(|mapping| mapping.outside(owner.0, owner.1).ok())
                .unwrap_or(owner)
        };
        if !request.swap {
            return request
                .files
                .iter()
                .try_for_each(|file| write_file(&dir, file, owner(file), false));
        }
        let stage = match volume.staged.take() {
            Some(stage) => stage,
            None => {
                volume.generation += 1;
                let stage = dir.join(format!("..v{}", volume.generation));
                let what = || format!("create {}", stage.display());
                fs::create_dir(&stage).context(what)?;
                if let Some(mapping) = &self.mapping {
                    map_owners(&stage, mapping).context(what)?;
                }
                stage
            }
        };
        let written =
            request.files.iter().try_for_each(|file| write_file(&stage, file, owner(file), true));
        if written.is_ok() && request.more {
            volume.staged = Some(stage);
            return Ok(());
        }
        let done = written.and_then(|()| publish(&dir, &stage));
        if done.is_err() {
            let _ = fs::remove_dir_all(&stage);
        }
        done
    }

    /// Reads at most `limit` bytes of a regular file (0: the maximum of 1 MiB).
    pub fn read(&self, id: &str, path: &str, limit: u64) -> Result<Vec<u8>> {
        if !self.volumes.contains_key(id) {
            return Err(Error::NotFound { what: "volume", id: id.to_owned() });
        }
        let what = || format!("read {path:?} in volume {id}");
        let root = open_dir(&self.base.join(id))?;
        // O_NONBLOCK: a container may have created a FIFO.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        let file = File::from(beneath(&root, relative(path)?, flags, Mode::empty()).context(what)?);
        if !file.metadata().context(what)?.is_file() {
            return Err(Error::invalid("path", format!("{path:?} is not a regular file")));
        }
        let limit = if limit == 0 { MAX_READ } else { limit.min(MAX_READ) };
        let mut content = Vec::new();
        file.take(limit).read_to_end(&mut content).context(what)?;
        Ok(content)
    }

    /// Returns an O_PATH descriptor of a volume, or of `sub_path` in it; missing directories are
    /// created.
    pub fn open(&mut self, id: &str, sub_path: &str) -> Result<OwnedFd> {
        let root = open_dir(&self.ensure(id, 0)?)?;
        if sub_path.is_empty() {
            return Ok(root);
        }
        let path = relative(sub_path)?;
        let what = || format!("open {sub_path:?} in volume {id}");
        // Symlinks such as `..data` are followed, but not out of the volume.
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(root.as_fd(), path, how) {
            Err(Errno::ENOENT) => make_parents(&root, path).context(what),
            result => result.context(what),
        }
    }

    /// Removes the volumes of a container: those with the id `<container>` or
    /// `<container>.<suffix>`.
    pub fn remove_container_volumes(&mut self, container: &str) -> Result<()> {
        let own: Vec<String> = self
            .volumes
            .keys()
            .filter(|id| {
                id.strip_prefix(container)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
            .cloned()
            .collect();
        let mut result = Ok(());
        for id in own {
            let dir = self.base.join(&id);
            // MNT_DETACH: an ending mount namespace may still hold it.
            match umount2(&dir, MntFlags::MNT_DETACH) {
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {
                    let _ = fs::remove_dir(&dir);
                    self.volumes.remove(&id);
                }
                Err(error) => {
                    result = Err(error).context(|| format!("unmount volume {id}"));
                }
            }
        }
        result
    }
}

pub fn open_dir(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(dir, flags, Mode::empty()).context(|| format!("open {}", dir.display()))
}

/// Checks that a path is relative and without `..`.
pub fn relative(text: &str) -> Result<&Path> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if text.is_empty() || !plain || text.contains('\0') {
        return Err(Error::invalid(
            "volume path",
            format!("{text:?} is not a relative path without `..`"),
        ));
    }
    Ok(path)
}

/// Maps the owners of all files in a directory; their number is bounded by [`MAX_INODES`].
fn map_owners(dir: &Path, mapping: &Mapping) -> std::io::Result<()> {
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path)?;
        if let Ok((uid, gid)) = mapping.outside(meta.uid(), meta.gid()) {
            lchown(&path, Some(uid), Some(gid))?;
        }
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
    }
    Ok(())
}

/// Writes one file into a volume with an owner. With `swap`, names starting with `..` are refused.
pub fn write_file(
    dir: &Path,
    file: &v1::VolumeFile,
    (uid, gid): (u32, u32),
    swap: bool,
) -> Result<()> {
    let path = relative(&file.path)?;
    let first = path.components().next().map(|part| part.as_os_str().as_encoded_bytes());
    if swap && first.is_some_and(|name| name.starts_with(b"..")) {
        return Err(Error::invalid("volume path", format!("{:?} is reserved", file.path)));
    }
    let what = || format!("write {:?}", file.path);
    let root = open_dir(dir)?;
    let parent = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().unwrap_or_default();
    let parent = make_parents(&root, parent).context(what)?;
    let mode = Mode::from_bits_truncate(file.mode & 0o7777);
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    match file.mode & libc::S_IFMT {
        libc::S_IFDIR => {
            match mkdirat(&parent, name, mode) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error).context(what),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let opened = beneath(&parent, name, flags, Mode::empty()).context(what)?;
            fchown(&opened, uid, gid).context(what)?;
            fchmod(&opened, mode).context(what)
        }
        libc::S_IFLNK => {
            let target = OsStr::from_bytes(&file.content);
            let _ = unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir);
            symlinkat(target, &parent, name).context(what)?;
            fchownat(&parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).context(what)
        }
        libc::S_IFREG | 0 => {
            // In place, as the file itself may be bind-mounted into a container.
            let how = if file.append { OFlag::O_APPEND } else { OFlag::O_TRUNC };
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | how;
            let opened = beneath(&parent, name, flags, mode).context(what)?;
            fchown(&opened, uid, gid).context(what)?;
            // Mode after owner: chown(2) clears set-id bits.
            fchmod(&opened, mode).context(what)?;
            File::from(opened).write_all(&file.content).context(what)
        }
        other => Err(Error::invalid("volume file mode", format!("{other:#o} is not supported"))),
    }
}

/// Opens a path below `dir` without following symlinks.
fn beneath(
    dir: &OwnedFd,
    path: impl AsRef<Path>,
    flags: OFlag,
    mode: Mode,
) -> nix::Result<OwnedFd> {
    let mut how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    if flags.contains(OFlag::O_CREAT) {
        how = how.mode(mode);
    }
    openat2(dir.as_fd(), path.as_ref(), how)
}

fn make_parents(root: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut dir = beneath(root, ".", flags, Mode::empty())?;
    for part in path.components() {
        let name = part.as_os_str();
        match mkdirat(&dir, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
        dir = beneath(&dir, Path::new(name), flags, Mode::empty())?;
    }
    Ok(dir)
}

/// Makes `stage` the current generation with an atomic rename of `..data`.
fn publish(dir: &Path, stage: &Path) -> Result<()> {
    let what = || format!("publish {}", stage.display());
    let name = stage.file_name().unwrap_or_default();
    fs::set_permissions(stage, fs::Permissions::from_mode(0o755)).context(what)?;
    let former = fs::read_link(dir.join(DATA)).ok();
    let _ = fs::remove_file(dir.join(DATA_NEW));
    symlink(name, dir.join(DATA_NEW)).context(what)?;
    fs::rename(dir.join(DATA_NEW), dir.join(DATA)).context(what)?;
    let current = names(stage).context(what)?;
    for name in &current {
        if fs::symlink_metadata(dir.join(name)).is_err() {
            symlink(Path::new(DATA).join(name), dir.join(name)).context(what)?;
        }
    }
    for name in names(dir).context(what)? {
        let visible = !name.as_encoded_bytes().starts_with(b"..");
        if visible && !current.contains(&name) {
            let _ = fs::remove_file(dir.join(name));
        }
    }
    if let Some(former) = former {
        let _ = fs::remove_dir_all(dir.join(former));
    }
    Ok(())
}

fn names(dir: &Path) -> std::io::Result<Vec<std::ffi::OsString>> {
    fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, content: &str) -> v1::VolumeFile {
        v1::VolumeFile {
            path: path.into(),
            mode: 0o644,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            content: content.into(),
            append: false,
        }
    }

    /// Volumes in a plain directory; mounts are tested as root.
    fn volumes() -> (tempfile::TempDir, Volumes) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("v")).unwrap();
        let mut volumes = Volumes::new(dir.path().to_owned());
        volumes.volumes.insert("v".into(), Volume::default());
        (dir, volumes)
    }

    fn request(files: Vec<v1::VolumeFile>, swap: bool, more: bool) -> v1::WriteVolumeRequest {
        v1::WriteVolumeRequest { volume_id: "v".into(), files, swap, size_limit: 0, more }
    }

    #[test]
    fn a_swap_shows_all_files_of_a_generation_or_none() {
        let (dir, mut volumes) = volumes();
        let root = dir.path().join("v");
        let read = |name: &str| fs::read_to_string(root.join(name)).ok();
        volumes.write(&request(vec![file("a", "1"), file("d/b", "1")], true, false)).unwrap();
        assert_eq!((read("a"), read("d/b")), (Some("1".into()), Some("1".into())));
        volumes.write(&request(vec![file("a", "2")], true, true)).unwrap();
        assert_eq!(read("a"), Some("1".into()), "the last request is still to come");
        volumes.write(&request(vec![file("c", "2")], true, false)).unwrap();
        assert_eq!((read("a"), read("c"), read("d/b")), (Some("2".into()), Some("2".into()), None));
        let bad = request(vec![file("a", "3"), file("../x", "3")], true, false);
        volumes.write(&bad).unwrap_err();
        assert_eq!((read("a"), read("c")), (Some("2".into()), Some("2".into())));
        let left: Vec<_> = names(&root).unwrap();
        assert_eq!(left.len(), 4, "{left:?}");
    }

    #[test]
    fn without_swap_a_file_is_rewritten_in_place_and_appended_to() {
        let (dir, mut volumes) = volumes();
        let path = dir.path().join("v/hosts");
        volumes.write(&request(vec![file("hosts", "long content")], false, false)).unwrap();
        let open = File::open(&path).unwrap();
        volumes.write(&request(vec![file("hosts", "new")], false, false)).unwrap();
        let mut more = file("hosts", "+");
        more.append = true;
        volumes.write(&request(vec![more], false, false)).unwrap();
        assert_eq!(volumes.read("v", "hosts", 0).unwrap(), b"new+");
        assert_eq!(volumes.read("v", "hosts", 2).unwrap(), b"ne");
        assert!(volumes.read("v", "../v/hosts", 0).is_err());
        let mut seen = String::new();
        Read::read_to_string(&mut &open, &mut seen).unwrap();
        assert_eq!(seen, "new+");
    }

    #[test]
    fn no_path_leaves_a_volume() {
        let (dir, mut volumes) = volumes();
        symlink(dir.path(), dir.path().join("v/up")).unwrap();
        for path in ["../x", "/x", "a/../../x", "", "up/x", "./x"] {
            let result = volumes.write(&request(vec![file(path, "x")], false, false));
            assert!(result.is_err() || path == "./x", "{path:?}");
        }
        assert!(!dir.path().join("x").exists());
        assert!(volumes.open("v", "up").is_err());
        assert!(volumes.open("v", "up/new").is_err());
        assert!(volumes.open("v", "../v").is_err());
        volumes.open("v", "new/dir").unwrap();
        assert!(dir.path().join("v/new/dir").is_dir());
    }
}
