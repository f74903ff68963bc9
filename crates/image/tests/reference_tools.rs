//! Images built here compared with reference tools: Debian's docker-registry and skopeo on one
//! side, erofs-utils and the kernel's EROFS on the other. Needs root for ownership, devices and
//! mounts; reports what it skips.

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use image::{Config, Images};

fn missing(tools: &[&str]) -> bool {
    let paths = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let absent: Vec<_> = tools
        .iter()
        .filter(|tool| !paths.split(':').any(|dir| Path::new(dir).join(tool).is_file()))
        .collect();
    if !absent.is_empty() {
        println!("SKIP: {absent:?} not installed");
    }
    !absent.is_empty()
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIP: needs root to make devices and owners");
    }
    root
}

fn run(program: &str, args: &[&str]) -> String {
    let output =
        Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A tree with every file type and attribute that an image can contain.
fn fill(root: &Path) {
    let file = |path: &str, bytes: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let noise = |length: usize| -> Vec<u8> {
        let mut x = 0x9e37_79b9u32;
        (0..length)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                x as u8
            })
            .collect()
    };
    // Sizes around every limit of the data layouts.
    for size in [0, 1, 2031, 2032, 2033, 4095, 4096, 4097, 6128, 6129, 65536, 1 << 20, 3_000_001] {
        file(&format!("sizes/{size}"), &noise(size));
    }
    file("zeros/all", &vec![0; 300_000]);
    let mut mixed = noise(70_000);
    mixed.extend(vec![0; 200_000]);
    mixed.extend(noise(5_000));
    mixed.extend(vec![0; 8_192]);
    mixed.extend(noise(777));
    file("zeros/mixed", &mixed);
    let mut leading = vec![0; 131_072];
    leading.extend(b"end");
    file("zeros/leading", &leading);
    let sparse = fs::File::create(root.join("zeros/sparse")).unwrap();
    sparse.set_len(1100 << 20).unwrap();
    sparse.write_all_at(b"far away", 1090 << 20).unwrap();
    sparse.write_all_at(&noise(10_000), 123_456).unwrap();
    // More inline data than the writer's buffer, of odd lengths.
    for i in 0..3000 {
        file(&format!("many/{i:0>width$}", width = 1 + i % 200), &noise(501 + i % 2));
    }
    for i in 0..40 {
        file(&format!("middle/name-{i}-{}", "m".repeat(80)), b"x");
    }
    file(&format!("long/{}", "n".repeat(255)), b"long");
    file("odd/!before dot\n\u{fc}", b"odd");
    file("bin/tool", b"#!/bin/sh\n");
    fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::create_dir_all(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(root.join("bin/tool"), root.join("bin/again")).unwrap();
    fs::hard_link(root.join("bin/tool"), root.join("many/other")).unwrap();
    symlink("tool", root.join("bin/link")).unwrap();
    symlink(format!("/{}", "t".repeat(4000)), root.join("bin/long-link")).unwrap();
    run("mkfifo", &[text(&root.join("fifo"))]);
    run("mknod", &[text(&root.join("null")), "c", "1", "3"]);
    run("mknod", &[text(&root.join("disk")), "b", "259", "300"]);
    run("chown", &["1000:70000", text(&root.join("sizes/1"))]);
    run("touch", &["-d", "1969-12-31 23:59:58.25 UTC", text(&root.join("sizes/4096"))]);
    run("touch", &["-d", "2100-02-03 04:05:06.789 UTC", text(&root.join("sizes/4097"))]);
}

fn registry(dir: &Path) -> Option<(Server, u16)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
    let config = dir.join("registry.yml");
    let yaml = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        dir.join("registry").display()
    );
    fs::write(&config, yaml).unwrap();
    let child = Command::new("docker-registry")
        .args(["serve", text(&config)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let server = Server(child);
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "docker-registry does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    Some((server, port))
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes an OCI layout of the tree as one layer, packed by GNU tar with the given options.
fn layout(dir: &Path, tree: &Path, tar_options: &[&str]) -> PathBuf {
    let layer = dir.join("layer.tar");
    let mut args = vec!["--xattrs", "--xattrs-include=*", "-C", text(tree), "-cf", text(&layer)];
    args.splice(0..0, tar_options.iter().copied());
    args.push(".");
    run("tar", &args);
    let oci = dir.join("oci");
    fs::create_dir_all(oci.join("blobs/sha256")).unwrap();
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        fs::write(oci.join("blobs/sha256").join(&digest), bytes).unwrap();
        digest
    };
    let tar = fs::read(&layer).unwrap();
    let diff_id = sha256(&tar);
    run("gzip", &["-1", "-n", text(&layer)]);
    let gz = fs::read(dir.join("layer.tar.gz")).unwrap();
    let blob = put(&gz);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"User":"1000","Env":["A=b"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{diff_id}"]}}}}"#
    );
    let config_digest = put(config.as_bytes());
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:{blob}","size":{}}}]}}"#,
        config.len(),
        gz.len()
    );
    let manifest_digest = put(manifest.as_bytes());
    fs::write(oci.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest_digest}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#,
        manifest.len()
    );
    fs::write(oci.join("index.json"), index).unwrap();
    oci
}

fn sha256(bytes: &[u8]) -> String {
    image::Digest::of(bytes).hex()
}

/// Every file below `root`: type, mode, owner, size, times, links and content.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut paths = vec![root.to_owned()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let content = if kind.is_symlink() {
            fs::read_link(&path).unwrap_or_else(|e| panic!("{name:?}: {e}")).display().to_string()
        } else if kind.is_file() {
            format!(
                "{} {} {}",
                meta.size(),
                meta.nlink(),
                sha256(&fs::read(&path).unwrap_or_else(|e| panic!("{name:?}: {e}")))
            )
        } else if kind.is_char_device() || kind.is_block_device() {
            meta.rdev().to_string()
        } else {
            if kind.is_dir() {
                paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            String::new()
        };
        lines.push(format!(
            "{name:?} {:o} {}:{} {}.{:09} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
        ));
    }
    lines.sort();
    lines
}

fn same(expected: &[String], got: &[String]) {
    for (expected, got) in expected.iter().zip(got) {
        assert_eq!(expected, got);
    }
    assert_eq!(expected.len(), got.len());
}

async fn images(root: &Path) -> Images {
    Images::open(Config { root: root.into(), ..Config::default() }).await.unwrap()
}

fn mount(image: &Path, at: &Path) -> Option<Mounted> {
    fs::create_dir_all(at).unwrap();
    let output = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop", text(image), text(at)])
        .output()
        .ok()?;
    if !output.status.success() {
        println!("SKIP: cannot mount EROFS here: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(Mounted(at.into()))
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test]
async fn every_file_type_survives_tar_and_erofs() {
    if missing(&["fsck.erofs", "tar", "gzip", "getfattr"]) || !is_root() {
        return;
    }
    for options in
        [&["--format=pax", "--sparse"][..], &["--format=gnu", "--sparse"], &["--format=pax"]]
    {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fill(&tree);
        if options != ["--format=pax", "--sparse"] {
            // Larger than one block can map, so reading it takes time; tested once.
            fs::remove_file(tree.join("zeros/sparse")).unwrap();
        }
        let pax = options[0] == "--format=pax";
        if pax {
            set_xattr(&tree.join("bin/tool"), "user.note", b"hello");
            set_xattr(&tree.join("many"), "user.big", &[b'v'; 3000]);
        }
        let expected = describe(&tree);
        let images = images(&dir.path().join("store")).await;
        let id = images.import(&layout(dir.path(), &tree, options), None).await.unwrap()[0];
        let rootfs = images.image(&id.to_string()).unwrap().erofs_path;
        run("fsck.erofs", &[text(&rootfs)]);
        let Some(mounted) = mount(&rootfs, &dir.path().join("mnt")) else { continue };
        let got = describe(&mounted.0);
        if pax {
            same(&expected, &got);
            let value = run(
                "getfattr",
                &["--only-values", "-n", "user.note", text(&mounted.0.join("bin/tool"))],
            );
            assert_eq!(value, "hello");
            let value = run(
                "getfattr",
                &["--only-values", "-n", "user.big", text(&mounted.0.join("many"))],
            );
            assert_eq!(value.len(), 3000);
        } else {
            // GNU headers have whole seconds.
            let whole =
                |lines: &[String]| lines.iter().map(|l| without_fraction(l)).collect::<Vec<_>>();
            same(&whole(&expected), &whole(&got));
        }
        // Holes are kept.
        if options.contains(&"--sparse") {
            let sparse = fs::metadata(&rootfs).unwrap();
            assert!(sparse.size() < 64 << 20, "{} bytes", sparse.size());
        }
    }
}

/// A line of [`describe`] without the nanoseconds; times before the epoch round down either way.
fn without_fraction(line: &str) -> String {
    let (name, rest) = line.split_once("\" ").expect("names are quoted");
    let fields: Vec<_> = rest.splitn(4, ' ').collect();
    let seconds = fields[2].split('.').next().unwrap();
    format!("{name} {} {} {seconds} {}", fields[0], fields[1], fields[3])
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let value = String::from_utf8(value.to_vec()).unwrap();
    run("setfattr", &["-n", name, "-v", &value, text(path)]);
}

#[tokio::test]
async fn a_real_registry_serves_what_skopeo_pushed() {
    if missing(&["docker-registry", "skopeo", "fsck.erofs", "tar", "gzip"]) || !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fill(&tree);
    fs::remove_file(tree.join("zeros/sparse")).unwrap();
    let oci = layout(dir.path(), &tree, &["--format=pax", "--sparse"]);
    let Some((_server, port)) = registry(dir.path()) else {
        panic!("docker-registry does not run")
    };
    let source = format!("oci:{}:latest", text(&oci));
    let target = format!("docker://127.0.0.1:{port}/test/image:v1");
    run("skopeo", &["--insecure-policy", "copy", "--dest-tls-verify=false", &source, &target]);

    let images = images(&dir.path().join("store")).await;
    let name = format!("127.0.0.1:{port}/test/image:v1");
    let (progress, watch) = tokio::sync::watch::channel(image::Progress::default());
    let id = images.pull(&name, None, Some(progress)).await.unwrap();
    assert_eq!(watch.borrow().phase, image::Phase::Done);
    assert!(watch.borrow().layers.iter().all(|l| l.fetched == l.size && l.applied == l.size));
    let info = images.image(&name).unwrap();
    assert_eq!(info.repo_tags, std::slice::from_ref(&name));
    assert_eq!(info.user, "1000");
    run("fsck.erofs", &[text(&info.erofs_path)]);
    let by_digest = info.repo_digests[0].clone();
    assert_eq!(images.pull(&by_digest, None, None).await.unwrap(), id);

    // The same image imported from a file is identical.
    let other = tempfile::tempdir().unwrap();
    let again = self::images(other.path()).await;
    again.import(&oci, Some("other/name:1")).await.unwrap();
    let twin = again.image("other/name:1").unwrap();
    assert_eq!(twin.id, info.id);
    assert!(fs::read(twin.erofs_path).unwrap() == fs::read(info.erofs_path).unwrap());

    // A docker archive gives the same image.
    let archive = dir.path().join("docker.tar");
    let target = format!("docker-archive:{}:some/name:2", text(&archive));
    run("skopeo", &["--insecure-policy", "copy", &source, &target]);
    let third = tempfile::tempdir().unwrap();
    let third = self::images(third.path()).await;
    third.import(&archive, None).await.unwrap();
    let info = third.image("some/name:2").expect("named by the archive");
    run("fsck.erofs", &[text(&info.erofs_path)]);
}

#[tokio::test]
async fn real_images_equal_umocis_unpacked_ones() {
    let Ok(directory) = std::env::var("NACELLE_IMAGES") else {
        println!("SKIP: NACELLE_IMAGES does not name a directory of OCI layouts");
        return;
    };
    if missing(&["umoci", "fsck.erofs"]) || !is_root() {
        return;
    }
    for layout in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        let dir = tempfile::tempdir().unwrap();
        let images = images(&dir.path().join("store")).await;
        let id = images.import(&layout, Some("real/image:1")).await.unwrap()[0];
        let rootfs = images.image(&id.to_string()).unwrap().erofs_path;
        run("fsck.erofs", &[text(&rootfs)]);
        // umoci finds images only by a name in the index.
        let copy = dir.path().join("layout");
        run("cp", &["-rL", text(&layout), text(&copy)]);
        let index = fs::read_to_string(copy.join("index.json")).unwrap();
        let mut index: serde_json::Value = serde_json::from_str(&index).unwrap();
        index["manifests"][0]["annotations"] =
            serde_json::json!({"org.opencontainers.image.ref.name": "tag"});
        fs::write(copy.join("index.json"), index.to_string()).unwrap();
        let source = format!("{}:tag", text(&copy));
        let bundle = dir.path().join("bundle");
        let manifest = index["manifests"][0]["digest"].as_str().unwrap();
        let manifest = copy.join("blobs").join(manifest.replace(':', "/"));
        if fs::read_to_string(manifest).unwrap().contains("+zstd") {
            println!("SKIP: umoci cannot unpack {}, it is compressed with zstd", layout.display());
            continue;
        }
        run("umoci", &["unpack", "--image", &source, text(&bundle)]);
        let Some(mounted) = mount(&rootfs, &dir.path().join("mnt")) else { return };
        // umoci sets the root's time of change; the image has the time from its layer.
        let root = |line: &String| !line.starts_with("\"\" ");
        let [expected, got] = [&bundle.join("rootfs"), &mounted.0]
            .map(|path| describe(path).into_iter().filter(root).collect::<Vec<_>>());
        println!("{}: {} files", layout.display(), got.len());
        same(&expected, &got);
    }
}
