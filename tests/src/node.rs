//! A node: a nacelled with its own directories and pod network.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::client::{self, Cri};
use crate::images;
use crate::leftovers::Inventory;
use crate::registry::Registry;
use crate::wait;

/// Numbers nodes, so that each gets its own subnet and bridge.
static NEXT: AtomicU8 = AtomicU8::new(1);

/// A node and its daemon; drop stops the daemon and removes the directories.
pub struct Node {
    pub root: PathBuf,
    pub state: PathBuf,
    pub logs: PathBuf,
    folder: tempfile::TempDir,
    daemon: Option<Child>,
    cri: Option<Cri>,
    before: Option<Inventory>,
    number: u8,
}

/// Where nacelle's binaries are: beside the running one.
pub fn bin(name: &str) -> PathBuf {
    std::env::current_exe().expect("own path").with_file_name(name)
}

/// Folder of `vmlinux` and `initramfs.cpio`.
pub fn guest() -> PathBuf {
    std::env::var_os("NACELLE_GUEST").map_or_else(|| "/nacelle/guest".into(), PathBuf::from)
}

/// The registry of all stories, started on first use; images are pushed on demand.
pub fn registry() -> &'static Registry {
    static SHARED: OnceLock<Registry> = OnceLock::new();
    SHARED.get_or_init(|| Registry::start().expect("a registry on loopback"))
}

impl Node {
    /// A fresh node with a running daemon.
    pub fn start() -> Result<Self> {
        Self::start_with(|config| config)
    }

    /// A fresh node; `edit` gets the text of its configuration before the daemon sees it.
    pub fn start_with(edit: impl FnOnce(String) -> String) -> Result<Self> {
        let top = Path::new("/var/lib/nacelle-stories");
        fs::create_dir_all(top)?;
        let folder = tempfile::tempdir_in(top)?;
        let path = |name: &str| folder.path().join(name);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut node = Self {
            root: path("root"),
            // Short: the path of a unix socket has at most 107 bytes.
            state: format!("/run/nclt{}-{number}", std::process::id()).into(),
            logs: path("logs"),
            daemon: None,
            cri: None,
            before: None,
            number,
            folder,
        };
        fs::create_dir_all(node.path("cni"))?;
        fs::write(node.path("cni/10-nacelle.conflist"), node.conflist())?;
        fs::write(node.path("config.toml"), edit(node.config()))?;
        node.before = Some(node.inventory());
        node.start_daemon()?;
        Ok(node)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.state.join("nacelled.sock")
    }

    /// First three numbers of the node's IPv4 subnet.
    pub fn subnet(&self) -> String {
        format!("10.88.{}", self.number)
    }

    fn conflist(&self) -> String {
        format!(
            r#"{{"cniVersion": "1.0.0", "name": "stories{n}", "plugins": [
  {{"type": "bridge", "bridge": "nclt{n}", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {{"type": "host-local", "ranges": [
     [{{"subnet": "{subnet}.0/24"}}], [{{"subnet": "fd88:0:0:{n}::/64"}}]],
     "routes": [{{"dst": "0.0.0.0/0"}}, {{"dst": "::/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}, "snat": true}}]}}"#,
            n = self.number,
            subnet = self.subnet(),
        )
    }

    fn config(&self) -> String {
        format!(
            r#"root = "{root}"
state = "{state}"
vmm = "{vmm}"
kernel = "{guest}/vmlinux"
initramfs = "{guest}/initramfs.cpio"

[network]
conf_dir = "{folder}/cni"
"#,
            root = self.root.display(),
            state = self.state.display(),
            vmm = bin("nacelle-vmm").display(),
            guest = guest().display(),
            folder = self.folder.path().display(),
        )
    }

    /// Starts the daemon (again) and waits until it answers.
    pub fn start_daemon(&mut self) -> Result<()> {
        let log =
            fs::OpenOptions::new().create(true).append(true).open(self.path("nacelled.log"))?;
        let mut daemon = Command::new(bin("nacelled"))
            .env_remove("NACELLE_SOCKET")
            .arg("--config")
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting nacelled")?;
        let socket = self.socket();
        let cri = wait::until("nacelled answers", Duration::from_secs(60), || {
            if let Some(status) = daemon.try_wait()? {
                bail!("nacelled exited on start ({status}): {}", self.daemon_log());
            }
            Ok(Cri::connect(&socket).ok())
        })?;
        self.cri = Some(cri);
        self.daemon = Some(daemon);
        Ok(())
    }

    /// The last 40 lines of the daemon's log.
    pub fn daemon_log(&self) -> String {
        let text = fs::read_to_string(self.path("nacelled.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub fn cri(&self) -> &Cri {
        self.cri.as_ref().expect("the daemon runs")
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// SIGKILL, as a crash would.
    pub fn kill_daemon(&mut self) -> Result<()> {
        self.cri = None;
        let mut daemon = self.daemon.take().context("the daemon runs")?;
        daemon.kill()?;
        let status = daemon.wait()?;
        ensure!(status.signal() == Some(9), "nacelled exited before SIGKILL: {status}");
        Ok(())
    }

    /// SIGTERM, as a service manager would; returns the exit status.
    pub fn stop_daemon(&mut self) -> Result<std::process::ExitStatus> {
        self.cri = None;
        let mut daemon = self.daemon.take().context("the daemon runs")?;
        let pid = nix::unistd::Pid::from_raw(daemon.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        wait::until("nacelled stops", Duration::from_secs(30), || Ok(daemon.try_wait()?))
    }

    /// Pushes an image of [`images`] and pulls it on this node; returns its reference.
    pub fn image(&self, name: &str) -> Result<String> {
        let registry = registry();
        let layout = images::layout(name)?;
        let reference = registry.push(&layout, &format!("{name}:latest"))?;
        self.cri().pull(&reference).with_context(|| format!("pulling {reference}"))?;
        Ok(reference)
    }

    /// A pod with defaults of the stories.
    pub fn pod(&self, name: &str) -> Result<String> {
        Ok(self.cri().run_pod(client::pod(name, &self.logs))?)
    }

    /// The pid of a pod's VMM.
    pub fn vmm_pid(&self, pod: &str) -> Result<i32> {
        let status = self.cri().pod_status(pod)?;
        let info = status.info.get("info").context("verbose status has no info")?;
        let info: serde_json::Value = serde_json::from_str(info)?;
        let pid = info["pid"].as_i64().with_context(|| format!("no pid in {info}"))?;
        Ok(pid.try_into()?)
    }

    pub fn inventory(&self) -> Inventory {
        Inventory::take(&self.root, &self.state)
    }

    /// Removes every pod and fails if anything of them is left on the host.
    pub fn finish(mut self) -> Result<()> {
        for pod in self.cri().pods()? {
            self.cri().stop_pod(&pod.id)?;
            self.cri().remove_pod(&pod.id)?;
        }
        self.nothing_left()?;
        let status = self.stop_daemon()?;
        ensure!(status.success(), "nacelled exited with {status}:\n{}", self.daemon_log());
        Ok(())
    }

    /// Fails if anything was left on the host since the node started, except the node's bridge.
    pub fn nothing_left(&self) -> Result<()> {
        let before = self.before.clone().context("the node was started")?;
        let bridge = format!("interface nclt{}", self.number);
        let outcome = wait::until("nothing is left", Duration::from_secs(15), || {
            let left = self.inventory().since(&before);
            Ok(left.iter().all(|item| *item == bridge).then_some(()))
        });
        outcome.with_context(|| format!("left behind: {:#?}", self.inventory().since(&before)))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() || self.daemon.is_some() {
            eprintln!("--- end of nacelled's log:\n{}\n---", self.daemon_log());
        }
        if let Some(mut daemon) = self.daemon.take() {
            // After a failed story: its pods must not affect the next one.
            if let Some(cri) = &self.cri {
                for pod in cri.pods().unwrap_or_default() {
                    let _ = cri.remove_pod(&pod.id);
                }
            }
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = fs::remove_dir_all(&self.state);
        let _ = Command::new("ip").args(["link", "del", &format!("nclt{}", self.number)]).output();
    }
}
