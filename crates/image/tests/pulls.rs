//! Pulls of all kinds of images: shared, cancelled and resumed pulls, artifacts, indexes.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use image::{Auth, Config, Digest, ErrorKind, Images};
use support::{MANIFEST, Registry, Response, assert_clean, config, layer, noise, open, reopen};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A registry whose large blobs stop after a megabyte unless a range is requested.
fn slow(big: &[u8]) -> (Registry, String) {
    let registry = Registry::scripted(|request, response| {
        let ranged = request.headers.contains_key("range");
        if request.path.contains("/blobs/") && response.body.len() > 100_000 && !ranged {
            return Response { stall: Some(1_000_000), ..response };
        }
        response
    });
    let id = registry.image(&[big.to_vec()]);
    (registry, id)
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Total bytes of partial blobs.
fn partial(root: &Path) -> u64 {
    let entries = std::fs::read_dir(root.join("content/ingest")).unwrap();
    entries.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test]
async fn a_cancelled_pull_is_resumed_by_the_next() {
    let big = layer("big", &noise(3_000_000));
    let (registry, id) = slow(&big);
    let dir = tempfile::tempdir().unwrap();
    let settings = Config { stall_timeout_seconds: 600, ..config(dir.path()) };
    let images = reopen(settings.clone()).await;
    let pull = {
        let (images, name) = (images.clone(), registry.name());
        tokio::spawn(async move { images.pull(&name, None, None).await })
    };
    wait_for("half of the layer", || partial(dir.path()) > 400_000).await;
    pull.abort();
    let _ = pull.await;
    // Also after a restart of the daemon.
    drop(images);
    let images = reopen(settings).await;
    let here = partial(dir.path());
    assert!(here > 400_000, "{here}");
    assert_eq!(images.pull(&registry.name(), None, None).await.unwrap().to_string(), id);
    let ranges: Vec<_> =
        registry.requests().iter().filter_map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [format!("bytes={here}-")]);
    images.remove(&id).await.unwrap();
    assert_clean(dir.path());
}

#[tokio::test]
async fn a_wrong_partial_blob_is_fetched_again() {
    let big = layer("big", &noise(500_000));
    let registry = Registry::new();
    let id = registry.image(std::slice::from_ref(&big));
    let dir = tempfile::tempdir().unwrap();
    let ingest = dir.path().join("content/ingest");
    std::fs::create_dir_all(&ingest).unwrap();
    // Wrong bytes, too many bytes, and the right number of wrong bytes.
    for length in [200_000, big.len() + 5000, big.len()] {
        std::fs::write(ingest.join(Digest::of(&big).hex()), vec![7; length]).unwrap();
        let images = open(dir.path()).await;
        assert_eq!(images.pull(&registry.name(), None, None).await.unwrap().to_string(), id);
        images.remove(&id).await.unwrap();
        assert_clean(dir.path());
    }
}

#[tokio::test]
async fn a_blob_begun_at_one_mirror_is_completed_at_another() {
    let big = layer("big", &noise(800_000));
    let dying = Registry::scripted(|request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            return Response {
                cut: Some(if request.headers.contains_key("range") { 0 } else { 300_000 }),
                ..response
            };
        }
        response
    });
    dying.image(std::slice::from_ref(&big));
    let upstream = Registry::new();
    upstream.image(std::slice::from_ref(&big));
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n",
        upstream.authority(),
        dying.authority()
    );
    let config_path = support::hosts(certs.path(), "reg.example", &toml);
    let images = Images::open(Config { config_path, ..config(dir.path()) }).await.unwrap();
    images.pull("reg.example/test/image:v1", None, None).await.unwrap();
    let requests = upstream.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].headers["range"], "bytes=300000-");
}

/// A manifest for these layers with a configuration of this type.
fn artifact(
    registry: &Registry,
    tag: &str,
    config_type: &str,
    media_type: &str,
    layers: &[Vec<u8>],
) -> String {
    let config = registry.blob(b"{}");
    let layers: Vec<_> = layers
        .iter()
        .map(|bytes| {
            let digest = registry.blob(bytes);
            format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{}}}"#, bytes.len())
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"application/x","config":{{"mediaType":"{config_type}","digest":"{config}","size":2}},"layers":[{}],"annotations":{{"org.example.whatever":"x"}},"x-unknown":{{}}}}"#,
        layers.join(",")
    );
    registry.manifest(tag, manifest.as_bytes(), MANIFEST)
}

#[tokio::test]
async fn artifacts_without_a_configuration_are_images_for_volumes() {
    let registry = Registry::new();
    let tar = "application/vnd.oci.image.layer.v1.tar";
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let mut ids = Vec::new();
    // Equal configurations, different images.
    for (tag, config_type) in [
        ("one", "application/vnd.oci.empty.v1+json"),
        ("two", "application/vnd.oci.image.config.v1+json"),
        ("three", "application/vnd.example.model.config"),
    ] {
        let manifest = artifact(&registry, tag, config_type, tar, &[layer(tag, tag.as_bytes())]);
        let name = format!("{}/test/image:{tag}", registry.authority());
        let id = images.pull(&name, None, None).await.unwrap().to_string();
        assert_eq!(id, manifest);
        let info = images.image(&name).unwrap();
        assert_eq!((info.id.as_str(), info.user.as_str()), (id.as_str(), ""));
        assert!(info.config.config().is_none() && info.chain_id().is_empty());
        assert_eq!(info.repo_tags, [name.as_str()]);
        let hold = images.hold(&name).unwrap();
        assert!(hold.erofs_path().is_file());
        assert!(images.hold_file(hold.erofs_path()).is_some());
        ids.push(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
    drop(images);
    let images = reopen(config(dir.path())).await;
    assert_eq!(images.images().len(), 3, "listed after a restart");
    for id in &ids {
        images.remove(id).await.unwrap();
    }
    assert_clean(dir.path());

    artifact(&registry, "chart", "application/x", "application/octet-stream", &[vec![1]]);
    let name = format!("{}/test/image:chart", registry.authority());
    let error = images.pull(&name, None, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadImage);
    assert!(error.to_string().contains("application/octet-stream"), "{error}");
}

#[tokio::test]
async fn an_artifact_can_be_imported_and_its_layers_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let blobs = dir.path().join("oci/blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest, bytes.len())
    };
    let tar = layer("file", b"content");
    let (layer_digest, size) = put(&tar);
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{}","size":2}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer_digest}","size":{size}}}]}}"#,
        Digest::of(b"{}")
    );
    let (manifest, size) = put(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{MANIFEST}","digest":"{manifest}","size":{size}}}]}}"#
    );
    std::fs::write(dir.path().join("oci/index.json"), index).unwrap();
    let images = open(&dir.path().join("store")).await;
    let layout = dir.path().join("oci");
    let ids = images.import(&layout, Some("volume:1")).await.unwrap();
    assert_eq!(ids, [manifest]);
    images.remove("volume:1").await.unwrap();
    let mut wrong = tar;
    wrong[600] ^= 1;
    std::fs::write(layout.join("blobs/sha256").join(layer_digest.hex()), wrong).unwrap();
    let error = images.import(&layout, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadImage, "{error}");
    assert_clean(&dir.path().join("store"));
}

#[tokio::test]
async fn indexes_nest_and_entries_need_no_platform() {
    let registry = Registry::new();
    let id = registry.image_as("plain", &[layer("a", b"x")], "");
    let manifest = registry.put_index("inner", &registry.digest_of("plain"), "");
    let outer =
        registry.put_index("v1", &manifest, r#","platform":{"os":"linux","architecture":"amd64"}"#);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    assert_eq!(images.pull(&registry.name(), None, None).await.unwrap().to_string(), id);
    let info = images.image(&registry.name()).unwrap();
    assert!(info.repo_digests[0].ends_with(&outer), "{:?}", info.repo_digests);
    // By digest it has no tag, even if one was requested.
    let by_digest = format!("{}/test/image:other@{outer}", registry.authority());
    images.remove(&id).await.unwrap();
    images.pull(&by_digest, None, None).await.unwrap();
    let info = images.image(&by_digest).unwrap();
    assert!(info.repo_tags.is_empty());
    assert_eq!(info.repo_digests, [format!("{}/test/image@{outer}", registry.authority())]);
    assert!(images.image(&registry.name()).is_none());

    let mut inner = registry.digest_of("plain");
    for depth in 0..6 {
        inner = registry.put_index(&format!("deep{depth}"), &inner, "");
    }
    let deep = format!("{}/test/image:deep5", registry.authority());
    let error = images.pull(&deep, None, None).await.unwrap_err();
    assert!(error.to_string().contains("index"), "{error}");
}

#[tokio::test]
async fn docker_manifests_and_compressed_layers_are_read() {
    use std::io::Write;
    let registry = Registry::new();
    let tars = [layer("a", b"1"), layer("b", b"2"), layer("c", b"3")];
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tars[0]).unwrap();
    let blobs = [
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.finish().unwrap()),
        ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::encode_all(&tars[1][..], 3).unwrap()),
        ("application/vnd.docker.image.rootfs.diff.tar", tars[2].clone()),
    ];
    let ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "docker_version": "1.0",
        "config": {"User": "web:web", "Healthcheck": {"Test": ["NONE"]}, "Labels": null},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    let config = config.to_string();
    let digest = registry.blob(config.as_bytes());
    let layers: Vec<_> = blobs
        .iter()
        .map(|(media_type, bytes)| {
            serde_json::json!({"mediaType": media_type, "digest": registry.blob(bytes), "size": bytes.len()})
        })
        .collect();
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": docker, "layers": layers,
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": config.len()},
    });
    registry.manifest("v1", manifest.to_string().as_bytes(), docker);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    let info = images.image(&registry.name()).unwrap();
    assert_eq!((info.id, info.user), (digest, "web:web".to_owned()));

    registry.manifest("v1", br#"{"schemaVersion":1,"name":"x","fsLayers":[]}"#, "");
    let error = images.pull(&registry.name(), None, None).await.unwrap_err().to_string();
    assert!(error.contains("schema 1"), "{error}");
    registry.manifest("v1", br#"{"schemaVersion":2,"manifests":[]}"#, INDEX);
    let error = images.pull(&registry.name(), None, None).await.unwrap_err().to_string();
    assert!(error.contains("linux/amd64"), "{error}");
}

#[tokio::test]
async fn pinned_images_are_reported_and_removed_on_request() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let other = registry.image_as("v2", &[layer("a", b"y")], "");
    let dir = tempfile::tempdir().unwrap();
    let pinned = vec![registry.name(), other.clone()];
    let images = Images::open(Config { pinned, ..config(dir.path()) }).await.unwrap();
    images.pull(&registry.name(), None, None).await.unwrap();
    let second = format!("{}/test/image:v2", registry.authority());
    images.pull(&second, None, None).await.unwrap();
    assert!(images.images().iter().all(|image| image.pinned));
    images.collect_garbage().await.unwrap();
    assert_eq!(images.images().len(), 2);
    images.untag(&registry.name()).await.unwrap();
    images.remove(&other).await.unwrap();
    assert!(images.image(&id).is_none() && images.images().is_empty());
    let broken = Config { pinned: vec!["NO NAME".into()], ..config(&dir.path().join("x")) };
    let error = Images::open(broken).await.unwrap_err();
    assert!(error.to_string().contains("NO NAME"), "{error}");
}

#[tokio::test]
async fn disk_usage_is_counted_in_memory() {
    use std::os::unix::fs::MetadataExt;
    fn walk(path: &Path, sum: &mut (u64, u64)) {
        for entry in std::fs::read_dir(path).unwrap().flatten() {
            let metadata = entry.metadata().unwrap();
            let name = entry.file_name().into_string().unwrap();
            if metadata.is_dir() {
                walk(&entry.path(), sum);
            }
            // Directories and files that exist without images too.
            if metadata.is_dir() && name.len() != 64 || name == "refs.json" {
                continue;
            }
            sum.0 += metadata.blocks() * 512;
            sum.1 += 1;
        }
    }
    let registry = Registry::new();
    registry.image(&[layer("a", &noise(500_000))]);
    registry.image_as("v2", &[layer("b", b"small")], "two");
    let dir = tempfile::tempdir().unwrap();
    for keep_layers in [false, true] {
        let settings = Config { keep_layers, ..config(dir.path()) };
        let images = reopen(settings).await;
        let check = |when: &str| {
            let info = images.fs_info();
            let mut sum = (0, 0);
            walk(&dir.path().join("content"), &mut sum);
            walk(&dir.path().join("images"), &mut sum);
            assert_eq!((info.used_bytes, info.inodes_used), sum, "{when}");
            sum
        };
        assert_eq!(check("empty"), (0, 0));
        images.pull(&registry.name(), None, None).await.unwrap();
        let one = check("one");
        images.pull(&format!("{}/test/image:v2", registry.authority()), None, None).await.unwrap();
        assert!(check("two") > one);
        let sizes: u64 = images.images().iter().map(|image| image.size).sum();
        assert!(sizes <= check("sizes").0);
        drop(images);
        let images = reopen(config(dir.path())).await;
        let mut sum = (0, 0);
        walk(&dir.path().join("content"), &mut sum);
        walk(&dir.path().join("images"), &mut sum);
        let info = images.fs_info();
        assert_eq!((info.used_bytes, info.inodes_used), sum, "after a restart");
        for image in images.images() {
            images.remove(&image.id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_image_is_gone_after_each_of_many_removals_at_once() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    for _ in 0..5 {
        images.pull(&registry.name(), None, None).await.unwrap();
        let removals = (0..8).map(|_| {
            let (images, id) = (images.clone(), id.clone());
            tokio::spawn(async move {
                images.remove(&id).await.unwrap();
                assert!(images.image(&id).is_none());
            })
        });
        for removal in removals.collect::<Vec<_>>() {
            removal.await.unwrap();
        }
        assert_clean(dir.path());
    }
    images.remove(&"0".repeat(64)).await.unwrap();
    assert_eq!(
        images.pull(&"0".repeat(64), None, None).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
}

/// A registry whose token service supports one grant only.
fn one_way(method: &'static str, refuses_with: u16) -> Registry {
    let port = std::sync::Arc::new(AtomicUsize::new(0));
    let known = std::sync::Arc::clone(&port);
    let registry = Registry::scripted(move |request, response| {
        if request.path.starts_with("/token") {
            return match request.method == method {
                true => Response::ok(r#"{"access_token":"secret"}"#),
                false => Response::status(refuses_with),
            };
        }
        if request.headers.get("authorization").map(String::as_str) == Some("Bearer secret") {
            return response;
        }
        let realm = format!("http://127.0.0.1:{}/token", known.load(Ordering::Relaxed));
        Response::status(401)
            .header("WWW-Authenticate", "Basic realm=\"x\"")
            .header("WWW-Authenticate", format!("Bearer realm=\"{realm}\",service=\"s\""))
    });
    port.store(registry.port.into(), Ordering::Relaxed);
    registry.image(&[layer("a", b"x")]);
    registry
}

#[tokio::test]
async fn token_services_may_support_one_grant_only() {
    let identity = Auth { identity_token: "me".into(), ..Auth::default() };
    let basic = Auth { username: "u".into(), password: "p".into(), ..Auth::default() };
    for status in [400, 401, 404, 405] {
        let registry = one_way("GET", status);
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path()).await;
        images.pull(&registry.name(), Some(identity.clone()), None).await.unwrap();
        let requests: Vec<_> =
            registry.requests().into_iter().filter(|r| r.path.starts_with("/token")).collect();
        assert_eq!(requests[0].method, "POST");
        // An empty user name and the token.
        assert_eq!(requests[1].headers["authorization"], "Basic Om1l");
    }
    for status in [404, 405] {
        let registry = one_way("POST", status);
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path()).await;
        images.pull(&registry.name(), Some(basic.clone()), None).await.unwrap();
        let requests: Vec<_> =
            registry.requests().into_iter().filter(|r| r.path.starts_with("/token")).collect();
        assert_eq!(requests[0].headers["authorization"], "Basic dTpw");
        assert!(requests[1].body.contains("grant_type=password&"), "{}", requests[1].body);
        assert!(requests[1].body.contains("username=u&password=p"), "{}", requests[1].body);
    }
    let registry = one_way("NONE", 401);
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path()).await.pull(&registry.name(), Some(basic), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_write_does_not_block_readers() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let second = registry.image_as("v2", &[layer("b", b"y")], "B=1");
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    // Opening the FIFO for writing blocks until it has a reader, then the write fails: a disk that
    // hangs and then reports an error.
    let pipe = dir.path().join("images/refs.partial");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let v2 = registry.name().replace(":v1", ":v2");
    let pull = {
        let (images, v2) = (images.clone(), v2.clone());
        tokio::spawn(async move { images.pull(&v2, None, None).await })
    };
    wait_for("the second image", || images.image(&second).is_some()).await;
    let reads = {
        let (images, name, id) = (images.clone(), registry.name(), id.clone());
        tokio::task::spawn_blocking(move || {
            assert_eq!(images.image(&name).unwrap().id, id);
            assert!(images.images().iter().any(|image| image.id == id));
            let hold = images.hold(&id).unwrap();
            assert!(images.hold_file(hold.erofs_path()).is_some());
            assert!(images.fs_info().used_bytes > 0);
        })
    };
    let read = tokio::time::timeout(Duration::from_secs(20), reads).await;
    let blocked = !pull.is_finished();
    // Also if the test fails: a blocked thread would prevent its end.
    let reader = tokio::task::spawn_blocking(move || std::fs::File::open(pipe).map(drop));
    let pulled = pull.await.unwrap();
    reader.await.unwrap().unwrap();
    read.expect("readers do not wait for a writer").unwrap();
    assert!(blocked, "nothing was blocked: {pulled:?}");
    assert_eq!(pulled.unwrap_err().kind(), ErrorKind::Internal);
    assert!(images.image(&v2).is_none());
    images.pull(&v2, None, None).await.unwrap();
    assert_eq!(images.image(&v2).unwrap().id, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_concurrent_hold_and_removal_are_consistent() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    for round in 0..30 {
        images.pull(&registry.name(), None, None).await.unwrap();
        let holder = {
            let (images, id) = (images.clone(), id.clone());
            tokio::task::spawn_blocking(move || {
                let hold = images.hold(&id)?;
                assert!(hold.erofs_path().exists(), "round {round}: held, but missing");
                Some(hold)
            })
        };
        images.remove(&id).await.unwrap();
        let hold = holder.await.unwrap();
        assert!(images.image(&id).is_none());
        if let Some(hold) = hold {
            let path = hold.erofs_path().to_owned();
            assert!(path.exists(), "round {round}: held, but missing");
            drop(hold);
            wait_for("deletion of a removed image's files", || !path.exists()).await;
        }
    }
}
