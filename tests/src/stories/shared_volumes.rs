//! Volumes that containers of a pod share: a file of the host is one inode in the guest, in every
//! container and through every mount and path.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container, mount, pod};
use crate::host::{self, Bind, Tmpfs};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("containers share sockets, pipes, locks, mappings and inotify events of a directory", share),
    ("two containers write one SQLite database, and a kill does not corrupt it", sqlite),
    ("two thousand files of a volume are open at a time", many_open),
    ("reading in a volume takes few requests to the file server", requests),
];

const SHARED: &str = include_str!("volumes/shared.py");
const ROWS: &str = include_str!("volumes/rows.py");
const MANY: &str = include_str!("volumes/many.py");

fn with_mounts(config: v1::ContainerConfig, mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig { mounts, ..config }
}

fn read_only(mount: v1::Mount) -> v1::Mount {
    v1::Mount { readonly: true, ..mount }
}

/// Runs one of the Python programs; it prints `passed` at the end.
fn python(cri: &Cri, id: &str, program: &str, arguments: &[&str], limit: i64) -> Result<()> {
    let mut command = vec!["python3", "-c", program];
    command.extend(arguments);
    let output = cri.exec_within(id, &command, limit)?;
    ensure!(output.stdout == "passed\n", "{arguments:?}: {output:?}");
    Ok(())
}

fn share() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("as-one")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let inner = folder.path().join("inner");
    fs::create_dir(&inner)?;
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o777))?;
    // As a kubelet prepares a subPath.
    let sub_path = Bind::mount(&inner, &folder.path().join("sub-path"))?;
    let sleep = ["sleep", "1000"];
    let run = |name: &str, command: &[&str], uid: i64, mounts: Vec<v1::Mount>| {
        let mut config = container(name, &image, command);
        let context = v1::LinuxContainerSecurityContext {
            run_as_user: Some(v1::Int64Value { value: uid }),
            ..Default::default()
        };
        config.linux = Some(v1::LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        });
        cri.run(&pod, with_mounts(config, mounts))
    };
    // First the inner directory, then its parent, then the inner one through another path.
    let part = run("part", &sleep, 1000, vec![mount(&inner, "/part")])?;
    let serve = ["python3", "-c", SHARED, "serve", "/whole/inner"];
    let server = run("server", &serve, 0, vec![mount(folder.path(), "/whole")])?;
    cri.logged(&server, "ready")?;
    let by_bind = vec![mount(sub_path.path(), "/sub"), mount(&inner, "/again")];
    let bound = run("bound", &sleep, 1000, by_bind)?;
    let reader = run("reader", &sleep, 0, vec![read_only(mount(folder.path(), "/ro"))])?;
    for (id, place, tag) in
        [(&part, "/part", "part"), (&bound, "/sub", "bound"), (&bound, "/again", "again")]
    {
        python(cri, id, SHARED, &["check", place, tag], 60)?;
    }
    python(cri, &reader, SHARED, &["read", "/ro/inner"], 60)?;
    let refused = cri.exec(&reader, &["touch", "/ro/inner/x"])?;
    ensure!(refused.stderr.contains("Read-only"), "{refused:?}");
    // A process whose working directory is the inner directory is not affected by new containers.
    let stand = "cd /whole/inner && echo $PWD >cwd && exec sleep 1000";
    let standing = run("standing", &["sh", "-c", stand], 0, vec![mount(folder.path(), "/whole")])?;
    wait::until("it stands there", Duration::from_secs(30), || {
        Ok(inner.join("cwd").exists().then_some(()))
    })?;
    let late = run("late", &sleep, 0, vec![mount(&inner, "/late")])?;
    python(cri, &late, SHARED, &["check", "/late", "late"], 60)?;
    let cwd = cri.shell(&standing, "readlink /proc/1/cwd && ls /proc/1/cwd/../inner/cwd")?;
    ensure!(cwd == "/whole/inner\n/proc/1/cwd/../inner/cwd", "{cwd}");
    // Removed containers do not affect the others.
    for id in [&bound, &standing] {
        cri.stop(id, 0)?;
        cri.remove(id)?;
    }
    python(cri, &part, SHARED, &["check", "/part", "after"], 60)?;
    for id in [&server, &late] {
        cri.stop(id, 0)?;
        cri.remove(id)?;
    }
    cri.shell(&part, "echo alone > /part/alone && cat /part/alone")?;
    ensure!(fs::read_to_string(inner.join("alone"))? == "alone\n", "the last one's file");
    python(cri, &reader, "import os; os.stat('/ro/inner/alone'); print('passed')", &[], 60)?;
    node.finish()
}

fn sqlite() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("sqlite")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let shared = || vec![mount(folder.path(), "/data")];
    let write = |name: &str, count: &str| {
        let command = ["python3", "-c", ROWS, "/data/base", name, count];
        cri.run(&pod, with_mounts(container(name, &image, &command), shared()))
    };
    let killed = write("killed", "100000")?;
    // SQLite does not wait for its lock when two processes create the database.
    cri.logged(&killed, "killed 1")?;
    let steady = write("steady", "150")?;
    let sleeper = container("checker", &image, &["sleep", "1000"]);
    let checker = cri.run(&pod, with_mounts(sleeper, shared()))?;
    cri.logged(&killed, "killed 40")?;
    cri.logged(&steady, "steady 10")?;
    cri.stop(&killed, 0)?;
    let end = wait::until("the other goes on", Duration::from_secs(180), || {
        let status = cri.status(&steady)?;
        let exited = status.state == v1::ContainerState::ContainerExited as i32;
        Ok(exited.then_some(status))
    })?;
    ensure!(end.exit_code == 0, "{end:?}: {:?}", cri.log(&steady)?);
    let output = cri.exec(&checker, &["python3", "-c", ROWS, "/data/base", "check"])?;
    let lines: Vec<&str> = output.stdout.lines().collect();
    let committed = cri.log(&killed)?.len();
    let kept = lines.get(1).and_then(|line| line.strip_prefix("killed "));
    let kept: Vec<usize> = kept
        .with_context(|| format!("{output:?}"))?
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(lines[0] == "ok" && lines[2] == "steady 150 149", "{output:?}");
    ensure!(
        kept[0] >= committed && kept[0] == kept[1] + 1,
        "{committed} rows were committed: {output:?}"
    );
    node.finish()
}

fn many_open() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("many")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let below = Tmpfs::mount(&folder.path().join("below"), "size=64m")?;
    let config = container("c", &image, &["sleep", "1000"]);
    let id = cri.run(&pod, with_mounts(config, vec![mount(folder.path(), "/data")]))?;
    python(cri, &id, MANY, &["/data/many", "2000"], 300)?;
    ensure!(fs::read_dir(folder.path().join("many"))?.count() == 2_000, "the host's files");
    ensure!(fs::read(folder.path().join("many/1000"))? == b"1000", "what was written");
    // One file system with unique inode numbers, also with mounts of the host in it.
    fs::write(folder.path().join("top"), "")?;
    fs::write(folder.path().join("below/file"), "")?;
    let one = cri.shell(&id, "stat -c %d /data/top /data/below/file /data/below | uniq | wc -l")?;
    let numbers = "stat -c %i /data /data/top /data/below /data/below/file | sort -u | wc -l";
    ensure!((one.as_str(), cri.shell(&id, numbers)?.as_str()) == ("1", "4"), "{one}");
    cri.remove(&id)?;
    below.unmount().context("a removed container holds a mount of the host")?;
    node.finish()
}

/// Counts the requests of a kind that a command sends to the file server: `count KIND COMMAND`.
const COUNT: &str = "
T=/sys/kernel/tracing
[ -e $T/events ] || mount -t tracefs none $T
count() {
    kind=$1; shift; echo > $T/trace
    echo 1 > $T/events/fuse/fuse_request_send/enable; eval \"$@\"
    echo 0 > $T/events/fuse/fuse_request_send/enable; grep -c \"FUSE_$kind)\" $T/trace || true
}
";

fn requests() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let mut config = pod("requests", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let cri = node.cri();
    let pod = cri.run_pod(config)?;
    let folder = host::folder()?;
    fs::write(folder.path().join("big"), vec![1; 8 << 20])?;
    let mut config = container("c", &image, &["sleep", "1000"]);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let id = cri.run(&pod, with_mounts(config, vec![mount(folder.path(), "/data")]))?;
    let count = |kind: &str, command: &str| -> Result<u32> {
        let said = cri.shell(&id, &format!("{COUNT} count {kind} '{command}'"))?;
        said.trim().parse().with_context(|| said.clone())
    };
    // 512 KiB each, and smaller ones until the kernel knows that the file is read in order.
    let reads = count("READ", "cat /data/big > /dev/null")?;
    ensure!((8..=32).contains(&reads), "{reads} READ for 8 MiB");
    cri.remove(&id)?;
    node.finish()
}
