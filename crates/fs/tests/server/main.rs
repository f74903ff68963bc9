//! The file server as real processes, with the VMM's virtio-fs device as their peer. Assumes
//! root and `unshare`.

mod common;
mod shared;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use common::{Mounted, ROOT, Server, can_run, error_of, op, text};
use nix::mount::{MsFlags, mount, umount};
use vmm_api::shares::{Access, Error, Reply, Request, VERSION_ACCESS};

#[test]
fn a_guest_reads_and_writes_the_files_of_a_share() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("host"), "from the host").unwrap();
    assert_eq!(server.add("data", dir.path()), Reply::Done);
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    assert_eq!(share.mode & libc::S_IFMT, libc::S_IFDIR);
    assert_eq!(share.flags, 0);
    let file = guest.lookup(share.node, "host").unwrap();
    assert_eq!((file.size, file.flags), (13, 0));
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, handle).unwrap(), b"from the host");

    let (node, handle) = guest.create(share.node, "guest", 0o640).unwrap();
    assert_eq!(guest.write(node, handle, b"from the guest", 0).unwrap(), 14);
    assert_eq!(fs::read_to_string(dir.path().join("guest")).unwrap(), "from the guest");
    let mode = fs::metadata(dir.path().join("guest")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    guest.request(op::UNLINK, share.node, &text("guest")).unwrap();
    assert!(!dir.path().join("guest").exists());
    assert_eq!(guest.lookup(share.node, "guest").unwrap_err(), libc::ENOENT);
}

#[test]
fn files_are_owned_by_the_guests_user_and_a_write_clears_setuid() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    guest.uid = 1234;
    let (node, handle) = guest.create(share.node, "mine", 0o4755).unwrap();
    let host = dir.path().join("mine");
    let found = fs::metadata(&host).unwrap();
    assert_eq!((found.uid(), found.gid()), (1234, 1234));
    guest.write(node, handle, b"x", 4).unwrap();
    assert_eq!(fs::metadata(&host).unwrap().permissions().mode() & 0o7000, 0);
    // Back to root for the next one.
    guest.uid = 0;
    guest.mkdir(share.node, "roots").unwrap();
    assert_eq!(fs::metadata(dir.path().join("roots")).unwrap().uid(), 0);
}

#[test]
fn xattrs_are_set_on_the_host() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let (node, _) = guest.create(share.node, "file", 0o644).unwrap();
    let mut body = Vec::new();
    for word in [5u32, 0] {
        body.extend(word.to_le_bytes());
    }
    body.extend(text("user.colour"));
    body.extend(b"green");
    match guest.request(op::SETXATTR, node, &body) {
        Ok(_) => {}
        Err(libc::EOPNOTSUPP) => return eprintln!("SKIP: no user xattrs in {:?}", dir.path()),
        Err(e) => panic!("setxattr: {e}"),
    }
    let mut body = Vec::new();
    for word in [64u32, 0] {
        body.extend(word.to_le_bytes());
    }
    body.extend(text("user.colour"));
    assert_eq!(guest.request(op::GETXATTR, node, &body).unwrap(), b"green");
}

#[test]
fn shares_are_added_and_removed_at_run_time_and_their_directory_is_read_only() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let mut guest = server.guest();
    assert_eq!(guest.lookup(ROOT, "late").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.mkdir(ROOT, "mine").unwrap_err(), libc::EROFS);
    assert_eq!(guest.create(ROOT, "mine", 0o644).unwrap_err(), libc::EROFS);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();

    assert_eq!(server.add("late", dir.path()), Reply::Done);
    assert_eq!(server.add("single", &file), Reply::Done);
    let names = vec!["late".to_owned(), "single".to_owned()];
    assert_eq!(server.call(&Request::List, None), Reply::Shares { names, version: VERSION_ACCESS });
    let share = guest.lookup(ROOT, "late").unwrap();
    let (node, handle) = guest.create(share.node, "open", 0o644).unwrap();
    let single = guest.lookup(ROOT, "single").unwrap();
    assert_eq!(single.mode & libc::S_IFMT, libc::S_IFREG);
    let reader = guest.open(single.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(single.node, reader).unwrap(), b"text");

    let exists = error_of(server.add("late", dir.path()));
    assert!(matches!(exists, Error::Exists { .. }));
    for name in ["late", "single"] {
        assert_eq!(server.remove(name), Reply::Done);
        assert_eq!(guest.lookup(ROOT, name).unwrap_err(), libc::ENOENT);
        assert!(matches!(error_of(server.remove(name)), Error::NoSuchShare { .. }));
    }
    // Open files stay usable.
    assert_eq!(guest.write(node, handle, b"late words", 0).unwrap(), 10);
    assert_eq!(fs::read_to_string(dir.path().join("open")).unwrap(), "late words");
    assert_eq!(server.add("late", dir.path()), Reply::Done);
    assert!(guest.lookup(ROOT, "late").is_ok());
}

#[test]
fn no_name_leads_out_of_a_share() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/proc/1/root", dir.path().join("link")).unwrap();
    server.add("data", dir.path());
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    for name in ["a/b", "/etc", "link/etc", "../../etc", ""] {
        assert!(guest.lookup(share.node, name).is_err(), "{name:?}");
    }
    for name in ["..", "../..", "/", "."] {
        assert_eq!(guest.lookup(share.node, name).unwrap_err(), libc::EINVAL, "{name:?}");
    }
    assert_eq!(guest.lookup(ROOT, "..").unwrap_err(), libc::EINVAL);
    let victim = dir.path().parent().unwrap().join(format!("victim-{}", std::process::id()));
    fs::write(&victim, "").unwrap();
    let name = format!("../{}", victim.file_name().unwrap().to_string_lossy());
    assert!(guest.request(op::UNLINK, share.node, &text(&name)).is_err());
    assert!(guest.mkdir(share.node, "../new").is_err());
    assert!(victim.exists());
    fs::remove_file(victim).unwrap();
    let link = guest.lookup(share.node, "link").unwrap();
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(guest.open(link.node, libc::O_RDONLY).is_err());
    assert!(guest.lookup(link.node, "etc").is_err());
}

#[test]
fn invalid_requests_on_the_control_socket_are_rejected() {
    if !can_run() {
        return;
    }
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    for name in ["", "..", "a/b", ".hidden", &"x".repeat(65)] {
        assert!(matches!(error_of(server.add(name, dir.path())), Error::Name { .. }), "{name:?}");
    }
    let add = Request::Add { name: "a".into(), access: Access::ReadWrite };
    assert!(matches!(error_of(server.call(&add, None)), Error::Descriptors { got: 0, want: 1 }));
    let file = fs::File::open(dir.path()).unwrap();
    let error = error_of(server.call(&add, Some(file.into())));
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert!(matches!(error_of(server.add("null", Path::new("/dev/null"))), Error::Kind { .. }));
    assert_eq!(server.add("a", dir.path()), Reply::Done);
}

#[test]
fn both_processes_are_jailed() {
    if !can_run() {
        return;
    }
    let server = Server::start();
    let (mounter, server_pid) = server.pids();
    let masks: [(u32, &[(u32, &str)]); 2] =
        [(mounter, &nacelle_fs::jail::MOUNTER), (server_pid, &nacelle_fs::jail::SERVER)];
    for (pid, kept) in masks {
        let mask = kept.iter().fold(0, |mask, (cap, _)| mask | 1u64 << cap);
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().to_owned()
            };
            for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
                assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), mask, "{set}");
            }
            assert_eq!(field("CapInh:"), "0000000000000000");
            assert_eq!(field("CapAmb:"), "0000000000000000");
            assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
        }
        let mut names: Vec<_> = fs::read_dir(format!("/proc/{pid}/root"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["proc", "shares", "sources"]);
        assert_eq!(fs::read_dir(format!("/proc/{pid}/root/proc")).unwrap().count(), 0);
        for space in ["mnt", "pid", "ipc", "uts", "net"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{space}");
        }
    }
    // Sockets, eventfds and the like, but no file of the host.
    for fd in fs::read_dir(format!("/proc/{server_pid}/fd")).unwrap() {
        let target = fs::read_link(fd.unwrap().path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let known = ["socket:", "anon_inode:", "pipe:", "/dev/null", "/dev/pts", "/proc", "/"];
        assert!(known.iter().any(|k| target.starts_with(k)), "{target}");
    }
}

#[test]
fn the_server_exits_with_its_vmm_and_the_mounter_with_the_server() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    drop(server.guest());
    assert!(server.exited());

    let mut server = Server::start();
    let mut guest = server.guest();
    let (_, server_pid) = server.pids();
    let pid = nix::unistd::Pid::from_raw(server_pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(server.exited());
    assert_eq!(guest.lookup(ROOT, "x").unwrap_err(), libc::ENOTCONN);
}

#[test]
fn mounts_below_a_share_are_visible_also_after_the_host_unmounts_them() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    fs::create_dir(&below).unwrap();
    let flags = MsFlags::empty();
    mount(Some("none"), &below, Some("tmpfs"), flags, None::<&str>).unwrap();
    fs::write(below.join("file"), "deep").unwrap();
    server.add("data", dir.path());
    umount(&below).unwrap();
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let below = guest.lookup(share.node, "below").unwrap();
    assert_eq!(below.flags, 0, "a mount below a share is not a submount");
    assert_eq!(guest.lookup(below.node, "file").unwrap().size, 4);
}

#[test]
fn later_mounts_of_the_host_appear_in_a_share_and_can_be_unmounted() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _top = Mounted::shared(dir.path());
    let early = Mounted::new(&dir.path().join("early"));
    fs::write(early.0.join("file"), "early").unwrap();
    assert_eq!(server.add_following("data", dir.path()), Reply::Done);
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let folder = guest.lookup(share.node, "early").unwrap();
    assert!(guest.lookup(folder.node, "file").is_ok());
    let (node, handle) = guest.create(folder.node, "guest", 0o644).unwrap();
    assert_eq!(fs::metadata(early.0.join("guest")).unwrap().len(), 0);
    early.unmount();
    let empty = guest
        .lookup_until(share.node, "early", |found| found.unwrap().node != folder.node)
        .unwrap();
    assert_eq!(guest.lookup(empty.node, "file").unwrap_err(), libc::ENOENT);
    // Open files stay usable.
    assert_eq!(guest.write(node, handle, b"late words", 0).unwrap(), 10);
    fs::remove_dir(dir.path().join("early")).unwrap();

    // Repeatedly at one path, each time with files that the guest does not forget.
    for round in 0..50 {
        let later = Mounted::new(&dir.path().join("later"));
        fs::write(later.0.join(format!("file{round}")), "x").unwrap();
        let deep = Mounted::new(&later.0.join("a b/deep"));
        fs::write(deep.0.join("file"), "xy").unwrap();
        // The copy of the previous round may still be mounted.
        let file = guest.await_path(share.node, &format!("later/file{round}"));
        guest.open(file.node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.await_path(share.node, "later/a b/deep/file").size, 2);
        let folder = guest.lookup(share.node, "later").unwrap();
        let middle = guest.lookup(folder.node, "a b").unwrap();
        let below = guest.lookup(middle.node, "deep").unwrap();
        deep.unmount();
        if round % 2 == 0 {
            let plain =
                guest.lookup_until(middle.node, "deep", |found| found.unwrap().node != below.node);
            assert_eq!(guest.lookup(plain.unwrap().node, "file").unwrap_err(), libc::ENOENT);
        }
        later.unmount();
        if round % 3 == 0 {
            guest
                .lookup_until(share.node, "later", |found| found.unwrap().node != folder.node)
                .unwrap();
        }
    }
    assert_eq!(server.remove("data"), Reply::Done);
    assert_eq!(server.mounts("/sources/").len() + server.mounts("/shares/").len(), 0);
}

#[test]
fn stacked_mounts_are_visible_in_their_order() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _top = Mounted::shared(dir.path());
    let place = dir.path().join("place");
    let lower = Mounted::new(&place);
    fs::write(place.join("lower"), "").unwrap();
    let early = Mounted::new(&place);
    fs::write(place.join("early"), "").unwrap();
    assert_eq!(server.add_following("data", dir.path()), Reply::Done);
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let has = |guest: &mut common::Guest, name: &str| {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let folder = guest.lookup(share.node, "place").unwrap();
            if guest.lookup(folder.node, name).is_ok() {
                return;
            }
            assert!(std::time::Instant::now() < end, "{name} does not exist");
        }
    };
    has(&mut guest, "early");
    let late = Mounted::new(&place);
    fs::write(place.join("late"), "").unwrap();
    has(&mut guest, "late");
    late.unmount();
    has(&mut guest, "early");
    early.unmount();
    has(&mut guest, "lower");
    lower.unmount();
    fs::write(place.join("plain"), "").unwrap();
    has(&mut guest, "plain");
    // On the share itself.
    let whole = Mounted::new(dir.path());
    fs::write(whole.0.join("whole"), "").unwrap();
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let share = guest.lookup(ROOT, "data").unwrap();
        if guest.lookup(share.node, "whole").is_ok() {
            break;
        }
        assert!(std::time::Instant::now() < limit, "the mount on the share is not visible");
    }
    whole.unmount();
    guest.lookup_until(share.node, "place", |found| found.is_ok()).unwrap();
}

#[test]
fn mounts_below_a_private_directory_appear_and_a_symbolic_link_is_not_followed() {
    if !can_run() {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let _top = Mounted::shared(dir.path());
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    std::os::unix::fs::chown(&closed, Some(1234), None).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(server.add_following("data", dir.path()), Reply::Done);
    let mut guest = server.guest();
    let share = guest.lookup(ROOT, "data").unwrap();
    let inner = Mounted::new(&closed.join("inner"));
    fs::write(inner.0.join("content"), "").unwrap();
    guest.await_path(share.node, "closed/inner/content");
    // As if a guest replaced the directory by a symbolic link.
    fs::rename(&closed, dir.path().join("moved")).unwrap();
    std::os::unix::fs::symlink("/proc", &closed).unwrap();
    let other = Mounted::new(&dir.path().join("other"));
    fs::write(other.0.join("content"), "").unwrap();
    guest.await_path(share.node, "other/content");
    guest.await_path(share.node, "moved/inner/content");
    let mounted = guest.find(share.node, "moved/inner").unwrap();
    umount(&dir.path().join("moved/inner")).unwrap();
    drop(inner);
    let folder = guest.lookup(share.node, "moved").unwrap();
    guest.lookup_until(folder.node, "inner", |found| found.unwrap().node != mounted.node).unwrap();
}
