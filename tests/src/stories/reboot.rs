//! A simulated reboot of the host: the daemon and all its processes are killed, volatile state is
//! removed (cgroups, network namespaces, interfaces, packet filter rules, the state directory), the
//! boot id in the records is changed, and files of CNI plugins on the disk stay.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container, pod};
use crate::host::unmount;
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[(
    "after a reboot pods and containers have exited, keep codes and logs, and can be removed",
    reboot,
)];

/// Deletes the masquerading rules of a pod, and their chains.
const DELETE_RULES: &str = r#"
for tool in iptables ip6tables; do
    $tool -t nat -S POSTROUTING | grep -F "$1" | while read -r rule; do
        eval "$tool -t nat $(echo "$rule" | sed 's/^-A/-D/')"
        chain=${rule##*-j }
        $tool -t nat -F "$chain"
        $tool -t nat -X "$chain"
    done
done
"#;
const LIMIT: Duration = Duration::from_secs(15);

fn reboot() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let id = node.pod("rebooted")?;
    let run =
        |name: &str, line: &str| node.cri().run(&id, container(name, &image, &["sh", "-c", line]));
    let done = run("done", "echo done; exit 3")?;
    let going = run("going", "echo going; sleep 1000")?;
    ensure!(node.cri().exited(&done)?.exit_code == 3, "{:?}", node.cri().status(&done)?);
    node.cri().logged(&going, "going")?;
    let created = node.cri().create(&id, container("created", &image, &["true"]))?;
    let address = node.cri().pod_address(&id)?;

    node.kill_daemon()?;
    remove_volatile_state(&node, &id)?;
    let record = node.root.join("pods").join(&id).join("record.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&record)?)?;
    value["boot_id"] = "00000000-0000-0000-0000-000000000000".into();
    fs::write(&record, value.to_string())?;
    node.start_daemon()?;

    let seen = exit_codes(node.cri(), &id, &[&done, &going, &created])?;
    ensure!(seen[0] == 3, "{seen:?}");
    ensure!(seen[1] != 0 && seen[2] != 0, "a container that was lost has succeeded: {seen:?}");
    ensure!(texts(node.cri(), &done)? == ["done"], "{:?}", texts(node.cri(), &done)?);
    ensure!(texts(node.cri(), &going)? == ["going"], "{:?}", texts(node.cri(), &going)?);
    let ended = node.cri().status(&going)?.finished_at;
    // A kubelet creates the pod again with the next attempt. The old pod's address is still in use.
    let mut second = pod("rebooted", &node.logs);
    second.metadata.as_mut().context("a pod has a name")?.attempt = 1;
    let next = node.cri().run_pod(second)?;
    ensure!(node.cri().pod_address(&next)? != address, "{address} was given away");
    let works = node.cri().run(&next, container("c", &image, &["sleep", "1000"]))?;
    ensure!(node.cri().shell(&works, "echo alive")? == "alive", "the next pod does not work");

    // The result is the same after another start of the daemon.
    node.kill_daemon()?;
    node.start_daemon()?;
    let now = exit_codes(node.cri(), &id, &[&done, &going, &created])?;
    ensure!(now == seen, "{now:?}, before {seen:?}");
    ensure!(node.cri().status(&going)?.finished_at == ended, "its end has moved");
    node.cri().stop_pod(&id)?;
    node.cri().remove_pod(&id)?;
    node.finish()
}

/// Exit codes; fails unless the pod is not ready and all containers have exited.
fn exit_codes(cri: &Cri, pod: &str, containers: &[&str]) -> Result<Vec<i32>> {
    let listed = cri.pods()?.into_iter().find(|listed| listed.id == pod);
    let state = listed.context("the pod is not listed")?.state();
    ensure!(state == v1::PodSandboxState::SandboxNotready, "the pod is {state:?}");
    let mut codes = Vec::new();
    for id in containers {
        let status = cri.status(id)?;
        ensure!(status.state() == v1::ContainerState::ContainerExited, "{status:?}");
        ensure!(status.finished_at > 0, "{status:?}");
        codes.push(status.exit_code);
    }
    Ok(codes)
}

fn texts(cri: &Cri, container: &str) -> Result<Vec<String>> {
    Ok(cri.log(container)?.into_iter().map(|line| line.text).collect())
}

fn remove_volatile_state(node: &Node, pod: &str) -> Result<()> {
    let leaf = find_cgroup(Path::new("/sys/fs/cgroup"), &format!("nacelle-{pod}"))
        .context("the pod has no cgroup")?;
    fs::write(leaf.join("cgroup.kill"), "1")?;
    wait::until("the pod's processes have ended", LIMIT, || Ok(fs::remove_dir(&leaf).ok()))?;
    // Deleting the namespace deletes the pod's end of each veth pair, and with it the host's end.
    let netns = Path::new("/run/netns").join(format!("nacelle-{pod}"));
    unmount(&netns)?;
    fs::remove_file(&netns)?;
    let bridge = format!("nclt{}", node.subnet().rsplit('.').next().unwrap_or_default());
    let deleted = Command::new("ip").args(["link", "delete", &bridge]).status()?;
    ensure!(deleted.success(), "cannot delete {bridge}");
    let rules = Command::new("sh").args(["-ec", DELETE_RULES, "sh", pod]).output()?;
    ensure!(rules.status.success(), "{}", String::from_utf8_lossy(&rules.stderr));
    fs::remove_dir_all(&node.state).context("the state folder")
}

fn find_cgroup(folder: &Path, name: &str) -> Option<std::path::PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten().filter(|e| e.path().is_dir());
    let folders: Vec<_> = entries.map(|entry| entry.path()).collect();
    let found = folders.iter().find(|path| path.ends_with(name)).cloned();
    found.or_else(|| folders.iter().find_map(|path| find_cgroup(path, name)))
}
