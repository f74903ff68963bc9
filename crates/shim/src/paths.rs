//! Files of a shim. `key` is a hash of namespace and id, which are too long for a socket path:
//! ```text
//! <state>/<key>/   shim.sock, pid, sockets of the pod      on tmpfs
//! <state>/uids/    one file for each allocated uid of a VMM
//! <root>/<key>/    settings.json, journal, scratch disk, logs of the VMM
//! <root>/originals formatted scratch disks
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use sha2::{Digest, Sha256};

use crate::settings::Settings;

/// Characters of a key: 128 bits, so that collisions are negligible.
pub(crate) const KEY_LENGTH: usize = 32;
/// Uids of the VMMs of shims; nacelled uses 0x7000_0000 to 0x7000_ffff.
const UID_RANGE: std::ops::Range<u32> = 0x7001_0000..0x7002_0000;

/// Sandbox id of a container or pod of a containerd namespace: [`KEY_LENGTH`] hex digits.
pub(crate) fn key(namespace: &str, id: &str) -> String {
    let digest = Sha256::digest(format!("{namespace}/{id}"));
    let mut text: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(KEY_LENGTH);
    text
}

/// Whether the text has the form of a [`key`].
pub(crate) fn is_key(text: &str) -> bool {
    text.len() == KEY_LENGTH && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

#[derive(Debug, Clone)]
pub(crate) struct PodPaths {
    pub(crate) key: String,
    pub(crate) state: PathBuf,
    pub(crate) root: PathBuf,
    uids: PathBuf,
    pub(crate) originals: PathBuf,
}

impl PodPaths {
    pub(crate) fn new(settings: &Settings, namespace: &str, pod: &str) -> Self {
        Self::from_key(settings, key(namespace, pod))
    }

    pub(crate) fn from_key(settings: &Settings, key: String) -> Self {
        Self {
            state: settings.state.join(&key),
            root: settings.root.join(&key),
            uids: settings.state.join("uids"),
            originals: settings.root.join("originals"),
            key,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.state.join("shim.sock")
    }

    pub(crate) fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    pub(crate) fn create_dirs(&self) -> Result<()> {
        for dir in [&self.state, &self.root, &self.uids] {
            // Searchable by the VMM's uid.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(dir)
                .with_context(|| format!("creating {}", dir.display()))?;
        }
        Ok(())
    }

    /// Copy of the pod's settings, for the cleanup of a pod whose bundle is gone.
    pub(crate) fn settings(&self) -> PathBuf {
        self.root.join("settings.json")
    }

    /// Locks the pod's root directory (flock(2)); None if it is locked or does not exist. The serving
    /// shim holds the lock as long as it lives, so that a pod whose lock is free has no shim.
    pub(crate) fn try_lock(&self) -> Result<Option<File>> {
        let what = || format!("locking {}", self.root.display());
        let dir = match File::open(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            dir => dir.with_context(what)?,
        };
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error).with_context(what),
            Ok(()) => {}
        }
        // The former holder may have removed the directory.
        let is_current = match (fs::metadata(&self.root), dir.metadata()) {
            (Ok(path), Ok(dir)) => (path.dev(), path.ino()) == (dir.dev(), dir.ino()),
            _ => false,
        };
        Ok(is_current.then_some(dir))
    }

    /// Creates the directories and waits for the lock.
    pub(crate) fn create_and_lock(&self, timeout: Duration) -> Result<File> {
        let begin = Instant::now();
        loop {
            self.create_dirs()?;
            if let Some(lock) = self.try_lock()? {
                // The former holder may have removed some of them before.
                self.create_dirs()?;
                return Ok(lock);
            }
            if begin.elapsed() > timeout {
                bail!("{} is locked by another shim or by a cleanup", self.root.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Keys of pods that have no shim: it died with the host, or the cleanup after its death failed.
    pub(crate) fn dead_pods(settings: &Settings) -> Vec<String> {
        let entries = fs::read_dir(&settings.root).into_iter().flatten().flatten();
        let keys = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let is_dead = |key: &String| {
            let paths = Self::from_key(settings, key.clone());
            // Shims of earlier releases do not lock.
            matches!(paths.try_lock(), Ok(Some(_))) && paths.shim_pid().is_none()
        };
        keys.filter(|key| is_key(key)).filter(is_dead).collect()
    }

    /// Exists once the shim has accepted Shutdown, so that `delete` waits for its exit.
    pub(crate) fn shutdown_marker(&self) -> PathBuf {
        self.state.join("shutdown")
    }

    /// Whether a process listens on the pod's socket. Does not block.
    pub(crate) fn is_alive(&self) -> bool {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let connected = socket.and_then(|socket| {
            let address = UnixAddr::new(&self.socket())?;
            connect(socket.as_raw_fd(), &address)
        });
        // EAGAIN: the process does not accept connections, and its queue of them is full (unix(7)).
        matches!(connected, Ok(()) | Err(Errno::EAGAIN))
    }

    /// Records the process that serves.
    pub(crate) fn write_pid(&self, pid: u32) -> io::Result<()> {
        fs::write(self.state.join("pid"), format!("{pid} {}", process_start_time(pid)?))
    }

    /// The process that serves, unless its pid has been reused.
    pub(crate) fn shim_pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.state.join("pid")).ok()?;
        let (pid, at) = text.split_once(' ')?;
        let (pid, at): (u32, u64) = (pid.parse().ok()?, at.parse().ok()?);
        (process_start_time(pid).ok()? == at).then_some(pid)
    }

    /// Allocates a uid for the pod's VMM; returns the same one when called again.
    pub(crate) fn allocate_uid(&self) -> Result<u32> {
        let first = u32::from_str_radix(&self.key[..4], 16).unwrap_or_default();
        for n in 0..UID_RANGE.len() as u32 {
            let uid = UID_RANGE.start + (first + n) % UID_RANGE.len() as u32;
            let path = self.uids.join(uid.to_string());
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(mut file) => {
                    file.write_all(self.key.as_bytes())
                        .with_context(|| format!("writing {}", path.display()))?;
                    return Ok(uid);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if fs::read_to_string(&path).is_ok_and(|holder| holder == self.key) {
                        return Ok(uid);
                    }
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("creating {}", path.display()));
                }
            }
        }
        bail!("all {} uids for VMMs are in use ({})", UID_RANGE.len(), self.uids.display())
    }

    /// Removes all files of the pod. Continues after failures; the root directory comes last, so that a
    /// later cleanup finds what could not be removed.
    pub(crate) fn remove_all(&self) -> Result<()> {
        let mut result = Ok(());
        for entry in fs::read_dir(&self.uids).into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path()).is_ok_and(|holder| holder == self.key) {
                result = result.and(ignore_not_found(fs::remove_file(entry.path()), &entry.path()));
            }
        }
        result = result.and(ignore_not_found(fs::remove_dir_all(&self.state), &self.state));
        result?;
        ignore_not_found(fs::remove_dir_all(&self.root), &self.root)
    }
}

fn ignore_not_found(result: io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Start time of a process, clock ticks since boot (proc_pid_stat(5), field 22).
fn process_start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name, in parentheses, may contain spaces.
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let field = rest.split_whitespace().nth(19).and_then(|text| text.parse().ok());
    field.ok_or_else(|| ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    fn paths(dir: &Path, id: &str) -> PodPaths {
        let (state, root) = (dir.join("state"), dir.join("root"));
        PodPaths::new(&Settings { state, root, ..Settings::default() }, "default", id)
    }

    #[test]
    fn two_pods_have_different_uids_and_a_removed_pod_frees_its_uid() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (paths(dir.path(), "a"), paths(dir.path(), "b"));
        one.create_dirs().unwrap();
        two.create_dirs().unwrap();
        let uid = one.allocate_uid().unwrap();
        assert!(UID_RANGE.contains(&uid));
        assert_eq!(one.allocate_uid().unwrap(), uid);
        // A key with the same prefix hashes to the same uid.
        let rival = PodPaths { key: format!("{}{}", &one.key[..4], &two.key[4..]), ..two.clone() };
        assert_ne!(rival.allocate_uid().unwrap(), uid);
        one.remove_all().unwrap();
        assert!(!one.state.exists() && !one.root.exists() && two.state.exists());
        assert_eq!(one.uids.read_dir().unwrap().count(), 1);
        one.remove_all().unwrap();
    }

    #[test]
    fn pods_without_a_shim_are_found_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (state, root) = (dir.path().join("state"), dir.path().join("root"));
        let settings = Settings { state, root, ..Settings::default() };
        let of = |id| {
            let paths = PodPaths::new(&settings, "default", id);
            paths.create_dirs().unwrap();
            paths
        };
        let (dead, locked, older) = (of("dead"), of("locked"), of("older"));
        fs::create_dir_all(settings.root.join("originals")).unwrap();
        let lock = locked.try_lock().unwrap().unwrap();
        assert!(locked.try_lock().unwrap().is_none());
        // A shim of an earlier release, which does not lock.
        older.write_pid(std::process::id()).unwrap();
        assert_eq!(PodPaths::dead_pods(&settings), std::slice::from_ref(&dead.key));
        drop(lock);
        assert_eq!(PodPaths::dead_pods(&settings).len(), 2);
        dead.remove_all().unwrap();
        assert!(dead.try_lock().unwrap().is_none(), "it does not exist any more");
        assert_eq!(PodPaths::dead_pods(&settings), [locked.key]);
    }

    #[test]
    fn a_lock_of_a_removed_directory_is_not_taken_for_the_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path(), "a");
        let old = paths.create_and_lock(Duration::ZERO).unwrap();
        paths.remove_all().unwrap();
        let new = paths.create_and_lock(Duration::ZERO).unwrap();
        assert_ne!(old.metadata().unwrap().ino(), new.metadata().unwrap().ino());
        drop(old);
        let error = paths.create_and_lock(Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("is locked"), "{error}");
    }

    /// One process creates the directories while the former holder of the lock removes them.
    #[test]
    fn the_holder_of_the_lock_has_all_directories() {
        let dir = tempfile::tempdir().unwrap();
        let end = Instant::now() + Duration::from_secs(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let paths = paths(dir.path(), "a");
                    while Instant::now() < end {
                        let Ok(lock) = paths.create_and_lock(Duration::ZERO) else { continue };
                        assert!(paths.state.is_dir() && paths.root.is_dir());
                        paths.remove_all().unwrap();
                        drop(lock);
                    }
                });
            }
        });
    }

    #[test]
    fn a_shim_that_does_not_accept_connections_is_alive_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path(), "a");
        paths.create_dirs().unwrap();
        assert!(!paths.is_alive());
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&paths.socket()).unwrap()).unwrap();
        assert!(!paths.is_alive(), "nobody listens yet");
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let (send, answers) = std::sync::mpsc::channel();
        let asked = paths.clone();
        std::thread::spawn(move || {
            // Connections that were closed stay in the queue until they are accepted.
            for _ in 0..5 {
                send.send(asked.is_alive()).unwrap();
            }
        });
        for n in 0..5 {
            let alive = answers.recv_timeout(Duration::from_secs(10)).ok();
            assert_eq!(alive, Some(true), "call {n}");
        }
        drop(listener);
        assert!(!paths.is_alive());
    }

    #[test]
    fn socket_paths_fit_into_sun_path() {
        let settings = Settings::default();
        let paths = PodPaths::new(&settings, &"n".repeat(76), &"i".repeat(76));
        let longest = paths.state.join("pods").join("0".repeat(KEY_LENGTH)).join("control.sock");
        // sun_path (unix(7)).
        assert!(longest.as_os_str().len() < 108, "{}", longest.display());
    }

    #[test]
    fn a_reused_pid_is_not_mistaken_for_the_shim() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path(), "a");
        paths.create_dirs().unwrap();
        assert_eq!(paths.shim_pid(), None);
        paths.write_pid(std::process::id()).unwrap();
        assert_eq!(paths.shim_pid(), Some(std::process::id()));
        fs::write(paths.state.join("pid"), format!("{} 1", std::process::id())).unwrap();
        assert_eq!(paths.shim_pid(), None);
    }
}
