//! A file of the host is one inode of the guest, through every share, mount and name.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::common::{Guest, Mounted, ROOT, Server, can_run, op, text};
use nix::mount::{MsFlags, mount};
use vmm_api::shares::{Access, Reply};

/// FOPEN_KEEP_CACHE.
const KEEP_CACHE: u32 = 2;

#[test]
fn a_file_has_one_node_through_shares_nested_shares_hard_links_and_mounts() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let (outer, inner) = (dir.path().join("outer"), dir.path().join("outer/inner"));
    fs::create_dir_all(&inner).unwrap();
    fs::write(inner.join("file"), "text").unwrap();
    fs::hard_link(inner.join("file"), outer.join("link")).unwrap();
    let bound = dir.path().join("bound");
    fs::create_dir(&bound).unwrap();
    mount(Some(&inner), &bound, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    for (name, path) in [("nested", &inner), ("whole", &outer), ("twice", &outer), ("b", &bound)] {
        assert_eq!(server.add(name, path), Reply::Done);
    }
    nix::mount::umount(&bound).unwrap();
    let mut guest = server.guest();
    let file = guest.find(ROOT, "nested/file").unwrap();
    for path in ["whole/inner/file", "twice/inner/file", "whole/link", "b/file", "nested/file"] {
        let found = guest.find(ROOT, path).unwrap();
        assert_eq!((found.node, found.ino), (file.node, file.ino), "{path}");
    }
    let folder = guest.find(ROOT, "nested").unwrap();
    assert_eq!(guest.find(ROOT, "twice/inner").unwrap().node, folder.node);
    assert_eq!(fs::metadata(inner.join("file")).unwrap().ino(), file.ino);
    // A file created through one share is visible in the other.
    let (made, _) = guest.create(folder.node, "made", 0o644).unwrap();
    assert_eq!(guest.find(ROOT, "whole/inner/made").unwrap().node, made);
}

#[test]
fn later_mounts_appear_only_in_shares_with_propagation() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _top = Mounted::shared(dir.path());
    fs::create_dir(dir.path().join("later")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(server.add_following("f.follows", dir.path()), Reply::Done);
    assert_eq!(server.add_private("p", dir.path()), Reply::Done);
    let mut guest = server.guest();
    let later = Mounted::new(&dir.path().join("later"));
    fs::write(later.0.join("content"), "").unwrap();
    guest.await_path(ROOT, "f.follows/later/content");
    assert_eq!(guest.find(ROOT, "p/later/content").unwrap_err(), libc::ENOENT);
    assert!(guest.find(ROOT, "f.follows/later/content").is_ok());
    let [one, other] =
        ["f.follows/file", "p/file"].map(|path| guest.find(ROOT, path).unwrap().node);
    assert_eq!(one, other);
    later.unmount();
}

#[test]
fn inode_numbers_are_unique_over_file_systems_and_equal_in_readdir() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let systems: Vec<Mounted> =
        ["a", "b", "a/below"].iter().map(|name| Mounted::new(&dir.path().join(name))).collect();
    for system in &systems {
        fs::write(system.0.join("file"), "").unwrap();
    }
    let host: BTreeSet<u64> =
        systems.iter().map(|s| fs::metadata(s.0.join("file")).unwrap().ino()).collect();
    assert!(
        host.len() < 3,
        "no two of these file systems have an inode number in common: {host:?}"
    );
    assert_eq!(server.add("a", &systems[0].0), Reply::Done);
    assert_eq!(server.add("b", &systems[1].0), Reply::Done);
    let mut guest = server.guest();
    let mut seen = BTreeSet::new();
    for path in ["a/file", "b/file", "a/below/file"] {
        let (folder, _) = path.rsplit_once('/').unwrap();
        let (folder, file) = (guest.find(ROOT, folder).unwrap(), guest.find(ROOT, path).unwrap());
        assert!(seen.insert(file.ino), "{path}: {}", file.ino);
        let listed = guest.list(folder.node);
        let (_, listed_ino, entry) = listed.iter().find(|(name, ..)| name == "file").unwrap();
        assert_eq!((*listed_ino, entry.ino, entry.node), (file.ino, file.ino, file.node), "{path}");
    }
}

#[test]
fn a_large_directory_is_listed_completely() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    for n in 0..500 {
        fs::write(dir.path().join(format!("file{n}")), "").unwrap();
    }
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let listed = guest.list(share.node);
    let names: BTreeSet<&str> = listed.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!((listed.len(), names.len()), (502, 502));
    assert!(listed.iter().all(|(name, _, entry)| name.starts_with('.') || entry.node != 0));
}

/// Whether a file can be created in the directory; it is removed afterwards.
fn writable(guest: &mut Guest, folder: u64) -> bool {
    match guest.create(folder, "probe", 0o644) {
        Ok((node, handle)) => {
            guest.release(node, handle);
            guest.request(op::UNLINK, folder, &text("probe")).unwrap();
            true
        }
        Err(libc::EROFS) => false,
        Err(error) => panic!("create: {error}"),
    }
}

#[test]
fn shares_of_the_same_files_are_read_only_while_no_container_may_write() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _system = Mounted::new(dir.path());
    let inner = dir.path().join("inner");
    let other = dir.path().join("other");
    fs::create_dir(&inner).unwrap();
    fs::create_dir(&other).unwrap();
    let below = Mounted::new(&inner.join("below"));
    let mut guest = server.guest();
    let read_only = Access::ReadOnlyRecursive;
    assert_eq!(server.add_for("nested", &inner, read_only), Reply::Done);
    assert_eq!(server.add_for("other", &other, Access::ReadOnly), Reply::Done);
    // Looked up while read-only; these nodes have to be writable later.
    let folder = guest.lookup(ROOT, "nested").unwrap().node;
    let deep = guest.find(ROOT, "nested/below").unwrap().node;
    let beside = guest.lookup(ROOT, "other").unwrap().node;
    let state = |guest: &mut Guest| [folder, deep, beside].map(|node| writable(guest, node));
    assert_eq!(state(&mut guest), [false, false, false]);
    // Does not apply to mounts below.
    assert_eq!(server.access("nested", Access::ReadOnly), Reply::Done);
    assert_eq!(state(&mut guest), [false, true, false]);
    assert_eq!(server.access("nested", read_only), Reply::Done);

    assert_eq!(server.add_for("whole", dir.path(), Access::ReadWrite), Reply::Done);
    assert_eq!(state(&mut guest), [true, true, true]);
    let whole = guest.lookup(ROOT, "whole").unwrap().node;
    assert!(writable(&mut guest, whole));
    assert_eq!(server.access("whole", Access::ReadOnly), Reply::Done);
    assert_eq!(state(&mut guest), [false, true, false]);
    assert_eq!(server.access("whole", Access::ReadWrite), Reply::Done);
    assert_eq!(server.remove("whole"), Reply::Done);
    assert_eq!(state(&mut guest), [false, false, false]);
    assert!(!writable(&mut guest, whole));

    // Only the mount below, which is another file system.
    assert_eq!(server.add_for("below", &below.0, Access::ReadWrite), Reply::Done);
    assert_eq!(state(&mut guest), [false, true, false]);
    assert_eq!(server.remove("below"), Reply::Done);

    // Mounts that the host has made read-only stay read-only.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, &below.0, None::<&str>, flags, None::<&str>).unwrap();
    assert_eq!(server.add_for("fixed", &inner, Access::ReadWrite), Reply::Done);
    let fixed = guest.find(ROOT, "fixed/below").unwrap().node;
    assert!(!writable(&mut guest, fixed));
    assert!(writable(&mut guest, folder));
}

#[test]
fn a_share_added_again_as_writable_is_writable() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    let mut guest = server.guest();
    assert_eq!(server.add_for("data", dir.path(), Access::ReadOnly), Reply::Done);
    let deep = guest.find(ROOT, "data/a/b").unwrap().node;
    assert!(!writable(&mut guest, deep));
    assert_eq!(server.remove("data"), Reply::Done);
    assert_eq!(server.add_for("data", dir.path(), Access::ReadWrite), Reply::Done);
    // The share is looked up, the folders in it are still known.
    guest.lookup(ROOT, "data").unwrap();
    assert!(writable(&mut guest, deep));
}

#[test]
fn files_without_descriptors_stay_usable_after_unlink_and_rename() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["removed", "moved", "replaced", "new"] {
        fs::write(path(name), name).unwrap();
    }
    fs::create_dir_all(path("folder/within")).unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap().node;
    let [removed, moved, replaced, new, folder] = ["removed", "moved", "replaced", "new", "folder"]
        .map(|name| guest.lookup(share, name).unwrap().node);
    let within = guest.lookup(folder, "within").unwrap().node;
    guest.request(op::UNLINK, share, &text("removed")).unwrap();
    assert_eq!(guest.attributes(removed).unwrap(), (7, 0));
    let handle = guest.open(removed, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(removed, handle).unwrap(), b"removed");
    guest.rename(share, "moved", within, "here").unwrap();
    guest.rename(share, "folder", share, "other").unwrap();
    let handle = guest.open(moved, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(moved, handle).unwrap(), b"moved");
    assert_eq!(guest.find(share, "other/within/here").unwrap().node, moved);
    guest.rename(share, "new", share, "replaced").unwrap();
    assert_eq!(guest.attributes(replaced).unwrap(), (8, 0));
    assert_eq!(guest.lookup(share, "replaced").unwrap().node, new);
    // A second name outlives the first.
    let linked = guest.link(new, within, "linked").unwrap();
    assert_eq!(linked.node, new);
    guest.request(op::UNLINK, share, &text("replaced")).unwrap();
    assert_eq!(guest.attributes(new).unwrap(), (3, 1));
    let held = server.descriptors();
    for (node, count) in [(removed, 1u64), (replaced, 1)] {
        guest.forget(node, count);
    }
    guest.attributes(new).unwrap();
    assert_eq!(server.descriptors(), held - 2, "descriptors of forgotten nodes");
}

#[test]
fn a_name_that_refers_to_another_file_is_looked_up_again() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "old").unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap().node;
    let old = guest.lookup(share, "file").unwrap().node;
    fs::write(dir.path().join("new"), "content").unwrap();
    fs::rename(dir.path().join("new"), &file).unwrap();
    assert_eq!(guest.attributes(old).unwrap_err(), libc::ESTALE);
    let truncating = libc::O_WRONLY | libc::O_TRUNC;
    assert_eq!(guest.open(old, truncating).unwrap_err(), libc::ESTALE);
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    let new = guest.lookup(share, "file").unwrap().node;
    assert_ne!(new, old);
    let handle = guest.open(new, truncating).unwrap();
    guest.write(new, handle, b"x", 0).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    // Opening does not block on a pipe.
    fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(guest.open(new, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    let pipe = guest.lookup(share, "file").unwrap();
    assert_eq!(pipe.mode & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(guest.open(pipe.node, libc::O_RDWR).unwrap_err(), libc::ENXIO);
}

#[test]
fn the_page_cache_is_kept_until_the_file_changes() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "one").unwrap();
    // A change that is not older than the clock of timestamps is exact is not relied on.
    let follow = nix::sys::stat::UtimensatFlags::FollowSymlink;
    let changed_at = |seconds| {
        let time = nix::sys::time::TimeSpec::new(seconds, 1);
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &file, &time, &time, follow).unwrap();
    };
    changed_at(1000);
    server.add("data", dir.path());
    server.add("data2.strict", dir.path());
    let mut guest = server.guest();
    let node = guest.find(ROOT, "data/file").unwrap().node;
    let kept = |guest: &mut Guest| {
        let (handle, options) = guest.open_with_options(node, libc::O_RDONLY).unwrap();
        guest.release(node, handle);
        options & KEEP_CACHE != 0
    };
    assert!(kept(&mut guest));
    fs::write(&file, "longer").unwrap();
    changed_at(1000);
    assert!(!kept(&mut guest), "after a change of size");
    guest.attributes(node).unwrap();
    assert!(kept(&mut guest), "after the attributes were sent");
    changed_at(2000);
    assert!(!kept(&mut guest), "after a change of mtime");
    guest.attributes(node).unwrap();
    // A share without caching.
    assert_eq!(guest.find(ROOT, "data2.strict/file").unwrap().node, node);
    assert!(!kept(&mut guest));
}

#[test]
fn known_files_need_no_descriptors_and_thousands_can_be_open() {
    if !can_run() {
        return;
    }
    // More than a process may have open by default (1,024).
    const FILES: usize = 3_000;
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap().node;
    // A request on each queue: all of them have their eventfds then.
    for _ in 0..vmm_api::shares::REQUEST_QUEUES_MAX {
        assert_eq!(guest.lookup(ROOT, "data").unwrap().node, share);
    }
    let before = server.descriptors();
    let mut open = Vec::new();
    for n in 0..FILES {
        let made = guest.create(share, &n.to_string(), 0o644);
        open.push(made.unwrap_or_else(|error| panic!("file {n}: error {error}")));
    }
    assert_eq!(server.descriptors(), before + FILES);
    for (node, handle) in open {
        guest.release(node, handle);
    }
    assert_eq!(guest.list(share).len(), FILES + 2);
    assert_eq!(server.descriptors(), before + 1, "the directory that was listed");
}

#[test]
fn numbers_out_of_range_are_rejected() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap().node;
    let (node, handle) = guest.create(share, "file", 0o644).unwrap();
    let body = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    for offset in [u64::MAX, i64::MAX as u64 + 1, i64::MAX as u64] {
        // Offset, then size and flags.
        let data = body(&[handle, offset, 4096, 0, 0]);
        assert_eq!(guest.request(op::READ, node, &data).unwrap_err(), libc::EINVAL, "{offset:#x}");
        let mut data = body(&[handle, offset, 8, 0, 0]);
        data.extend([0; 8]);
        assert_eq!(guest.request(op::WRITE, node, &data).unwrap_err(), libc::EINVAL, "{offset:#x}");
        let data = body(&[handle, offset, u64::MAX, 0]);
        assert_eq!(guest.request(op::FALLOCATE, node, &data).unwrap_err(), libc::EINVAL);
        guest.request(op::LSEEK, node, &body(&[handle, offset, 3])).unwrap_err();
    }
    for whence in [0u64, 1, 2, 5, 99] {
        let data = body(&[handle, 0, whence]);
        assert_eq!(guest.request(op::LSEEK, node, &data).unwrap_err(), libc::EINVAL, "{whence}");
    }
    for node in [0, 1 << 40, u64::MAX] {
        assert_eq!(guest.attributes(node).unwrap_err(), libc::EBADF, "{node}");
        guest.forget(node, u64::MAX);
    }
    guest.forget(ROOT, u64::MAX);
    assert!(guest.lookup(ROOT, "data").is_ok());
    assert_eq!(guest.open(node, libc::O_PATH | libc::O_DIRECTORY).map(|_| ()), Ok(()));
}

#[test]
fn only_a_share_that_nobody_else_changes_is_cached_for_long() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _below = Mounted::new(&dir.path().join("mount"));
    for name in ["file", "mount/file", "setuid", "mount/folder/x"] {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    fs::set_permissions(dir.path().join("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    server.add("data.exclusive", dir.path());
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("file"), "x").unwrap();
    server.add("plain", other.path());
    server.add("plain.strict", other.path());
    let mut guest = server.guest();
    assert_eq!(guest.timeouts(ROOT, "data.exclusive"), (0, 60), "shares come and go");
    let share = guest.lookup(ROOT, "data.exclusive").unwrap().node;
    assert_eq!(guest.timeouts(share, "file"), (60, 60));
    // A set-id bit that a write has cleared on the host.
    assert_eq!(guest.timeouts(share, "setuid"), (60, 1));
    // Behind a mount of the host a directory may be another node than the same one elsewhere.
    let mount = guest.lookup(share, "mount").unwrap().node;
    assert_eq!(guest.timeouts(share, "mount"), (60, 1));
    assert_eq!(guest.timeouts(mount, "file"), (1, 1));
    assert_eq!(guest.timeouts(mount, "folder"), (1, 1));

    let plain = guest.lookup(ROOT, "plain").unwrap().node;
    assert_eq!(guest.timeouts(plain, "file"), (1, 1));
    // The share that permits the least counts for a file of both.
    let strict = guest.lookup(ROOT, "plain.strict").unwrap().node;
    assert_eq!(guest.timeouts(strict, "file"), (0, 0));
    assert_eq!(guest.timeouts(plain, "file"), (0, 0));
}
