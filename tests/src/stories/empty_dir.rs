//! EmptyDirs as a kubelet creates them, VOLUMEs of images, and the scratch disk that has both.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container, mount, pod};
use crate::host::{self, Bind, Tmpfs};
use crate::node::{Node, registry};
use crate::{images, wait};

pub const STORIES: &[Story] = &[
    (
        "an emptyDir is shared by a pod's containers, limited, and kept until the pod is removed",
        lifetime,
    ),
    ("overlayfs, O_DIRECT and trusted attributes work in emptyDirs and VOLUMEs", privileged),
    ("a container's writable layer has its own limit, and its usage is reported", layer),
];

/// Of the pod's security context (fsGroup).
const GROUP: u32 = 4242;
const MIB: u64 = 1 << 20;

/// A kubelet's directories of one pod.
struct Kubelet {
    root: tempfile::TempDir,
    uid: String,
}

impl Kubelet {
    fn new(uid: &str) -> Result<Self> {
        Ok(Self { root: host::folder()?, uid: uid.into() })
    }

    fn pod(&self) -> PathBuf {
        self.root.path().join("pods").join(&self.uid)
    }

    /// The directory of an emptyDir, as a kubelet creates it for a pod with an fsGroup.
    fn empty_dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.pod().join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path)?;
        set_owner(&path)?;
        Ok(path)
    }

    /// A subPath of one, as a kubelet prepares it for a container.
    fn sub_path(&self, volume: &str, sub_path: &str) -> Result<Bind> {
        let directory = self.empty_dir(volume)?.join(sub_path);
        fs::create_dir_all(&directory)?;
        set_owner(&directory)?;
        Bind::mount(&directory, &self.pod().join("volume-subpaths").join(volume).join("c/0"))
    }
}

fn set_owner(path: &Path) -> Result<()> {
    chown(path, Some(0), Some(GROUP))?;
    // After the owner, which clears the set-group-ID bit.
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o2777))?)
}

fn config_of(name: &str, attempt: u32, image: &str, mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt }),
        log_path: format!("{name}/{attempt}.log"),
        mounts,
        ..container(name, image, &["sleep", "1000"])
    }
}

fn lifetime() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let kubelet = Kubelet::new("kept-uid")?;
    let (cache, small) = (kubelet.empty_dir("cache")?, kubelet.empty_dir("small")?);
    let memory = kubelet.empty_dir("memory")?;
    let host_memory = Tmpfs::mount(&memory, "size=8m")?;
    set_owner(&memory)?;
    fs::write(cache.join("before"), "from the host\n")?;
    let sub = kubelet.sub_path("cache", "of/two")?;
    let mut config = pod("kept", &node.logs);
    config.annotations = [("nacelle.dev/empty-dir-limits".into(), "small=16Mi".into())].into();
    let pod = node.cri().run_pod(config)?;
    let mounts =
        || vec![mount(&cache, "/cache"), mount(&small, "/small"), mount(&memory, "/memory")];

    let one = node.cri().run(&pod, config_of("one", 0, &image, mounts()))?;
    let cri = node.cri();
    let seen =
        cri.shell(&one, "stat -c '%u %g %a' /cache /memory /cache/of/two; cat /cache/before")?;
    ensure!(seen == "0 4242 2777\n0 4242 2777\n0 4242 2777\nfrom the host", "{seen}");
    // A user of the pod's group may write, and its files belong to the group.
    cri.shell(&one, "umask 2; echo kept > /cache/file && ln /cache/file /cache/linked")?;
    let seen = cri.shell(&one, "stat -c '%g %h' /cache/file; stat -f -c %T /memory")?;
    ensure!(seen == "4242 2\ntmpfs", "{seen}");
    // busybox' df names the first mount of the same device, and /cache is on the same disk.
    let sizes =
        cri.shell(&one, "stat -f -c '%b %S' /small /memory | awk '{print $1 * $2 / 1024}'")?;
    ensure!(sizes == "16384\n8192", "sizes in KiB: {sizes:?}");
    for (place, says) in [("/small", "quota exceeded"), ("/memory", "No space")] {
        let line = format!("dd if=/dev/zero of={place}/big bs=1M count=20");
        let output = cri.exec(&one, &["sh", "-c", &line])?;
        ensure!(output.code != 0 && output.stderr.contains(says), "{place}: {output:?}");
    }
    let used = cri.shell(&one, "du -sk /small | cut -f1")?;
    ensure!((15000..=16384).contains(&used.parse::<u64>()?), "{used} KiB before the limit");
    cri.shell(&one, "rm /small/big && dd if=/dev/zero of=/small/second bs=1M count=10")?;

    // A second container has the same files, and a sub-path of them.
    let two = vec![mount(&cache, "/c"), mount(sub.path(), "/sub"), mount(&memory, "/m")];
    let two = cri.run(&pod, config_of("two", 0, &image, two))?;
    cri.shell(&one, "rm /memory/big; mkfifo /cache/pipe; echo through > /cache/pipe &")?;
    let seen =
        cri.shell(&two, "cat /c/pipe; touch /sub/inner; stat -c %d /c /sub | uniq | wc -l")?;
    ensure!(seen == "through\n1", "{seen}");
    cri.shell(&one, "test -e /cache/of/two/inner")?;
    ensure!(!cache.join("file").exists(), "it is the host's directory");

    // It is kept over restarts of the daemon and of containers.
    node.kill_daemon()?;
    node.start_daemon()?;
    let cri = node.cri();
    for id in [&one, &two] {
        cri.stop(id, 0)?;
        cri.remove(id)?;
    }
    let second = cri.run(&pod, config_of("one", 1, &image, mounts()))?;
    let seen = cri.shell(&second, "cat /cache/linked; ls /small /cache/of/two")?;
    ensure!(seen == "kept\n/cache/of/two:\ninner\n\n/small:\nsecond", "{seen}");

    // With `empty_dir = "share"` the data is on the host.
    node.stop_daemon()?;
    let path = node.path("config.toml");
    let text = fs::read_to_string(&path)?;
    fs::write(&path, format!("{text}\n[pods]\nempty_dir = \"share\"\n"))?;
    node.start_daemon()?;
    let cri = node.cri();
    let kubelet = Kubelet::new("shared-uid")?;
    let folder = kubelet.empty_dir("cache")?;
    let shared = cri.run_pod(self::pod("shared", &node.logs))?;
    let id = cri.run(&shared, config_of("one", 0, &image, vec![mount(&folder, "/cache")]))?;
    cri.shell(&id, "echo seen > /cache/file && sync")?;
    ensure!(fs::read_to_string(folder.join("file"))? == "seen\n", "not on the host");
    let later = cri.run(&pod, config_of("later", 0, &image, vec![mount(&cache, "/cache")]))?;
    ensure!(cri.shell(&later, "cat /cache/file")? == "kept", "the pod's emptyDir has moved");
    for pod in [&pod, &shared] {
        cri.stop_pod(pod)?;
        cri.remove_pod(pod)?;
    }
    sub.unmount().context("a removed pod holds the kubelet's mount")?;
    host_memory.unmount()?;
    node.finish()
}

const PROGRAM: &str = r#"
import ctypes, mmap, os, sys
for top in sys.argv[1:]:
    os.chdir(top)
    page = mmap.mmap(-1, 4096)
    page.write(b"d" * 4096)
    fd = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    assert os.write(fd, page) == 4096
    page.seek(0)
    page.write(b"x" * 4096)
    os.lseek(fd, 0, 0)
    assert os.readv(fd, [page]) == 4096 and page[0] == ord("d")
    for name in ("user.a", "trusted.b"):
        os.setxattr("direct", name, b"value")
        assert os.getxattr("direct", name) == b"value"
    os.link("direct", "linked")
    assert os.stat("linked").st_nlink == 2
    for name in ("low", "up", "work", "merged"):
        os.mkdir(name)
    open("low/below", "w").close()
    libc = ctypes.CDLL(None, use_errno=True)
    data = b"lowerdir=low,upperdir=up,workdir=work"
    assert libc.mount(b"o", b"merged", b"overlay", 0, data) == 0, os.strerror(ctypes.get_errno())
    open("merged/above", "w").close()
    os.remove("merged/below")
    assert os.listdir("merged") == ["above"], os.listdir("merged")
print("passed")
"#;

fn privileged() -> Result<()> {
    let node = Node::start()?;
    let folder = tempfile::tempdir()?;
    let files = [("data/file", "image\n")];
    let layout = images::with_volumes("python", folder.path(), &files, &["/data", "/new"])?;
    let image = registry().push(&layout, "python-volumes:latest")?;
    let cri = node.cri();
    cri.pull(&image)?;
    let kubelet = Kubelet::new("privileged-uid")?;
    let empty = kubelet.empty_dir("empty")?;
    let mut config = pod("privileged", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = cri.run_pod(config)?;
    let run = |name: &str, propagation: v1::MountPropagation| {
        let mount = v1::Mount { propagation: propagation as i32, ..mount(&empty, "/empty") };
        let mut config = config_of(name, 0, &image, vec![mount]);
        config.linux.get_or_insert_default().security_context =
            Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
        cri.run(&pod, config)
    };
    let sees = run("sees", v1::MountPropagation::PropagationHostToContainer)?;
    let id = run("mounts", v1::MountPropagation::PropagationBidirectional)?;
    cri.shell(&id, "grep -q image /data/file && echo own > /data/file")?;
    let output = cri.exec(&id, &["python3", "-c", PROGRAM, "/empty", "/data", "/new"])?;
    ensure!(output.stdout == "passed\n", "{output:?}");
    // Mounts of one container in an emptyDir appear in another one with HostToContainer.
    let seen = cri.shell(&sees, "ls /empty/merged; cat /data/file")?;
    ensure!(seen == "above\nimage", "{seen}");
    ensure!(fs::read_dir(&empty)?.next().is_none(), "it is the host's directory");
    node.finish()
}

/// Bytes and inodes of a container's writable layer in its stats.
fn usage(cri: &Cri, id: &str) -> Result<(u64, u64)> {
    let request = v1::ContainerStatsRequest { container_id: id.into() };
    let mut client = cri.runtime.clone();
    let reply = cri.block_on(async move { client.container_stats(request).await })?;
    let layer = reply.into_inner().stats.and_then(|stats| stats.writable_layer);
    let layer = layer.context("no writable layer")?;
    let value = |number: Option<v1::UInt64Value>| number.map_or(0, |number| number.value);
    Ok((value(layer.used_bytes), value(layer.inodes_used)))
}

fn layer() -> Result<()> {
    let node = Node::start_with(|text| format!("{text}\n[pods]\nscratch_size = 67108864\n"))?;
    let image = node.image("busybox")?;
    let pod = node.pod("layer")?;
    let cri = node.cri();
    let full = cri.run(&pod, config_of("full", 0, &image, vec![]))?;
    let other = cri.run(&pod, config_of("other", 0, &image, vec![]))?;
    let size = cri.shell(&full, "df -k / | awk 'NR > 1 {print $2}'")?;
    ensure!(size == "65536", "df says {size}");
    let output = cri.exec(&full, &["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=100"])?;
    ensure!(output.code != 0 && output.stderr.contains("quota exceeded"), "{output:?}");
    let limit = Duration::from_secs(30);
    let wait_for_usage = |id: &str, what: &str, holds: &dyn Fn(u64, u64) -> bool| {
        let mut last = (0, 0);
        let wait_for_usage = wait::until(what, limit, || {
            last = usage(cri, id)?;
            Ok(holds(last.0, last.1).then_some(()))
        });
        wait_for_usage.with_context(|| format!("{last:?}"))
    };
    wait_for_usage(&full, "the usage of a full layer is reported", &|bytes, _| {
        (60 * MIB..=64 * MIB).contains(&bytes)
    })?;
    // The other container's layer is not full.
    cri.shell(&other, "dd if=/dev/zero of=/mine bs=1M count=8 && sync; touch $(seq 1 50)")?;
    wait_for_usage(
        &other,
        "the usage of the other layer is reported separately",
        &|bytes, files| (8 * MIB..16 * MIB).contains(&bytes) && (50..100).contains(&files),
    )?;
    cri.shell(&full, "rm /big && dd if=/dev/zero of=/second bs=1M count=20")?;
    let output = cri.exec(&full, &["sh", "-c", "cd /tmp && touch $(seq 1 5000)"])?;
    ensure!(output.stderr.contains("quota exceeded"), "no limit of inodes: {output:?}");
    // The space of a removed container is freed, also on the host.
    let disk = node.root.join("pods").join(&pod).join("scratch.img");
    let blocks = || Ok::<_, anyhow::Error>(fs::metadata(&disk)?.blocks() * 512);
    cri.shell(&full, "sync")?;
    wait::until("the file has reached the host", limit, || {
        Ok((blocks()? > 20 * MIB).then_some(()))
    })?;
    cri.stop(&full, 0)?;
    cri.remove(&full)?;
    wait::until("the room is given back", limit, || Ok((blocks()? < 16 * MIB).then_some(())))
        .with_context(|| format!("{:?} bytes", blocks()))?;
    cri.shell(&other, "test -e /mine")?;
    node.finish()
}
