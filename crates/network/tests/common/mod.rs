//! A test host: a thread with new network and mount namespaces, in which plugins can change
//! bridges, firewall rules and leases.

#![allow(dead_code)] // each test file uses a part

pub mod guest;
pub mod sctp;
pub mod tap;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use network::{Cni, Config, Error, Pod};
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
            results_dir: self.path("results"),
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

    /// Adds a plugin that is a shell script.
    pub fn plugin(&self, name: &str, script: &str) {
        fs::create_dir_all(self.path("bin")).unwrap();
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// Output of scripts with `>> $LOG`.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn clear_log(&self) {
        let _ = fs::remove_file(self.path("log"));
    }

    /// Names in a directory of the test; empty if it does not exist.
    pub fn names(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(directory)) else { return Vec::new() };
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

/// Runs a test on a new host; prints SKIP if that is not possible.
pub fn on_a_host(body: impl FnOnce(&Host) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS) {
            println!("SKIP: cannot create namespaces without root ({e})");
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
        // First, as the runtime's threads are in these namespaces.
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

/// Adds a veth pair with one address to the pod's namespace, as `bridge` does.
pub const GOOD: &str = r#"
LOG=$(dirname "$0")/../log
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME ${CNI_NETNS:-none} $CNI_ARGS" >> $LOG
cat > $(dirname "$0")/../stdin.$CNI_COMMAND
case $CNI_COMMAND in
ADD)
  ip link add h$$ type veth peer name $CNI_IFNAME netns $CNI_NETNS address 02:00:00:00:00:05 || exit 9
  in="nsenter --net=$CNI_NETNS ip"
  $in link set $CNI_IFNAME mtu 1400 up && ip link set h$$ up
  $in addr add 10.9.0.5/24 dev $CNI_IFNAME
  $in -6 addr add fd09::5/64 nodad dev $CNI_IFNAME
  $in route add default via 10.9.0.1
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"'$CNI_IFNAME'","sandbox":"'$CNI_NETNS'"}],
    "ips":[{"address":"10.9.0.5/24","gateway":"10.9.0.1","interface":0},
           {"address":"fd09::5/64","gateway":"fd09::1","interface":0}],
    "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0","gw":"fd09::1"}],
    "dns":{"nameservers":["10.9.0.1"],"search":["cluster"]}}';;
DEL) test -n "$CNI_NETNS" && nsenter --net=$CNI_NETNS ip link del $CNI_IFNAME; exit 0;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}';;
esac
"#;

pub fn conflist(version: &str, kinds: &[&str]) -> String {
    let plugins: Vec<String> = kinds
        .iter()
        .map(|k| format!(r#"{{"type":"{k}","capabilities":{{"portMappings":true}}}}"#))
        .collect();
    format!(r#"{{"cniVersion":"{version}","name":"test","plugins":[{}]}}"#, plugins.join(","))
}

pub fn json(host: &Host, file: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(host.path(file)).unwrap()).unwrap()
}

pub fn text(error: &Error) -> String {
    let mut all = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        all.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    all
}
