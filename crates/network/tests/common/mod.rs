//! A host of one's own for a test: a thread with its own network and mount namespaces, in which
//! plugins may do to bridges, firewall rules and leases what they like.

#![allow(dead_code)] // each test file uses a part

pub mod guest;
pub mod tap;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use network::{Cni, Config, Pod};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const NONE: Option<&str> = None;

pub struct Host {
    pub dir: tempfile::TempDir,
    pub runtime: tokio::runtime::Runtime,
}

impl Host {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> Config {
        Config {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("bin"), "/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: self.path("cache"),
            netns_dir: self.path("netns"),
            plugin_timeout_ms: 20_000,
            ..Config::default()
        }
    }

    pub fn cni(&self) -> Cni {
        Cni::new(self.config())
    }

    pub fn conflist(&self, text: &str) {
        fs::create_dir_all(self.path("conf")).unwrap();
        fs::write(self.path("conf/10-test.conflist"), text).unwrap();
    }

    /// A plugin that is a shell script.
    pub fn plugin(&self, name: &str, script: &str) {
        fs::create_dir_all(self.path("bin")).unwrap();
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// What scripts noted with `>> $LOG`.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn clear_log(&self) {
        let _ = fs::remove_file(self.path("log"));
    }

    /// Names in a folder of ours; none if it is not there.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn nothing_left(&self) {
        assert_eq!(self.names("netns"), Vec::<String>::new(), "namespaces are left");
        assert_eq!(self.names("cache/attachments"), Vec::<String>::new(), "records are left");
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let ours = self.path("netns").join("nacelle-").display().to_string();
        assert!(!mounts.contains(&ours), "mounts are left:\n{mounts}");
    }
}

/// Runs a test on a host of its own; says why not when that is impossible.
pub fn on_a_host(body: impl FnOnce(&Host) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS) {
            println!("SKIP: needs root to make namespaces ({e})");
            return;
        }
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
        // Leases of host-local.
        fs::create_dir_all("/var/lib/cni").unwrap();
        mount(Some("tmpfs"), "/var/lib/cni", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        };
        run("ip", &["link", "set", "lo", "up"]);
        body(&host);
        // The runtime's threads are in our namespaces and go first.
        drop(host.runtime);
        let _ =
            nix::mount::umount2(&host.dir.path().join("netns"), nix::mount::MntFlags::MNT_DETACH);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn pod(id: &str) -> Pod {
    Pod {
        id: id.into(),
        name: format!("{id}-name"),
        namespace: "default".into(),
        uid: format!("{id}-uid"),
        ..Pod::default()
    }
}

/// Output of a command that must succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub fn run_in(netns: &Path, program: &str, args: &[&str]) -> String {
    let mut all = vec![format!("--net={}", netns.display()), program.to_owned()];
    all.extend(args.iter().map(|a| (*a).to_owned()));
    run("nsenter", &all.iter().map(String::as_str).collect::<Vec<_>>())
}
