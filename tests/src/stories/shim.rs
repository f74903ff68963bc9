//! Pods of Debian's containerd in microVMs, with containerd-shim-nacelle-v2 and without nacelled. The version
//! is that of the root file system: 1.6 in bookworm; 1.7 and 2.1 in the labs of trixie and sid.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{self, Cri};
use crate::leftovers::Inventory;
use crate::node::{bin, guest, registry};
use crate::{images, wait};

pub const STORIES: &[Story] = &[
    ("ctr runs a container in a VM: streams, exit codes, exec, kill, and nothing is left", ctr_run),
    ("a pod of containerd's CRI is one VM with several containers and its network", || {
        cri_pod(Sandboxer::PodSandbox)
    }),
    ("after kill -9 of a shim containerd removes all resources of its pod", || {
        killed_shim(Sandboxer::PodSandbox)
    }),
    ("containerd finds running and exited tasks after kill -9 and a restart", restarted_containerd),
    (CRI_POD_OF_SANDBOX_SERVICE, || cri_pod(Sandboxer::Shim)),
    (KILLED_SHIM_OF_SANDBOX_SERVICE, || killed_shim(Sandboxer::Shim)),
    (RESTART_WITH_SANDBOX_SERVICE, restarted_containerd_with_sandbox),
];

pub const CRI_POD_OF_SANDBOX_SERVICE: &str =
    "a pod of the Sandbox service is one VM with several containers and its network";
pub const KILLED_SHIM_OF_SANDBOX_SERVICE: &str =
    "after kill -9 of a shim with the Sandbox service all resources of its pod are removed";
pub const RESTART_WITH_SANDBOX_SERVICE: &str =
    "containerd finds a pod of the Sandbox service after kill -9 and a restart";

const SHIM: &str = "containerd-shim-nacelle-v2";
const TIMEOUT: Duration = Duration::from_secs(60);
const BRIDGE: &str = "ncltshim";
/// containerd's namespace for CRI; images are pulled there.
const NAMESPACE: &str = "k8s.io";

/// What creates a pod: a pause container's task, or the Sandbox service (containerd 1.7 and later).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sandboxer {
    PodSandbox,
    Shim,
}

impl Sandboxer {
    fn name(self) -> &'static str {
        match self {
            Self::PodSandbox => "podsandbox",
            Self::Shim => "shim",
        }
    }
}

/// Major and minor version of the installed containerd.
fn version() -> Result<(u32, u32)> {
    let output = Command::new("containerd").arg("--version").output();
    let text = text(&output.context("running containerd (Debian package containerd)")?.stdout);
    // Program, package, version, revision.
    let version = text.split_whitespace().nth(2).unwrap_or_default();
    let mut numbers = version.trim_start_matches('v').split('.').map_while(|n| n.parse().ok());
    numbers.next().zip(numbers.next()).with_context(|| format!("version of containerd: {text:?}"))
}

/// Configuration of containerd for its version, in the given folder.
fn config(version: (u32, u32), folder: &Path, image: &str, sandboxer: Sandboxer) -> String {
    let (folder, sandboxer) = (folder.display(), sandboxer.name());
    let top = format!(
        "root = \"{folder}/root\"\nstate = \"{folder}/state\"\n\
         [grpc]\n  address = \"{folder}/containerd.sock\"\n"
    );
    let runtime = "runtime_type = \"io.containerd.nacelle.v2\"\n      \
         privileged_without_host_devices = true";
    if version.0 < 2 {
        let mode = match version {
            (1, 6) => String::new(),
            _ => format!("sandbox_mode = \"{sandboxer}\""),
        };
        return format!(
            r#"version = 2
{top}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "nacelle"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nacelle]
      {runtime}
      {mode}
"#
        );
    }
    let plugins = match version {
        (2, 0) => "bin_dir = \"/usr/lib/cni\"",
        _ => "bin_dirs = [\"/usr/lib/cni\"]",
    };
    format!(
        r#"version = 3
{top}
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime".cni]
  {plugins}
  conf_dir = "{folder}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "nacelle"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.nacelle]
      {runtime}
      sandboxer = "{sandboxer}"
"#
    )
}

/// A containerd whose only runtime is the shim.
struct Containerd {
    folder: tempfile::TempDir,
    state: PathBuf,
    process: Child,
    cri: Cri,
    image: String,
    before: Inventory,
}

impl Containerd {
    fn start() -> Result<Self> {
        Self::start_with(Sandboxer::PodSandbox)
    }

    fn start_with(sandboxer: Sandboxer) -> Result<Self> {
        let version = version()?;
        ensure!(
            sandboxer == Sandboxer::PodSandbox || version >= (1, 7),
            "containerd {version:?} has no Sandbox service: run this in the lab of a later release"
        );
        let top = Path::new("/var/lib/nacelle-stories");
        fs::create_dir_all(top)?;
        let folder = tempfile::tempdir_in(top)?;
        let path = |name: &str| folder.path().join(name);
        let state = PathBuf::from(format!("/run/nclts{}", std::process::id()));
        let image = registry().push(&images::layout("busybox")?, "busybox:latest")?;
        // containerd looks up the shim by its name.
        fs::create_dir_all(path("bin"))?;
        std::os::unix::fs::symlink(bin(SHIM), path("bin").join(SHIM))?;
        fs::create_dir_all(path("cni"))?;
        let network = format!(
            r#"{{"cniVersion": "1.0.0", "name": "shims", "plugins": [
  {{"type": "bridge", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": true,
   "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "10.89.7.0/24"}}]],
     "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}"#
        );
        fs::write(path("cni/10-shim.conflist"), network)?;
        let settings = format!(
            "root = \"{root}\"\nstate = \"{state}\"\nvmm = \"{vmm}\"\n\
             kernel = \"{guest}/vmlinux\"\ninitramfs = \"{guest}/initramfs.cpio\"\n\
             log_level = \"debug\"\n",
            root = path("shims").display(),
            state = state.display(),
            vmm = bin("nacelle-vmm").display(),
            guest = guest().display(),
        );
        fs::write(path("shim.toml"), settings)?;
        let config = config(version, folder.path(), &image, sandboxer);
        fs::write(path("config.toml"), config)?;
        let before = Inventory::take(&path("shims"), &state);
        let process = spawn_containerd(folder.path())?;
        let cri = connect(&path("containerd.sock"))?;
        let containerd = Self { folder, state, process, cri, image, before };
        containerd.cri.pull(&containerd.image)?;
        Ok(containerd)
    }

    fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.process = spawn_containerd(self.folder.path())?;
        self.cri = connect(&self.path("containerd.sock"))?;
        Ok(())
    }

    fn run_detached(&self, id: &str, command: &[&str]) -> Result<()> {
        let args = ["run", "-d", "--runtime", "io.containerd.nacelle.v2", &self.image, id];
        expect(&self.ctr(&[&args, command].concat())?, 0, "")
    }

    /// Waits until `ctr task ls` shows the task with the status.
    fn wait_for_status(&self, id: &str, status: &str) -> Result<()> {
        let mut shown = String::new();
        let found = wait::until(&format!("task {id} is {status}"), TIMEOUT, || {
            shown = text(&self.ctr(&["task", "ls"])?.stdout);
            let columns = |line: &str| line.split_whitespace().map(str::to_owned).collect();
            let mut tasks = shown.lines().map(columns);
            Ok(tasks
                .any(|task: Vec<_>| task.len() == 3 && task[0] == id && task[2] == status)
                .then_some(()))
        });
        found.with_context(|| shown)
    }

    /// Deletes a stopped task, whose exit code `ctr` prints, and its container.
    fn delete(&self, id: &str, code: i32) -> Result<()> {
        let deleted = self.ctr(&["task", "delete", id])?;
        let stderr = text(&deleted.stderr);
        let mut numbers = stderr.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        ensure!(numbers.next_back() == Some(&*code.to_string()), "{deleted:?}");
        expect(&self.ctr(&["containers", "delete", id])?, 0, "")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "5", "120", "ctr", "--address"]).arg(self.path("containerd.sock"));
        command.args(["--namespace", NAMESPACE]).args(args).stdin(Stdio::null());
        command
    }

    fn ctr(&self, args: &[&str]) -> Result<Output> {
        self.command(args).output().context("running ctr (Debian package containerd)")
    }

    /// Runs a container until it exits.
    fn run(&self, id: &str, command: &[&str]) -> Result<Output> {
        let args = ["run", "--rm", "--runtime", "io.containerd.nacelle.v2", &self.image, id];
        self.ctr(&[&args, command].concat())
    }

    /// Fails if any resource of a pod is left on the host.
    fn expect_no_leftovers(&self) -> Result<()> {
        let left = || -> Result<Vec<String>> {
            let mut left = Inventory::take(&self.path("shims"), &self.state).since(&self.before);
            left.retain(|item| *item != format!("interface {BRIDGE}"));
            let folder = self.folder.path().display().to_string();
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let is_task_rootfs = |line: &&str| line.contains(&folder) && line.contains("/rootfs ");
            left.extend(mounts.lines().filter(is_task_rootfs).map(|line| format!("mount {line}")));
            for (folder, kept) in [(self.path("shims"), "originals"), (self.state.clone(), "uids")]
            {
                let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
                let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
                let others = names.filter(|name| name != kept);
                left.extend(others.map(|name| format!("{}/{name}", folder.display())));
            }
            let uids = fs::read_dir(self.state.join("uids")).into_iter().flatten().flatten();
            left.extend(uids.map(|uid| format!("uid {:?}", uid.file_name())));
            left.extend(shim_pids()?.iter().map(|pid| format!("shim {pid}")));
            Ok(left)
        };
        let clean = wait::until("nothing is left", Duration::from_secs(20), || {
            Ok(left()?.is_empty().then_some(()))
        });
        clean.with_context(|| format!("left behind: {:#?}", left()))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() || self.expect_no_leftovers().is_err() {
            let text = fs::read_to_string(self.path("containerd.log")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!(
                "--- end of containerd's log:\n{}",
                lines[lines.len().saturating_sub(60)..].join("\n")
            );
        }
        for pod in self.cri.pods().unwrap_or_default() {
            let _ = self.cri.stop_pod(&pod.id);
            let _ = self.cri.remove_pod(&pod.id);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        for pid in shim_pids().unwrap_or_default() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.state);
        let _ = Command::new("ip").args(["link", "del", BRIDGE]).output();
    }
}

/// Appends to the log of a containerd that ran before.
fn spawn_containerd(folder: &Path) -> Result<Child> {
    let path = |name: &str| folder.join(name);
    let log = fs::OpenOptions::new().create(true).append(true).open(path("containerd.log"))?;
    Command::new("containerd")
        .arg("--config")
        .arg(path("config.toml"))
        .env("NACELLE_SHIM_CONFIG", path("shim.toml"))
        // For `sandbox_mode` of 1.7.
        .env("ENABLE_CRI_SANDBOXES", "1")
        .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", path("bin").display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting containerd (Debian package containerd)")
}

fn connect(socket: &Path) -> Result<Cri> {
    wait::until("containerd answers", TIMEOUT, || {
        let Ok(cri) = Cri::connect(socket) else { return Ok(None) };
        Ok(cri.pods().is_ok().then_some(cri))
    })
}

/// Pids of the serving shims.
fn shim_pids() -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut args = command.split(|&b| b == 0);
        let is_shim = args.next().is_some_and(|word| word.ends_with(SHIM.as_bytes()));
        if is_shim && args.next().is_some_and(|word| word == b"-namespace") {
            found.push(pid);
        }
    }
    Ok(found)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Checks the exit code and standard output.
fn expect(output: &Output, code: i32, stdout: &str) -> Result<()> {
    ensure!(
        output.status.code() == Some(code) && text(&output.stdout) == stdout,
        "expected {code} and {stdout:?}, got {:?}, {:?}, {:?}",
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(())
}

fn ctr_run() -> Result<()> {
    let host = Containerd::start()?;
    let kernel = text(&Command::new("uname").arg("-r").output()?.stdout);
    let ran =
        host.run("one", &["sh", "-c", "uname -r; echo err >&2; echo x > /written; exit 7"])?;
    ensure!(ran.status.code() == Some(7), "{ran:?}");
    ensure!(!ran.stdout.is_empty() && text(&ran.stdout) != kernel, "the host's kernel: {ran:?}");
    ensure!(text(&ran.stderr).contains("err"), "{ran:?}");
    host.expect_no_leftovers()?;

    // Standard input is copied to its end; output larger than a pipe arrives completely.
    let args = ["run", "--rm", "--runtime", "io.containerd.nacelle.v2", &host.image, "two"];
    let line = "head -c 3000000 /dev/zero | tr '\\0' a; wc -c";
    let mut piped = host.command(&[&args[..], &["sh", "-c", line]].concat());
    let mut child = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("a pipe was asked for")?;
    let writer =
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &vec![b'b'; 500_000]));
    let piped = child.wait_with_output()?;
    let written = writer.join();
    ensure!(matches!(written, Ok(Ok(()))), "standard input is not taken: {written:?}");
    ensure!(piped.status.success(), "{:?}", piped.status);
    let (body, count) = piped.stdout.split_at(3_000_000.min(piped.stdout.len()));
    ensure!(body.iter().all(|&b| b == b'a') && text(count).trim() == "500000", "{:?}", text(count));

    host.run_detached("three", &["sleep", "1000"])?;
    let exec = |id: &str, line: &str| {
        host.ctr(&["task", "exec", "--exec-id", id, "three", "sh", "-c", line])
    };
    expect(&exec("e1", "echo in; exit 5")?, 5, "in\n")?;
    expect(&exec("e2", "cat /proc/1/comm")?, 0, "sleep\n")?;
    let metrics = text(&host.ctr(&["task", "metrics", "three"])?.stdout);
    ensure!(metrics.contains("memory.usage "), "{metrics}");
    expect(&host.ctr(&["task", "pause", "three"])?, 0, "")?;
    host.wait_for_status("three", "PAUSED")?;
    let refused = exec("e3", "true")?;
    ensure!(text(&refused.stderr).contains("paused"), "{refused:?}");
    expect(&host.ctr(&["task", "resume", "three"])?, 0, "")?;
    host.wait_for_status("three", "RUNNING")?;
    expect(&exec("e4", "echo resumed")?, 0, "resumed\n")?;
    // SIGKILL ends a paused task.
    expect(&host.ctr(&["task", "pause", "three"])?, 0, "")?;
    expect(&host.ctr(&["task", "kill", "--signal", "KILL", "three"])?, 0, "")?;
    host.wait_for_status("three", "STOPPED")?;
    host.delete("three", 137)?;
    host.expect_no_leftovers()
}

fn restarted_containerd() -> Result<()> {
    let mut host = Containerd::start()?;
    host.run_detached("stays", &["sleep", "1000"])?;
    // It exits while containerd is down.
    host.run_detached("exits", &["sh", "-c", "sleep 20; exit 9"])?;
    host.wait_for_status("exits", "RUNNING")?;
    host.kill()?;
    std::thread::sleep(Duration::from_secs(40));
    host.restart()?;
    host.wait_for_status("exits", "STOPPED")?;
    host.wait_for_status("stays", "RUNNING")?;
    host.delete("exits", 9)?;
    let exec = host.ctr(&["task", "exec", "--exec-id", "e", "stays", "echo", "there"])?;
    expect(&exec, 0, "there\n")?;
    expect(&host.ctr(&["task", "kill", "--signal", "KILL", "stays"])?, 0, "")?;
    host.wait_for_status("stays", "STOPPED")?;
    host.delete("stays", 137)?;
    host.expect_no_leftovers()
}

/// A container as a kubelet requests it, with all messages that containerd dereferences unchecked.
fn container_config(name: &str, image: &str, command: &[&str]) -> v1::ContainerConfig {
    let mut config = client::container(name, image, command);
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default();
    linux.security_context.get_or_insert_default();
    config
}

fn cri_pod(sandboxer: Sandboxer) -> Result<()> {
    let host = Containerd::start_with(sandboxer)?;
    let (cri, logs) = (&host.cri, host.path("logs"));
    let mut config_of_pod = client::pod("web", &logs);
    let dns = v1::DnsConfig { servers: vec!["10.89.7.53".into()], ..Default::default() };
    config_of_pod.dns_config = Some(dns);
    let pod = cri.run_pod(config_of_pod.clone())?;
    let address = cri.pod_address(&pod)?;
    ensure!(address.starts_with("10.89.7."), "{address}");
    let shared = host.path("shared");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("index.html"), "from the host\n")?;
    let mut config = container_config(
        "server",
        &host.image,
        &["sh", "-c", "echo up; exec httpd -f -p 80 -h /www"],
    );
    config.mounts.push(client::mount(&shared, "/www"));
    let server = cri.run_in(&pod, &config_of_pod, config)?;
    let other = cri.run_in(
        &pod,
        &config_of_pod,
        container_config("other", &host.image, &["sh", "-c", "sleep 1000"]),
    )?;
    ensure!(shim_pids()?.len() == 1, "one pod, one shim: {:?}", shim_pids()?);

    // The containers share the pod's network, which is reachable from the host.
    let page = wait::until("the server answers", TIMEOUT, || {
        let got = cri.exec(&other, &["wget", "-q", "-O", "-", "http://127.0.0.1/index.html"])?;
        Ok((got.code == 0).then_some(got.stdout))
    })?;
    ensure!(page == "from the host\n", "{page:?}");
    let url = format!("http://{address}/index.html");
    let fetched = Command::new("curl").args(["-fsS", "--max-time", "10", &url]).output()?;
    expect(&fetched, 0, "from the host\n")?;
    let addresses = cri.shell(&other, "ip -4 addr show eth0")?;
    ensure!(addresses.contains(&address), "{addresses}");
    ensure!(cri.shell(&other, "hostname")?.trim() == "web", "host name");
    let resolver = cri.shell(&other, "cat /etc/resolv.conf")?;
    ensure!(resolver.trim() == "nameserver 10.89.7.53", "{resolver:?}");
    // Each container has its own root file system and processes.
    cri.shell(&other, "touch /mine")?;
    ensure!(
        cri.exec(&server, &["test", "-e", "/mine"])?.code == 1,
        "the root file system is shared"
    );
    let lines = cri.log(&server)?;
    ensure!(lines.iter().any(|line| line.text == "up"), "{lines:?}");

    let failed = cri.run_in(
        &pod,
        &config_of_pod,
        container_config("failed", &host.image, &["sh", "-c", "exit 3"]),
    )?;
    ensure!(cri.exited(&failed)?.exit_code == 3, "exit code");
    cri.remove(&failed)?;
    cri.stop(&other, 0)?;
    ensure!(cri.exited(&other)?.exit_code == 137, "exit code of a killed container");
    cri.stop_pod(&pod)?;
    ensure!(!cri.pod_ready(&pod)?, "the pod is ready after its stop");
    cri.remove_pod(&pod)?;
    host.expect_no_leftovers()
}

fn restarted_containerd_with_sandbox() -> Result<()> {
    let mut host = Containerd::start_with(Sandboxer::Shim)?;
    let config_of_pod = client::pod("stays", &host.path("logs"));
    let pod = host.cri.run_pod(config_of_pod.clone())?;
    let sleep = |name: &str, seconds: &str| {
        container_config(name, &host.image, &["sh", "-c", &format!("sleep {seconds}; exit 9")])
    };
    let (stays, exits) = (sleep("stays", "1000"), sleep("exits", "20"));
    let stays = host.cri.run_in(&pod, &config_of_pod, stays)?;
    let exits = host.cri.run_in(&pod, &config_of_pod, exits)?;
    host.kill()?;
    // The second one exits while containerd is down.
    std::thread::sleep(Duration::from_secs(30));
    host.restart()?;
    let cri = &host.cri;
    ensure!(cri.pod_ready(&pod)?, "the pod is not ready after the restart");
    ensure!(cri.exited(&exits)?.exit_code == 9, "exit code");
    ensure!(cri.shell(&stays, "echo there")?.trim() == "there", "exec after the restart");
    let added = container_config("added", &host.image, &["sh", "-c", "exit 4"]);
    let added = cri.run_in(&pod, &config_of_pod, added)?;
    ensure!(cri.exited(&added)?.exit_code == 4, "exit code of a container after the restart");
    ensure!(shim_pids()?.len() == 1, "one pod, one shim: {:?}", shim_pids()?);
    cri.stop_pod(&pod)?;
    cri.remove_pod(&pod)?;
    host.expect_no_leftovers()
}

fn killed_shim(sandboxer: Sandboxer) -> Result<()> {
    let host = Containerd::start_with(sandboxer)?;
    let cri = &host.cri;
    let config_of_pod = client::pod("doomed", &host.path("logs"));
    let pod = cri.run_pod(config_of_pod.clone())?;
    let container =
        cri.run_in(&pod, &config_of_pod, container_config("c", &host.image, &["sleep", "1000"]))?;
    let [shim] = shim_pids()?[..] else { anyhow::bail!("not one shim: {:?}", shim_pids()?) };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL)?;
    ensure!(cri.exited(&container)?.exit_code != 0, "exit code of a lost container");
    wait::until("the pod is not ready", TIMEOUT, || Ok((!cri.pod_ready(&pod)?).then_some(())))?;
    cri.stop_pod(&pod)?;
    cri.remove_pod(&pod)?;
    host.expect_no_leftovers()
}
