//! Volumes: the share (a folder here, a virtio-fs device in a guest), images, propagation, write
//! protection, and where in a container they go.
//!
//! Assumes what `containers.rs` does.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use agent_api::stdio::Kind;
use agent_api::v1;
use common::{Guest, guest, spec};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;

fn volume(source: v1::VolumeSource, id: &str, destination: &str) -> v1::VolumeMount {
    v1::VolumeMount {
        volume_id: id.into(),
        destination: destination.into(),
        source: source as i32,
        ..Default::default()
    }
}

fn share(id: &str, destination: &str) -> v1::VolumeMount {
    volume(v1::VolumeSource::Share, id, destination)
}

fn write(path: impl AsRef<Path>, text: &str) {
    let path = path.as_ref();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A specification whose process may mount.
fn mounting(script: &str) -> serde_json::Value {
    let all = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"];
    let sets = json!({"bounding": all, "effective": all, "permitted": all});
    spec(script, json!({"process": {"capabilities": sets}}))
}

async fn run_with(guest: &mut Guest, script: &str, volumes: Vec<v1::VolumeMount>) -> String {
    let mut request = guest.request("c", &mounting(script));
    request.volumes = volumes;
    let (output, _) = guest.run(request).await;
    guest.remove("c").await.unwrap();
    output
}

async fn refused(guest: &mut Guest, volume: v1::VolumeMount) -> tonic::Status {
    let mut request = guest.request("c", &spec("true", json!({})));
    request.volumes = vec![volume];
    guest.client.create_container(request).await.unwrap_err()
}

#[tokio::test]
async fn entries_of_the_share_are_folders_files_and_sub_paths() {
    let Some(mut guest) = guest().await else { return };
    let shares = guest.dir.path().join("shares");
    write(shares.join("dir/sub/deep/file"), "deep\n");
    write(shares.join("single"), "single\n");
    std::os::unix::fs::symlink("sub/deep", shares.join("dir/link")).unwrap();
    std::os::unix::fs::symlink("../../root", shares.join("dir/out")).unwrap();
    std::fs::create_dir(shares.join("dir/sub/mounted")).unwrap();
    let mut read_only = share("dir", "/ro");
    read_only.read_only = true;
    let mut sub = share("dir", "/sub");
    sub.sub_path = "link".into();
    let volumes = vec![share("dir", "/data"), share("single", "/etc/single"), read_only, sub];
    let script = "cat /data/sub/deep/file /etc/single /sub/file; echo new > /data/new; \
                  touch /ro/x 2>&1; mkfifo /data/pipe; ls -l /data/pipe | cut -c1";
    let output = run_with(&mut guest, script, volumes).await;
    assert_eq!(output, "deep\nsingle\ndeep\ntouch: /ro/x: Read-only file system\np\n");
    assert_eq!(std::fs::read_to_string(shares.join("dir/new")).unwrap(), "new\n");
    for (id, sub_path, code) in [
        ("nosuch", "", tonic::Code::NotFound),
        ("dir", "nosuch", tonic::Code::NotFound),
        ("single", "x", tonic::Code::NotFound),
        ("../root", "", tonic::Code::InvalidArgument),
        ("dir", "../../root", tonic::Code::InvalidArgument),
        ("dir", "out", tonic::Code::Internal),
    ] {
        let mut volume = share(id, "/data");
        volume.sub_path = sub_path.into();
        let error = refused(&mut guest, volume).await;
        assert_eq!(error.code(), code, "{id} {sub_path}: {error}");
    }
}

#[tokio::test]
async fn images_are_volumes_too_and_always_read_only() {
    let Some(mut guest) = guest().await else { return };
    let image = guest.dir.path().join("image");
    write(image.join("etc/passwd"), "image\n");
    write(image.join("bin/tool"), "#!/bin/sh\necho ran\n");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(image.join("bin/tool"), executable).unwrap();
    std::os::unix::fs::symlink("/etc", image.join("absolute")).unwrap();
    let id = format!("dir:{}", image.display());
    let of = |sub_path: &str, destination: &str| {
        let mut volume = volume(v1::VolumeSource::Image, &id, destination);
        volume.sub_path = sub_path.into();
        volume
    };
    let volumes = vec![of("", "/i"), of("etc", "/e"), of("etc/passwd", "/f"), of("absolute", "/a")];
    let script = "cat /i/etc/passwd /e/passwd /f /a/passwd; /i/bin/tool; touch /i/x 2>&1";
    let output = run_with(&mut guest, script, volumes).await;
    assert_eq!(output, "image\nimage\nimage\nimage\nran\ntouch: /i/x: Read-only file system\n");
    let error = refused(&mut guest, of("not-existing", "/i")).await;
    assert_eq!(error.code(), tonic::Code::NotFound);
    assert!(error.message().contains("not-existing"), "{error}");
}

#[tokio::test]
async fn mounts_below_a_read_only_volume_are_writable_unless_that_is_recursive() {
    let Some(mut guest) = guest().await else { return };
    let shares = guest.dir.path().join("shares");
    std::fs::create_dir_all(shares.join("dir/tmpfs")).unwrap();
    // Over virtio-fs a mount of the host is a folder like others.
    std::fs::create_dir_all(shares.join("dir/folder/deep")).unwrap();
    std::os::unix::fs::symlink("tmpfs", shares.join("dir/link")).unwrap();
    // A mount inside the share, made by a container that shares its mounts.
    let mut maker = share("dir", "/data");
    maker.propagation = v1::Propagation::Shared as i32;
    let script = "mount -t tmpfs none /data/tmpfs && echo up && exec sleep 1000";
    let mut request = guest.request("maker", &mounting(script));
    request.volumes = vec![maker];
    guest.create(request).await;
    guest.start("maker").await.unwrap();
    guest.open(Kind::Stdout, "maker", "", 0).await.read_until("up").await;
    let script =
        "touch /ro/x /ro/folder/x 2>&1; touch /ro/tmpfs/x /ro/folder/deep/x && echo written";
    let mut read_only = share("dir", "/ro");
    read_only.read_only = true;
    read_only.submounts = ["tmpfs", "gone", "link", "folder/deep"].map(str::to_owned).to_vec();
    let output = run_with(&mut guest, script, vec![read_only.clone()]).await;
    let refused_there = "touch: /ro/x: Read-only file system\n\
                         touch: /ro/folder/x: Read-only file system\n";
    assert_eq!(output, format!("{refused_there}written\n"));
    assert!(shares.join("dir/folder/deep/x").exists());
    read_only.recursive_read_only = true;
    let output = run_with(&mut guest, "touch /ro/tmpfs/y 2>&1", vec![read_only.clone()]).await;
    assert_eq!(output, "touch: /ro/tmpfs/y: Read-only file system\n");
    let mut bad = read_only.clone();
    bad.read_only = false;
    assert_eq!(refused(&mut guest, bad).await.code(), tonic::Code::InvalidArgument);
    read_only.propagation = v1::Propagation::Slave as i32;
    assert_eq!(refused(&mut guest, read_only).await.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn mounts_reach_other_containers_as_their_propagation_says() {
    let Some(mut guest) = guest().await else { return };
    let shares = guest.dir.path().join("shares");
    std::fs::create_dir_all(shares.join("dir/mnt")).unwrap();
    let with = |propagation: v1::Propagation| {
        let mut volume = share("dir", "/data");
        volume.propagation = propagation as i32;
        volume
    };
    let wait = "until [ -e /data/go ]; do sleep 0.01; done; ls /data/mnt; echo end";
    for (id, propagation) in
        [("private", v1::Propagation::Private), ("slave", v1::Propagation::Slave)]
    {
        let mut request = guest.request(id, &mounting(wait));
        request.volumes = vec![with(propagation)];
        guest.create(request).await;
        guest.start(id).await.unwrap();
    }
    let script = "mount -t tmpfs none /data/mnt && touch /data/mnt/file && exec sleep 1000";
    let mut request = guest.request("shared", &mounting(script));
    request.volumes = vec![with(v1::Propagation::Shared)];
    guest.create(request).await;
    guest.start("shared").await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    write(shares.join("dir/go"), "");
    for (id, seen) in [("private", "end\n"), ("slave", "file\nend\n")] {
        let output = guest.open(Kind::Stdout, id, "", 0).await.read_all().await;
        assert_eq!(String::from_utf8(output).unwrap(), seen, "{id}");
    }
    // What a slave mounts stays with it.
    let script = "mount -t tmpfs none /data/mnt && touch /data/mnt/mine && ls /data/mnt";
    assert_eq!(run_with(&mut guest, script, vec![with(v1::Propagation::Slave)]).await, "mine\n");
    let output = run_with(&mut guest, "ls /data/mnt", vec![with(v1::Propagation::Private)]).await;
    assert_eq!(output, "file\n");
}

#[tokio::test]
async fn volumes_go_below_dev_below_each_other_and_behind_symlinks_of_the_image() {
    let Some(mut guest) = guest().await else { return };
    let shares = guest.dir.path().join("shares");
    for name in ["log", "outer/inner/placeholder", "run/file", "abs/file"] {
        write(shares.join(name), name);
    }
    let root = guest.dir.path().join("root");
    std::fs::create_dir_all(root.join("run")).unwrap();
    std::os::unix::fs::symlink("/run", root.join("var-run")).unwrap();
    std::os::unix::fs::symlink("../../../../etc", root.join("escape")).unwrap();
    let volumes = vec![
        share("run", "/var-run/app"),
        share("abs", "/escape/app"),
        volume(v1::VolumeSource::Written, "inner", "/outer/inner"),
        share("outer", "/outer"),
        share("log", "/dev/termination-log"),
        volume(v1::VolumeSource::Written, "mem", "/dev/shm"),
    ];
    let script = "echo done > /dev/termination-log; echo x > /outer/inner/y; ls /outer/inner; \
                  cat /run/app/file; cat /etc/app/file; echo s > /dev/shm/s; ls /dev/null";
    let output = run_with(&mut guest, script, volumes).await;
    assert_eq!(output, "y\nrun/fileabs/file/dev/null\n");
    assert_eq!(std::fs::read_to_string(shares.join("log")).unwrap(), "done\n");
    assert!(!Path::new("/etc/app").exists());
    let read = v1::ReadVolumeFileRequest {
        volume_id: "mem".into(),
        path: "s".into(),
        ..Default::default()
    };
    let content = guest.client.read_volume_file(read).await.unwrap().into_inner().content;
    assert_eq!(content, b"s\n");
    let error = refused(&mut guest, share("outer", "/dev")).await;
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn a_watcher_sees_the_swap_of_a_config_volume() {
    let Some(mut guest) = guest().await else { return };
    let write = |text: &str| v1::WriteVolumeRequest {
        volume_id: "cfg".into(),
        files: vec![v1::VolumeFile {
            path: "key".into(),
            mode: 0o100_644,
            content: text.into(),
            ..Default::default()
        }],
        swap: true,
        ..Default::default()
    };
    guest.client.write_volume(write("one")).await.unwrap();
    let mut request = guest.request("c", &spec("exec sleep 1000", json!({})));
    request.volumes = vec![volume(v1::VolumeSource::Written, "cfg", "/cfg")];
    request.volumes[0].read_only = true;
    guest.create(request).await;
    guest.start("c").await.unwrap();
    // The container's own view of it. Its init is the agent's youngest child.
    let agent = guest.agent_pid();
    let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    let init = children.split_whitespace().next_back().unwrap();
    let folder = format!("/proc/{init}/root/cfg");
    assert_eq!(std::fs::read_to_string(format!("{folder}/key")).unwrap(), "one");
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    inotify.add_watch(folder.as_str(), AddWatchFlags::IN_MOVED_TO).unwrap();
    guest.client.write_volume(write("two")).await.unwrap();
    let events = inotify.read_events().unwrap();
    let names: Vec<_> = events.iter().filter_map(|event| event.name.clone()).collect();
    assert_eq!(names, ["..data"]);
    assert_eq!(std::fs::read_to_string(format!("{folder}/key")).unwrap(), "two");
}

#[tokio::test]
async fn volumes_of_the_image_can_be_written_to_below_a_read_only_root() {
    let Some(mut guest) = guest().await else { return };
    let root = guest.dir.path().join("root");
    write(root.join("var/data/file"), "image\n");
    std::os::unix::fs::chown(root.join("var/data"), Some(1234), Some(5678)).unwrap();
    std::fs::set_permissions(root.join("var/data"), std::fs::Permissions::from_mode(0o2770))
        .unwrap();
    std::os::unix::fs::symlink("/../../../new/place", root.join("link")).unwrap();
    let mut request = guest.request(
        "c",
        &mounting(
            "stat -c '%u %g %a' /var/data; cat /var/data/file; echo own > /var/data/file; \
             cat /var/data/file; touch /x 2>&1; touch /link/x /none/x && ls /new/place; \
             mkdir /var/data/dir && mv /var/data/file /var/data/dir; ls /var/data; \
             cat /var/data/mounted/inner",
        ),
    );
    let inner = guest.dir.path().join("shares/inner");
    write(inner.join("inner"), "mounted\n");
    request.volumes = vec![share("inner", "/var/data/mounted")];
    let rootfs = request.rootfs.as_mut().unwrap();
    rootfs.read_only = true;
    rootfs.volumes = ["/var/data", "/none", "/link"].map(str::to_owned).to_vec();
    let (output, _) = guest.run(request).await;
    assert_eq!(
        output,
        "1234 5678 2770\nimage\nown\ntouch: /x: Read-only file system\nx\ndir\nmounted\n\
         mounted\n"
    );
    guest.remove("c").await.unwrap();
    // The image is as it was, and nothing is left of the container.
    assert_eq!(std::fs::read_to_string(root.join("var/data/file")).unwrap(), "image\n");
    let output = run_with(&mut guest, "cat /var/data/file; ls /none 2>&1", vec![]).await;
    assert_eq!(output, "image\nls: /none: No such file or directory\n");
    for bad in ["/", "/dev", "x/..", "../x"] {
        let mut request = guest.request("bad", &mounting("true"));
        request.rootfs.as_mut().unwrap().volumes = vec![bad.to_owned()];
        assert!(guest.client.create_container(request).await.is_err(), "{bad}");
    }
}
