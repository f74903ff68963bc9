//! The scratch disk: writable layers, emptyDirs, VOLUMEs of images. Here it is a directory without
//! quotas, in a guest a disk.
//!
//! Needs the same as `containers.rs`.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Instant;

use agent_api::v1;
use common::{Guest, TIMEOUT, guest, spec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

fn empty_dir(id: &str, destination: &str) -> v1::VolumeMount {
    v1::VolumeMount {
        volume_id: id.into(),
        destination: destination.into(),
        source: v1::VolumeSource::EmptyDir as i32,
        ..Default::default()
    }
}

/// A spec with capabilities of a privileged container.
fn privileged(script: &str) -> serde_json::Value {
    let all = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_CHOWN", "CAP_FOWNER"];
    let sets = json!({"bounding": all, "effective": all, "permitted": all});
    spec(script, json!({"process": {"capabilities": sets}}))
}

fn on_scratch(guest: &Guest, id: &str, script: &str) -> v1::CreateContainerRequest {
    let mut request = guest.request(id, &privileged(script));
    request.rootfs.as_mut().unwrap().scratch = Some(v1::ScratchLayer::default());
    request
}

async fn run(guest: &mut Guest, request: v1::CreateContainerRequest) -> String {
    let id = request.container_id.clone();
    let (output, _) = guest.run(request).await;
    guest.remove(&id).await.unwrap();
    output
}

async fn prepare(guest: &mut Guest, request: v1::PrepareEmptyDirRequest) -> bool {
    guest.client.prepare_empty_dir(request).await.unwrap().into_inner().ready
}

fn begin(id: &str) -> v1::PrepareEmptyDirRequest {
    v1::PrepareEmptyDirRequest {
        volume_id: id.into(),
        uid: 12,
        gid: 34,
        mode: 0o2775,
        begin: true,
        ..Default::default()
    }
}

fn file(path: &str, content: &str) -> v1::VolumeFile {
    v1::VolumeFile {
        path: path.into(),
        mode: 0o100_640,
        uid: 5,
        gid: 6,
        content: content.into(),
        append: false,
    }
}

#[tokio::test]
async fn containers_share_an_empty_dir_that_outlives_them() {
    let Some(mut guest) = guest().await else { return };
    let ready = v1::PrepareEmptyDirRequest { done: true, ..begin("cache") };
    // An incomplete attempt leaves nothing in the next one.
    let half = v1::PrepareEmptyDirRequest { files: vec![file("old", "x")], ..begin("cache") };
    assert!(!prepare(&mut guest, half).await);
    let mut early = on_scratch(&guest, "early", "true");
    early.volumes = vec![empty_dir("cache", "/c")];
    let refused = guest.client.create_container(early).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound, "{refused}");
    assert!(!prepare(&mut guest, begin("cache")).await);
    let more = v1::PrepareEmptyDirRequest {
        begin: false,
        files: vec![file("first/file", "copied\n")],
        ..begin("cache")
    };
    assert!(!prepare(&mut guest, more.clone()).await);
    assert!(prepare(&mut guest, v1::PrepareEmptyDirRequest { done: true, ..more }).await);
    // A complete emptyDir is not changed by further requests.
    let again = v1::PrepareEmptyDirRequest { files: vec![file("new", "x")], ..begin("cache") };
    assert!(prepare(&mut guest, again).await);
    let unknown = v1::PrepareEmptyDirRequest { begin: false, ..begin("other") };
    assert!(guest.client.prepare_empty_dir(unknown).await.is_err());
    assert!(
        prepare(&mut guest, v1::PrepareEmptyDirRequest { volume_id: "two".into(), ..ready }).await
    );

    let mut request = on_scratch(
        &guest,
        "writer",
        "stat -c '%u %g %a' /c /c/first/file; ls /c; cat /c/first/file; echo kept > /c/mine; \
         ln /c/mine /c/linked; mknod /c/pipe p; sleep 1000",
    );
    request.volumes = vec![empty_dir("cache", "/c"), empty_dir("two", "/two")];
    guest.create(request).await;
    guest.start("writer").await.unwrap();
    let mut stdout = guest.open(agent_api::stdio::Kind::Stdout, "writer", "", 0).await;
    let text = stdout.read_until("copied\n").await;
    assert_eq!(text, "12 34 2775\n5 6 640\nfirst\ncopied\n");
    let mut sub = empty_dir("cache", "/sub");
    (sub.sub_path, sub.uid, sub.gid, sub.mode) = ("made/here".into(), 7, 8, 0o2750);
    let script = "until test -p /c/pipe; do sleep 0.1; done; cat /c/mine; stat -c %h /c/linked; \
                  stat -c '%u %g %a' /sub /c/made; stat -c %d /c /sub | uniq | wc -l; \
                  stat -c %d /c /two | uniq | wc -l";
    let mut request = on_scratch(&guest, "reader", script);
    request.volumes = vec![empty_dir("cache", "/c"), sub, empty_dir("two", "/two")];
    let output = run(&mut guest, request).await;
    assert_eq!(output, "kept\n2\n7 8 2750\n7 8 2750\n1\n1\n");
    guest.remove("writer").await.unwrap();
    let mut request = on_scratch(&guest, "next", "cat /c/mine; touch /ro/x 2>&1");
    let read_only = v1::VolumeMount { read_only: true, ..empty_dir("cache", "/ro") };
    request.volumes = vec![empty_dir("cache", "/c"), read_only];
    assert_eq!(run(&mut guest, request).await, "kept\ntouch: /ro/x: Read-only file system\n");
}

#[tokio::test]
async fn an_empty_dir_in_memory_has_a_size_and_mounts_propagate_between_containers() {
    let Some(mut guest) = guest().await else { return };
    let memory = v1::PrepareEmptyDirRequest {
        memory: true,
        size_limit: 8 << 20,
        done: true,
        ..begin("memory")
    };
    assert!(prepare(&mut guest, memory).await);
    let script = "stat -f -c %T /m; df -k /m | tail -1 | awk '{print $2}'; stat -c '%u %g %a' /m; \
                  dd if=/dev/zero of=/m/big bs=1M count=9 2>&1 | grep -c 'No space'; ls -s /m | wc -l";
    let mut request = on_scratch(&guest, "c", script);
    request.volumes = vec![empty_dir("memory", "/m")];
    assert_eq!(run(&mut guest, request).await, "tmpfs\n8192\n12 34 2775\n1\n2\n");
    // A mount of one container propagates to a slave mount, not to a private one.
    let with = |propagation: v1::Propagation| v1::VolumeMount {
        propagation: propagation as i32,
        ..empty_dir("memory", "/m")
    };
    for (id, propagation) in
        [("slave", v1::Propagation::Slave), ("private", v1::Propagation::Private)]
    {
        let mut request =
            on_scratch(&guest, id, "until test -e /m/go; do sleep 0.1; done; ls /m/on");
        request.volumes = vec![with(propagation)];
        guest.create(request).await;
        guest.start(id).await.unwrap();
    }
    let script =
        "mkdir /m/on; mount -t tmpfs t /m/on && echo > /m/on/seen; touch /m/go; sleep 1000";
    let mut request = on_scratch(&guest, "shared", script);
    request.volumes = vec![with(v1::Propagation::Shared)];
    guest.create(request).await;
    guest.start("shared").await.unwrap();
    for (id, seen) in [("slave", "seen\n"), ("private", "")] {
        assert_eq!(guest.exit(id, "").await.code, 0);
        let output = guest.open(agent_api::stdio::Kind::Stdout, id, "", 0).await.read_all().await;
        assert_eq!(String::from_utf8(output).unwrap(), seen, "{id}");
    }
    for id in ["slave", "private", "shared"] {
        guest.remove(id).await.unwrap();
    }
}

/// Whether this machine's file system supports overlayfs on it; otherwise tested in a guest only.
fn overlayfs_works_on(dir: &Path) -> bool {
    let path = |name: &str| dir.join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    let [lower, upper, work] =
        ["lower", "upper", "work"].map(|name| path(name).display().to_string());
    let data = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let data = Some(data.as_str());
    let works = mount(Some("o"), &path("merged"), Some("overlay"), MsFlags::empty(), data).is_ok();
    let _ = umount2(&path("merged"), MntFlags::MNT_DETACH);
    works
}

#[tokio::test]
async fn volumes_of_an_image_are_copied_out_of_the_root_file_system() {
    let Some(mut guest) = guest().await else { return };
    let overlay = overlayfs_works_on(&guest.dir.path().join("try"));
    let root = guest.dir.path().join("root");
    let data = root.join("var/data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("sub/file"), "image\n").unwrap();
    fs::hard_link(data.join("sub/file"), data.join("same")).unwrap();
    std::os::unix::fs::symlink("sub/file", data.join("link")).unwrap();
    chown(data.join("sub"), Some(1234), Some(5678)).unwrap();
    fs::set_permissions(data.join("sub"), fs::Permissions::from_mode(0o2750)).unwrap();
    xattr::set(data.join("sub/file"), "trusted.note", b"kept").unwrap();
    let script = "stat -c '%u %g %a' /var/data/sub; cat /var/data/link; echo own > /var/data/same; \
                  cat /var/data/sub/file; stat -c %h /var/data/same; \
                  test $(stat -f -c %T /) = $(stat -f -c %T /var/data) && echo same; \
                  cd /var/data && mkdir l u w m && touch l/low && \
                  mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w m && echo > m/up && ls m";
    let mut request = on_scratch(&guest, "c", script);
    request.rootfs.as_mut().unwrap().volumes = vec!["/var/data".into()];
    let output = run(&mut guest, request).await;
    let stacked = if overlay { "low\nup\n" } else { "" };
    assert_eq!(output, format!("1234 5678 2750\nimage\nown\n2\n{stacked}"));
    if !overlay {
        println!("SKIP: overlayfs cannot be mounted on {}", guest.dir.path().display());
    }
    assert_eq!(fs::read_to_string(data.join("sub/file")).unwrap(), "image\n");
    // A volume beyond the copy limits stays in the root file system.
    let huge = fs::File::create(root.join("var/data/huge")).unwrap();
    let block = vec![1; 1 << 20];
    for n in 0..513 {
        std::os::unix::fs::FileExt::write_all_at(&huge, &block, n << 20).unwrap();
    }
    let script = "stat -c %s /var/data/huge; echo own > /var/data/same; cat /var/data/same";
    let mut request = on_scratch(&guest, "c", script);
    request.rootfs.as_mut().unwrap().volumes = vec!["/var/data".into()];
    assert_eq!(run(&mut guest, request).await, format!("{}\nown\n", 513 << 20));
    assert_eq!(fs::read_to_string(data.join("sub/file")).unwrap(), "image\n");
}

#[tokio::test]
async fn a_removed_containers_files_are_deleted_from_the_scratch_disk() {
    let Some(mut guest) = guest().await else { return };
    let disk = guest.dir.path().join("scratch");
    let script = "mkdir -p /d/d/d/d/d/d/d/d && echo x > /d/d/d/d/x && touch /d/$(seq -s _ 40)";
    let request = on_scratch(&guest, "c", script);
    guest.run(request).await;
    let layers = || fs::read_dir(disk.join("containers")).unwrap().count();
    assert_eq!(layers(), 1);
    guest.remove("c").await.unwrap();
    assert_eq!(layers(), 0);
    let begin = Instant::now();
    while fs::read_dir(disk.join("trash")).unwrap().count() > 0 {
        assert!(begin.elapsed() < TIMEOUT, "the trash is not deleted");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // Same for a container whose creation failed.
    let mut request = on_scratch(&guest, "bad", "true");
    request.volumes = vec![empty_dir("nosuch", "/x")];
    guest.client.create_container(request).await.unwrap_err();
    assert_eq!(layers(), 0);
}
