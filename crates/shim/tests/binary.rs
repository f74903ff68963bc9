//! The binary as containerd runs it: `start`, `delete`, `-info`, `-v`. No VM is started: needs nothing.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-nacelle-v2");
/// A key without a pod.
const DEAD_KEY: &str = "0123456789abcdef0123456789abcdef";

/// A host with settings and bundles.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        // A short path: that of a pod's socket has at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("s").rand_bytes(5).tempdir_in("/tmp");
        let host = Self { dir: dir.unwrap() };
        host.configure("one");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes shim.toml with directories of this name.
    fn configure(&self, name: &str) {
        self.configure_dirs(name, name);
    }

    fn configure_dirs(&self, root: &str, state: &str) {
        let (root, state) = (self.path(root).join("root"), self.path(state).join("state"));
        let text = format!("root = {root:?}\nstate = {state:?}\n");
        fs::write(self.path("shim.toml"), text).unwrap();
    }

    fn bundle(&self, id: &str, annotations: &serde_json::Value) -> PathBuf {
        let bundle = self.path("bundles").join(id);
        fs::create_dir_all(&bundle).unwrap();
        let spec = serde_json::json!({ "ociVersion": "1.0.2", "annotations": annotations });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn run(&self, bundle: &Path, id: &str, action: &str) -> Output {
        Command::new(SHIM)
            .args(["-namespace", "default", "-address", "/nowhere", "-id", id, action])
            .current_dir(bundle)
            .env("NACELLE_SHIM_CONFIG", self.path("shim.toml"))
            .env("MAX_SHIM_VERSION", "2")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn start(&self, bundle: &Path, id: &str) -> String {
        let output = self.run(bundle, id, "start");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let response: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        response["address"].as_str().unwrap().to_owned()
    }

    fn delete(&self, bundle: &Path, id: &str) {
        let output = self.run(bundle, id, "delete");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
    }

    /// The pod `p` of an earlier boot of the host: its files are there, its shim is not. Returns its key.
    fn former_pod(&self) -> String {
        let bundle = self.bundle("p", &serde_json::json!({}));
        self.start(&bundle, "p");
        let root = self.path("one/root");
        let key = fs::read_dir(&root).unwrap().next().unwrap().unwrap().file_name();
        let key = key.into_string().unwrap();
        let settings = fs::read(root.join(&key).join("settings.json")).unwrap();
        self.delete(&bundle, "p");
        eventually("files of the pod are left", || self.files("one").is_empty());
        fs::create_dir_all(root.join(&key).join("pods")).unwrap();
        fs::write(root.join(&key).join("settings.json"), settings).unwrap();
        fs::create_dir_all(self.path("one/state").join(&key)).unwrap();
        // containerd makes a new bundle.
        fs::remove_dir_all(bundle).unwrap();
        key
    }

    /// Names of the files in `<name>/root`, `<name>/state` and `<name>/state/uids`.
    fn files(&self, name: &str) -> Vec<String> {
        let dirs = ["root", "state", "state/uids"].map(|dir| self.path(name).join(dir));
        let entries = dirs.iter().flat_map(fs::read_dir).flatten().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name != "uids").collect()
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn delete_uses_the_settings_with_which_the_pod_was_started() {
    let host = Host::new();
    let sandbox = host.bundle("p", &serde_json::json!({}));
    let address = host.start(&sandbox, "p");
    assert_eq!(host.files("one").len(), 2);
    host.configure("two");
    // A further container of the pod gets the pod's address.
    let annotations = serde_json::json!({
        "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p" });
    let container = host.bundle("c", &annotations);
    assert_eq!(host.start(&container, "c"), address);
    // As does a repeated start.
    assert_eq!(host.start(&sandbox, "p"), address);
    assert_eq!(host.files("two"), Vec::<String>::new());
    let socket = address.strip_prefix("unix://").unwrap();
    UnixStream::connect(socket).unwrap();

    // The shim's pod remains when only the container is deleted.
    host.delete(&container, "c");
    UnixStream::connect(socket).unwrap();
    host.delete(&sandbox, "p");
    eventually("files of the pod are left", || host.files("one").is_empty());
    assert!(UnixStream::connect(socket).is_err());
}

/// The bundle of a sandbox of the Sandbox service has no config.json, and is not beside those of its tasks.
#[test]
fn a_container_gets_the_address_of_a_sandbox_without_a_specification() {
    let host = Host::new();
    let state = host.path("containerd");
    let sandbox = state.join("io.containerd.sandbox.controller.v1.shim/default/p");
    fs::create_dir_all(&sandbox).unwrap();
    let address = host.start(&sandbox, "p");
    host.configure("two");
    let container = state.join("io.containerd.runtime.v2.task/default/c");
    let annotations = serde_json::json!({
        "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p" });
    let bundle = host.bundle("c", &annotations);
    fs::create_dir_all(container.parent().unwrap()).unwrap();
    fs::rename(bundle, &container).unwrap();
    assert_eq!(host.start(&container, "c"), address);
    assert_eq!(host.files("two"), Vec::<String>::new());
    host.delete(&sandbox, "p");
    eventually("files of the pod are left", || host.files("one").is_empty());
}

#[test]
fn start_removes_files_of_pods_without_a_shim_and_keeps_those_of_others() {
    let host = Host::new();
    let (first, second) =
        (host.bundle("a", &serde_json::json!({})), host.bundle("b", &serde_json::json!({})));
    let address = host.start(&first, "a");
    for dir in ["root", "state"] {
        let dir = host.path("one").join(dir).join(DEAD_KEY);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), "").unwrap();
    }
    host.start(&second, "b");
    let is_left = || host.files("one").iter().any(|name| name == DEAD_KEY);
    eventually("files of a dead pod are left", || !is_left());
    UnixStream::connect(address.strip_prefix("unix://").unwrap()).unwrap();
    assert_eq!(host.files("one").len(), 4);
    host.delete(&first, "a");
    host.delete(&second, "b");
    eventually("files of the pods are left", || host.files("one").is_empty());
}

#[test]
fn start_removes_a_former_pod_with_the_settings_with_which_that_was_started() {
    let host = Host::new();
    let key = host.former_pod();
    host.configure_dirs("one", "two");
    let bundle = host.bundle("p", &serde_json::json!({}));
    let address = host.start(&bundle, "p");
    assert!(!host.path("one/state").join(&key).exists(), "files of the former pod are left");
    assert!(!host.path("one/root").join(&key).join("pods").exists());
    assert!(host.path("two/state").join(&key).exists());
    UnixStream::connect(address.strip_prefix("unix://").unwrap()).unwrap();
    host.delete(&bundle, "p");
    let is_left = |name| host.files(name).contains(&key);
    eventually("files of the pod are left", || !is_left("one") && !is_left("two"));
}

/// Its journal is a FIFO, which blocks the cleanup.
#[test]
fn start_does_not_wait_without_end_for_the_removal_of_a_former_pod() {
    let host = Host::new();
    let key = host.former_pod();
    let pod = host.path("one/root").join(&key).join("pods").join(&key);
    fs::create_dir_all(&pod).unwrap();
    let journal = pod.join("record.json");
    nix::unistd::mkfifo(&journal, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let bundle = host.bundle("p", &serde_json::json!({}));
    let begin = Instant::now();
    let output = host.run(&bundle, "p", "start");
    assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && message.contains("takes longer than 10s"), "{message}");
    // Ends the cleanup, which holds the lock.
    let mut options = File::options();
    drop(options.write(true).custom_flags(libc::O_NONBLOCK).open(&journal).unwrap());
    let root = host.path("one/root").join(&key);
    eventually("the cleanup does not end", || {
        File::open(&root).map_or(true, |dir| dir.try_lock().is_ok())
    });
}

/// A file where the pod's directory is expected makes its cleanup fail.
#[test]
fn errors_of_cleanups_are_in_the_error_of_delete_and_in_the_log_of_the_sweeping_shim() {
    let host = Host::new();
    let key = host.former_pod();
    let state = host.path("one/state").join(&key);
    fs::remove_dir(&state).unwrap();
    fs::write(&state, "").unwrap();
    let output = host.run(&host.bundle("p", &serde_json::json!({})), "p", "delete");
    let message = String::from_utf8(output.stderr).unwrap();
    let wanted = format!("creating {}", state.display());
    assert!(!output.status.success() && message.contains(&wanted), "{message}");

    // containerd reads the FIFO.
    let other = host.bundle("other", &serde_json::json!({}));
    let fifo = other.join("log");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut options = File::options();
    let mut log = options.read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
    host.start(&other, "other");
    let mut text = Vec::new();
    eventually("the error is not logged", || {
        let _ = log.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        text.contains("removing a pod without a shim failed") && text.contains(&wanted)
    });
    host.delete(&other, "other");
}

#[test]
fn a_container_whose_pod_has_no_shim_is_not_started() {
    let host = Host::new();
    let annotations = serde_json::json!({
        "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p" });
    let output = host.run(&host.bundle("c", &annotations), "c", "start");
    assert!(!output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("pod p of container c has no running shim"), "{message}");
}

#[test]
fn info_and_version_are_printed_without_a_bundle() {
    let mut child = Command::new(SHIM)
        .arg("-info")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"").unwrap();
    let output = child.wait_with_output().unwrap();
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.nacelle.v2");
    let version = Command::new(SHIM).arg("-v").output().unwrap();
    assert!(version.status.success());
    assert!(String::from_utf8(version.stdout).unwrap().contains("io.containerd.nacelle.v2"));
}
