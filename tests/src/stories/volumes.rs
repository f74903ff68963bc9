//! Volumes: directories and files of the host, ConfigMaps, images.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Story;
use crate::client::{container, mount};
use crate::host::{self, Tmpfs};
use crate::node::{Node, registry};
use crate::{images, wait};

pub const STORIES: &[Story] = &[
    ("a directory of the host is shared both ways with POSIX semantics", posix),
    ("read-only, recursive read-only, single files and sub-paths are mounted as requested", kinds),
    (
        "a ConfigMap is updated, with inotify events, and a termination message is returned",
        config_map,
    ),
    ("an image volume is a whole image or a directory of it", image_volume),
    ("a VOLUME of the image is writable below a read-only root", volume_of_image),
    ("later mounts of the host appear only in volumes with propagation", propagation),
    ("postgres keeps its data on a volume across killed daemons and new containers", postgres),
    ("a pod survives its file server, and further volumes fail with the reason", server_killed),
];

fn read_only(mount: v1::Mount) -> v1::Mount {
    v1::Mount { readonly: true, ..mount }
}

fn with_mounts(config: v1::ContainerConfig, mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig { mounts, ..config }
}

fn posix() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("posix")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let path = |name: &str| folder.path().join(name);
    fs::write(path("before"), "from the host\n")?;
    let config = container("c", &image, &["sleep", "1000"]);
    let id = cri.run(&pod, with_mounts(config, vec![mount(folder.path(), "/data")]))?;
    ensure!(cri.shell(&id, "cat /data/before")? == "from the host", "what was there before");
    let program = include_str!("volumes/posix.py");
    let output = cri.exec(&id, &["python3", "-c", program, "/data"])?;
    ensure!(output.stdout == "passed\n", "{output:?}");
    let found = fs::metadata(path("linked"))?;
    ensure!((found.uid(), found.gid(), found.nlink()) == (1234, 2345, 2), "{found:?}");
    ensure!(fs::read_link(path("pointer"))? == Path::new("old"), "a link's target");
    let sparse = fs::metadata(path("sparse"))?;
    ensure!(sparse.len() == 64 << 20 && sparse.blocks() < 2048, "{sparse:?}");
    ensure!(fs::read(path("mapped"))?[4096..4101] == *b"child", "a mapping's bytes");
    for text in ["one", "another"] {
        fs::write(path("after"), text)?;
        wait::until("the guest sees what the host writes", Duration::from_secs(10), || {
            let output = cri.exec(&id, &["cat", "/data/after"])?;
            Ok((output.stdout == text).then_some(()))
        })?;
    }
    cri.remove(&id)?;
    ensure!(path("many/299").exists(), "the volume was removed with its container");
    node.finish()
}

fn kinds() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("kinds")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let path = |name: &str| folder.path().join(name);
    let nested = Tmpfs::mount(&path("nested"), "size=1m")?;
    fs::write(path("nested/inside"), "deep\n")?;
    fs::create_dir_all(path("sub/path"))?;
    fs::write(path("single"), "one\n")?;
    let recursive =
        v1::Mount { recursive_read_only: true, ..read_only(mount(folder.path(), "/all")) };
    let mounts = vec![
        mount(folder.path(), "/rw"),
        read_only(mount(folder.path(), "/ro")),
        recursive,
        mount(&path("single"), "/etc/single"),
        mount(&path("sub/path"), "/sub"),
        mount(&path("made/for/me"), "/made"),
    ];
    let config = container("c", &image, &["sleep", "1000"]);
    let id = cri.run(&pod, with_mounts(config, mounts))?;
    for top in ["/rw", "/ro", "/all"] {
        let text = cri.shell(&id, &format!("cat {top}/nested/inside {top}/single"))?;
        ensure!(text == "deep\none", "{top}: {text}");
    }
    cri.shell(&id, "touch /rw/a /rw/nested/a /sub/a /made/a && echo two > /etc/single")?;
    ensure!(
        cri.exec(&id, &["touch", "/ro/nested/b"])?.code == 0,
        "read-only is recursive, unlike with runc"
    );
    for place in ["/ro/x", "/all/x", "/all/nested/x"] {
        let output = cri.exec(&id, &["touch", place])?;
        ensure!(output.code != 0 && output.stderr.contains("Read-only"), "{place}: {output:?}");
    }
    for name in ["a", "nested/a", "nested/b", "sub/path/a", "made/for/me/a"] {
        ensure!(path(name).exists(), "{name} is not on the host");
    }
    ensure!(fs::read_to_string(path("single"))? == "two\n", "a single file");
    cri.remove(&id)?;
    nested.unmount().context("a removed container holds a mount of the host")?;
    node.finish()
}

/// Updates a directory as a kubelet's AtomicWriter does.
fn update(folder: &Path, round: u32, color: &str) -> Result<()> {
    let name = format!("..2025_{round}");
    fs::create_dir(folder.join(&name))?;
    fs::write(folder.join(&name).join("color"), color)?;
    symlink(&name, folder.join("..data_tmp"))?;
    fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
    match round {
        0 => symlink("..data/color", folder.join("color"))?,
        _ => fs::remove_dir_all(folder.join(format!("..2025_{}", round - 1)))?,
    }
    Ok(())
}

fn config_map() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("config")?;
    let folder = host::folder()?;
    let (config, words) = (folder.path().join("config"), folder.path().join("last-words"));
    fs::create_dir(&config)?;
    fs::write(&words, "")?;
    update(&config, 0, "red")?;
    let program = include_str!("volumes/watch.py");
    let mounts = vec![read_only(mount(&config, "/config")), mount(&words, "/dev/termination-log")];
    let config_of = with_mounts(container("c", &image, &["python3", "-c", program]), mounts);
    let id = node.cri().run(&pod, config_of)?;
    ensure!(node.cri().logged(&id, "at first")? == "at first red", "{:?}", node.cri().log(&id)?);
    update(&config, 1, "green")?;
    ensure!(node.cri().logged(&id, "then")? == "then green", "{:?}", node.cri().log(&id)?);
    // A change while the daemon is down is applied at its next start.
    node.kill_daemon()?;
    update(&config, 2, "blue")?;
    node.start_daemon()?;
    ensure!(node.cri().exited(&id)?.exit_code == 5, "{:?}", node.cri().log(&id)?);
    node.cri().logged(&id, "then blue")?;
    ensure!(fs::read_to_string(&words)? == "seen enough", "its last words are lost");
    node.finish()
}

fn image_volume() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("image")?;
    let cri = node.cri();
    let volume = |at: &str, sub_path: &str| v1::Mount {
        image: Some(v1::ImageSpec { image: image.clone(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        container_path: at.into(),
        readonly: true,
        ..Default::default()
    };
    let config = container("c", &image, &["sleep", "1000"]);
    let mounts = vec![volume("/whole", ""), volume("/part", "etc")];
    let id = cri.run(&pod, with_mounts(config, mounts))?;
    cri.shell(&id, "cmp /whole/bin/busybox /bin/busybox && grep -q root /part/passwd")?;
    for place in ["/whole/x", "/part/x"] {
        let output = cri.exec(&id, &["touch", place])?;
        ensure!(output.stderr.contains("Read-only"), "{place}: {output:?}");
    }
    let config = container("missing", &image, &["true"]);
    let error = cri.run(&pod, with_mounts(config, vec![volume("/x", "no/such")])).err();
    let error = format!("{:#}", error.context("a folder that the image has not was mounted")?);
    ensure!(error.contains("no/such"), "{error}");
    node.finish()
}

fn volume_of_image() -> Result<()> {
    let node = Node::start()?;
    let folder = tempfile::tempdir()?;
    let files = [("data/file", "image\n"), ("taken/file", "image\n")];
    let volumes = ["/data", "/new", "/taken"];
    let layout = images::with_volumes("busybox", folder.path(), &files, &volumes)?;
    let image = registry().push(&layout, "volumes:latest")?;
    node.cri().pull(&image)?;
    let pod = node.pod("volume-of-image")?;
    let cri = node.cri();
    let mine = host::folder()?;
    let run = |attempt: u32| {
        let mut config = container("c", &image, &["sleep", "1000"]);
        config.metadata = Some(v1::ContainerMetadata { name: "c".into(), attempt });
        config.log_path = format!("c/{attempt}.log");
        let context =
            v1::LinuxContainerSecurityContext { readonly_rootfs: true, ..Default::default() };
        config.linux = Some(v1::LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        });
        cri.run(&pod, with_mounts(config, vec![mount(mine.path(), "/taken")]))
    };
    let id = run(0)?;
    let write = cri.exec(&id, &["touch", "/x"])?;
    ensure!(write.code != 0 && write.stderr.contains("Read-only"), "{write:?}");
    cri.shell(&id, "grep image /data/file && echo own >/data/file && touch /new/x /taken/x")?;
    cri.shell(&id, "dd if=/dev/zero of=/data/big bs=1M count=8 && sync")?;
    ensure!(mine.path().join("x").exists() && !mine.path().join("file").exists(), "/taken");
    let limit = Duration::from_secs(30);
    wait::until("what is written counts as the container's", limit, || {
        let request = v1::ContainerStatsRequest { container_id: id.clone() };
        let mut client = cri.runtime.clone();
        let reply = cri.block_on(async move { client.container_stats(request).await })?;
        let layer = reply.into_inner().stats.and_then(|stats| stats.writable_layer);
        let used = layer.and_then(|layer| layer.used_bytes);
        Ok(used.is_some_and(|used| used.value >= 8 << 20).then_some(()))
    })?;
    cri.stop(&id, 0)?;
    cri.remove(&id)?;
    // It is removed with its container.
    let id = run(1)?;
    cri.shell(&id, "grep image /data/file && ! test -e /new/x && test -e /taken/x")?;
    node.finish()
}

fn propagation() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("propagation")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let top = folder.path().join("top");
    let _top = Tmpfs::shared(&top)?;
    fs::create_dir(top.join("later"))?;
    let follows = v1::Mount {
        propagation: v1::MountPropagation::PropagationHostToContainer as i32,
        ..mount(&top, "/follows")
    };
    let config = container("c", &image, &["sleep", "1000"]);
    let id = cri.run(&pod, with_mounts(config, vec![follows, mount(&top, "/private")]))?;
    let later = Tmpfs::mount(&top.join("later"), "size=1m")?;
    fs::write(top.join("later/file"), "here\n")?;
    let limit = Duration::from_secs(10);
    wait::until("a later mount appears", limit, || {
        Ok((cri.exec(&id, &["cat", "/follows/later/file"])?.stdout == "here\n").then_some(()))
    })?;
    let private = cri.shell(&id, "ls /private/later")?;
    ensure!(private.is_empty(), "a later mount appears in a private volume: {private}");
    // Can be unmounted without MNT_DETACH while the guest has a file of it open.
    cri.shell(&id, "sleep 1000 </follows/later/file >/dev/null 2>&1 &")?;
    later.unmount()?;
    wait::until("it goes again", limit, || {
        Ok(cri.shell(&id, "ls /follows/later")?.is_empty().then_some(()))
    })?;
    let again = Tmpfs::mount(&top.join("later"), "size=1m")?;
    fs::write(top.join("later/file"), "again\n")?;
    wait::until("another one takes its place", limit, || {
        Ok((cri.exec(&id, &["cat", "/follows/later/file"])?.stdout == "again\n").then_some(()))
    })?;
    again.unmount()?;
    let both = v1::Mount {
        propagation: v1::MountPropagation::PropagationBidirectional as i32,
        ..mount(&top, "/both")
    };
    let config = with_mounts(container("both", &image, &["true"]), vec![both]);
    let status = cri.create(&pod, config).unwrap_err();
    ensure!(status.message().contains("PROPAGATION_BIDIRECTIONAL"), "{status}");
    node.finish()
}

fn postgres() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("postgres")?;
    let pod = node.pod("postgres")?;
    let folder = host::folder()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
    // A copy of the image's database cluster: initdb takes long in a nested VM.
    let script = "test -e $PGDATA || cp -a /var/lib/postgresql/data $PGDATA; exec start-postgres";
    let config_of = |attempt: u32| {
        let mut config = container("db", &image, &["sh", "-c", script]);
        config.metadata = Some(v1::ContainerMetadata { name: "db".into(), attempt });
        config.log_path = format!("db/{attempt}.log");
        config.envs = vec![v1::KeyValue { key: "PGDATA".into(), value: "/volume/data".into() }];
        with_mounts(config, vec![mount(folder.path(), "/volume")])
    };
    let ready = |node: &Node, id: &str| {
        // The thousand files of the cluster are copied first.
        let ready = wait::until("postgres answers", Duration::from_secs(300), || {
            Ok((node.cri().exec(id, &["pg_isready", "-q"])?.code == 0).then_some(()))
        });
        ready.with_context(|| format!("{:?}", node.cri().log(id)))
    };
    let sql = |node: &Node, id: &str, words: &str| -> Result<String> {
        let output = node.cri().exec(id, &["psql", "-U", "postgres", "-qtAc", words])?;
        ensure!(output.code == 0, "{words}: {output:?}");
        Ok(output.stdout.trim().to_owned())
    };
    let first = node.cri().run(&pod, config_of(0))?;
    ready(&node, &first)?;
    sql(&node, &first, "create table t (n int); insert into t values (1)")?;
    node.kill_daemon()?;
    node.start_daemon()?;
    sql(&node, &first, "insert into t values (2)")?;
    node.cri().stop(&first, 30)?;
    let status = node.cri().exited(&first)?;
    ensure!(status.exit_code == 0, "{status:?} {:?}", node.cri().log(&first)?);
    node.cri().remove(&first)?;
    ensure!(folder.path().join("data/PG_VERSION").exists(), "nothing is on the host");
    let second = node.cri().run(&pod, config_of(1))?;
    ready(&node, &second)?;
    let rows = sql(&node, &second, "select string_agg(n::text, ' ' order by n) from t")?;
    ensure!(rows == "1 2", "{rows}");
    node.finish()
}

/// Processes of the pod's file server: number, name and state (proc(5), stat).
fn file_servers(vmm: i32) -> Result<Vec<(i32, String)>> {
    let group = fs::read_to_string(format!("/proc/{vmm}/cgroup"))?;
    let group = group.trim().rsplit(':').next().unwrap_or_default().trim_start_matches('/');
    let all = fs::read_to_string(Path::new("/sys/fs/cgroup").join(group).join("cgroup.procs"))?;
    let mut servers = Vec::new();
    for pid in all.lines().map(str::parse) {
        let pid: i32 = pid?;
        // It may have exited meanwhile.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let words: Vec<&str> = stat.split(' ').take(3).collect();
        if words.contains(&"(nacelle-fs)") && !words.contains(&"Z") {
            servers.push((pid, words.join(" ")));
        }
    }
    Ok(servers)
}

fn server_killed() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("server")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let config_of = |name: &str| {
        let config = container(name, &image, &["sleep", "1000"]);
        with_mounts(config, vec![mount(folder.path(), "/data")])
    };
    let id = cri.run(&pod, config_of("c"))?;
    cri.shell(&id, "echo kept > /data/file && sync")?;
    let vmm = node.vmm_pid(&pod)?;
    let servers = file_servers(vmm)?;
    ensure!(!servers.is_empty(), "no file server is in the pod's cgroup");
    for (pid, _) in &servers {
        // One may have exited with the other.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    let result = wait::until("the servers are result", Duration::from_secs(10), || {
        Ok(file_servers(vmm)?.is_empty().then_some(()))
    });
    result.with_context(|| format!("of {servers:?}: {:?}", file_servers(vmm)))?;
    ensure!(cri.shell(&id, "echo alive")? == "alive", "the container is affected");
    let read = cri.exec_within(&id, &["ls", "/data"], 20)?;
    ensure!(read.code != 0, "a volume without its server answers: {read:?}");
    let error = cri.run(&pod, config_of("late")).err().context("a share without a server")?;
    ensure!(format!("{error:#}").contains("file server has ended"), "{error:#}");
    let fine = cri.run(&pod, container("fine", &image, &["true"]))?;
    ensure!(cri.exited(&fine)?.exit_code == 0, "the pod takes no containers any more");
    ensure!(fs::read_to_string(folder.path().join("file"))? == "kept\n", "the host's own file");
    node.finish()
}
