//! Devices of containers and of VMs: those of every container, those of a privileged one, how many
//! containers a pod can have; and volumes in place of default mounts.

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container, mount, pod};
use crate::host::{self, Tmpfs};
use crate::images;
use crate::node::{Node, registry};

pub const STORIES: &[Story] = &[
    ("a pod can have many containers with different images, and they can be removed", many),
    ("a privileged container has all devices of its guest, including new loop devices", loops),
    ("a container has runc's devices, seccomp errors and /dev/shm, or a volume there", defaults),
];

/// More than one function for each slot of the PCI bus. `NACELLE_CONTAINERS` is another number: 64
/// fit too. Each has an image of its own here: a virtio-blk device with two of the about 200
/// interrupt vectors of a guest with one vCPU.
const CONTAINERS: usize = 34;

fn many() -> Result<()> {
    let count = match std::env::var("NACELLE_CONTAINERS") {
        Ok(text) => text.parse().context("NACELLE_CONTAINERS is not a number")?,
        Err(_) => CONTAINERS,
    };
    let node = Node::start()?;
    let folder = host::folder()?;
    let program = std::path::Path::new("/bin/busybox");
    let layouts = images::numbered(folder.path(), program, "number", count)?;
    let pod = node.pod("many")?;
    let cri = node.cri();
    let sleep = ["/bin/busybox", "sleep", "1000"];
    let mut ids = Vec::new();
    for (n, name) in registry().push_all(&layouts)?.into_iter().enumerate() {
        cri.pull(&name)?;
        let id = cri.create(&pod, container(&format!("c{n}"), &name, &sleep));
        ids.push(id.with_context(|| format!("container {n}"))?);
    }
    // A created container has its process and its mounts already; starting all takes a minute.
    let started = |n: &usize| n.is_multiple_of(4) || [1, 7, 9, 10, count - 1].contains(n);
    for n in (0..count).filter(started) {
        cri.start(&ids[n]).with_context(|| format!("container {n}"))?;
    }
    let number = |id: &str| -> Result<String> {
        Ok(cri.exec(id, &["/bin/busybox", "cat", "/number"])?.stdout)
    };
    // One in the middle that was started.
    for n in [0, 1, count / 8 * 4, count - 1] {
        ensure!(number(&ids[n])? == format!("{n}\n"), "container {n} has another image");
    }
    // Slots of removed containers are reused, and other containers are not affected.
    for n in [0, 7, 8, 9, count - 1] {
        cri.stop(&ids[n], 0)?;
        cri.remove(&ids[n])?;
        let name = registry().name(&format!("number-{n}"));
        let config = container(&format!("second{n}"), &name, &sleep);
        ids[n] = cri.run(&pod, config).with_context(|| format!("second container {n}"))?;
        ensure!(number(&ids[n])? == format!("{n}\n"), "container {n} has another image");
    }
    ensure!(number(&ids[1])? == "1\n" && number(&ids[10])? == "10\n", "the others' disks");
    node.finish()
}

fn privileged(mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    config
}

/// Prints the misc devices of the kernel that have no node below /dev.
const MISSING: &str = "while read minor name; do \
    find /dev -type c -exec stat -c %t:%T {} + | grep -qx \"a:$(printf %x $minor)\" || echo $name; \
    done < /proc/misc";

/// A loop device for each file and one for `losetup`, which is detached again.
const LOOPS: &str = "set -e; cd /root
    for n in 1 2 3; do
        cp /p/disk disk$n; mkdir -p /mnt/$n; mount -o loop disk$n /mnt/$n; echo content$n > /mnt/$n/file
    done
    cat /mnt/1/file /mnt/2/file /mnt/3/file
    d=$(losetup -f); losetup $d /p/disk; test -b $d; losetup -d $d
    umount /mnt/1; mount -o loop,ro disk1 /mnt/1; cat /mnt/1/file
    touch /mnt/1/x 2>/dev/null || echo read-only
    losetup -a | wc -l";

fn loops() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let folder = host::folder()?;
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk)?.set_len(8 << 20)?;
    let made =
        std::process::Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk).status()?;
    ensure!(made.success(), "mke2fs: {made}");
    let mut config = pod("loops", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = node.cri().run_pod(config)?;
    let cri = node.cri();
    let mut config = privileged(container("c", &image, &["sleep", "1000"]));
    // All devices of the node are the guest's.
    config.mounts = vec![mount(folder.path(), "/p"), mount("/dev".as_ref(), "/dev")];
    let id = cri.run(&pod, config)?;
    ensure!(cri.shell(&id, MISSING)?.is_empty(), "no nodes of {}", cri.shell(&id, MISSING)?);
    cri.shell(&id, "test -c /dev/loop-control && head -c 1 /dev/kmsg > /dev/null; : < /dev/fuse")?;
    let wanted = "content1\ncontent2\ncontent3\ncontent1\nread-only\n3";
    let found = cri.shell(&id, LOOPS)?;
    ensure!(found == wanted, "{found}");
    // A second container sees the same loop devices, as on any host, and can use further ones.
    let other = cri.run(&pod, privileged(container("other", &image, &["sleep", "1000"])))?;
    let used = cri.shell(&other, "losetup -a | wc -l; losetup -f")?;
    ensure!(used == "3\n/dev/loop3", "{used}");
    // Mounted files delay neither the exit of a container nor the removal of its disk.
    cri.stop(&id, 0)?;
    cri.remove(&id).context("a container with mounted files")?;
    let free = cri.shell(&other, "losetup -a | wc -l")?;
    ensure!(free == "0", "{free} loop devices are left");
    let plain = cri.run(&pod, container("plain", &image, &["sleep", "1000"]))?;
    let output = cri.exec(&plain, &["sh", "-c", "mknod /l c 10 237 && : < /l"])?;
    ensure!(output.code != 0 && output.stderr.contains("not permitted"), "{output:?}");
    let mut refused = container("dev", &image, &["true"]);
    refused.mounts = vec![mount("/dev".as_ref(), "/dev")];
    let error = cri.create(&pod, refused).err().context("/dev without privileges")?;
    ensure!(error.message().contains("privileged"), "{error}");
    node.finish()
}

/// Prints the error of each call, by number and first argument.
const CALLS: &str = "import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for nr, first in [(250, 0), (425, 0), (165, 0), (135, 0x40000), (41, 38), (41, 40), (56, 0x10000000), \
                  (435, 0), (450, 0), (462, 0), (999, 0)]:
    libc.syscall(nr, first, 0, 0, 0, 0, 0)
    print(ctypes.get_errno(), end=' ', flush=True)
";
/// keyctl, io_uring_setup, mount, personality, socket of AF_ALG and AF_VSOCK, clone of a user
/// namespace; then clone3 and calls that are newer than the profile.
const ERRORS: &str = "1 1 1 1 1 1 1 38 38 38 38";

/// Creates a tun interface through a device node that it creates, or prints why it cannot.
const TUN: &str = "import fcntl, os, stat, struct
os.makedirs('/dev/net', exist_ok=True)
if not os.path.exists('/dev/net/tun'):
    os.mknod('/dev/net/tun', stat.S_IFCHR | 0o666, os.makedev(10, 200))
tun = open('/dev/net/tun', 'r+b', buffering=0)
try:
    fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH', b'tun7', 0x1001))
    print(os.path.exists('/sys/class/net/tun7'))
except PermissionError:
    print('opened')
os.mknod('/dev/fuse', stat.S_IFCHR | 0o666, os.makedev(10, 229))
try:
    open('/dev/fuse', 'r+b', buffering=0)
except PermissionError:
    print('no fuse')
";

/// Creates (with a size, MiB) or opens a segment of shared memory.
const SHM: &str = "import os, sys, time
from multiprocessing import shared_memory
st = os.statvfs('/dev/shm')
print('size', st.f_blocks * st.f_frsize >> 20)
if len(sys.argv) > 1:
    m = shared_memory.SharedMemory('seg', create=True, size=int(sys.argv[1]) << 20)
    for i in range(0, m.size, 65536): m.buf[i] = 7
    m.buf[m.size - 1] = 9
    print('filled', flush=True)
    time.sleep(1000)
else:
    m = shared_memory.SharedMemory('seg')
    print('seen', m.size >> 20, m.buf[m.size - 1], flush=True)
    os._exit(0)
";

fn defaults() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("defaults")?;
    let cri = node.cri();
    seccomp_errors(cri, &pod, &image)?;
    tun(cri, &pod, &image)?;
    let folder = host::folder()?;
    let volume = Tmpfs::mount(&folder.path().join("shm"), "size=96m,mode=1777")?;
    for (name, size, mounts) in
        [("pods", 64, vec![]), ("volumes", 96, vec![mount(&folder.path().join("shm"), "/dev/shm")])]
    {
        let run = |role: &str, args: &[&str]| {
            let command = [&["python3", "-c", SHM][..], args].concat();
            let mut config = container(&format!("{name}-{role}"), &image, &command);
            config.mounts.clone_from(&mounts);
            cri.run(&pod, config)
        };
        let fill = (size - 20).to_string();
        let maker = run("maker", &[&fill])?;
        cri.logged(&maker, "filled")?;
        let finder = run("finder", &[])?;
        ensure!(cri.exited(&finder)?.exit_code == 0, "{:?}", cri.log(&finder)?);
        let lines: Vec<_> = cri.log(&finder)?.into_iter().map(|line| line.text).collect();
        ensure!(lines == [format!("size {size}"), format!("seen {fill} 9")], "{name}: {lines:?}");
        cri.stop(&maker, 0)?;
        cri.remove(&maker)?;
        cri.remove(&finder)?;
    }
    let segment = folder.path().join("shm/seg");
    ensure!(segment.metadata()?.len() == 76 << 20, "the volume's segment is not on the host");
    volume.unmount().context("a removed container holds the volume")?;
    node.finish()
}

/// Errors of the default profile in init and exec, with and without no_new_privs.
fn seccomp_errors(cri: &Cri, pod: &str, image: &str) -> Result<()> {
    let profile = v1::SecurityProfile::default();
    for no_new_privs in [false, true] {
        let line = "python3 -c \"$0\"; echo; exec sleep 1000";
        let name = format!("seccomp_errors-{no_new_privs}");
        let mut config = container(&name, image, &["sh", "-c", line, CALLS]);
        config.linux.get_or_insert_default().security_context =
            Some(v1::LinuxContainerSecurityContext {
                seccomp: Some(profile.clone()),
                no_new_privs,
                run_as_user: Some(v1::Int64Value { value: 1000 }),
                ..Default::default()
            });
        let id = cri.run(pod, config)?;
        let of_init = cri.logged(&id, "1 ")?;
        let of_exec = cri.exec(&id, &["python3", "-c", CALLS])?.stdout;
        ensure!(of_init.trim() == ERRORS && of_exec.trim() == ERRORS, "{of_init} / {of_exec}");
        let effective = cri.shell(&id, "grep -h CapPrm /proc/1/status /proc/self/status")?;
        let none = "CapPrm:\t0000000000000000";
        ensure!(effective == format!("{none}\n{none}"), "capabilities are left: {effective}");
        cri.stop(&id, 0)?;
        cri.remove(&id)?;
    }
    Ok(())
}

fn tun(cri: &Cri, pod: &str, image: &str) -> Result<()> {
    let own = mount("/dev/net/tun".as_ref(), "/dev/net/tun");
    for (name, admin, mounts, wanted) in [
        ("client", true, vec![], "True\nno fuse"),
        ("mounted", true, vec![own], "True\nno fuse"),
        ("plain", false, vec![], "opened\nno fuse"),
    ] {
        let mut config = container(name, image, &["sleep", "1000"]);
        config.mounts = mounts;
        config.linux.get_or_insert_default().security_context =
            Some(v1::LinuxContainerSecurityContext {
                capabilities: admin.then(|| v1::Capability {
                    add_capabilities: vec!["NET_ADMIN".into()],
                    ..Default::default()
                }),
                ..Default::default()
            });
        let id = cri.run(pod, config)?;
        let found = cri.exec_within(&id, &["python3", "-c", TUN], 30)?;
        ensure!(found.code == 0 && found.stdout.trim() == wanted, "{name}: {found:?}");
        cri.stop(&id, 0)?;
        cri.remove(&id)?;
    }
    Ok(())
}
