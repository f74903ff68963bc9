//! Pulls from registries that are slow, broken or hostile.

mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use image::{Auth, Error, ErrorKind};
use support::{
    MANIFEST, Registry, Response, assert_clean, config, explain, hosts, layer, noise, open,
};

/// Pulls from a registry that must fail; checks that no files remain and that a good pull succeeds
/// afterwards in the same store.
async fn fails(registry: &Registry) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let error = images.pull(&registry.name(), None, None).await.expect_err("must fail");
    // The builder's thread stops with a delay.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_clean(dir.path());
    assert!(images.images().is_empty());
    let good = Registry::new();
    good.image(&[layer("ok", b"fine")]);
    images.pull(&good.name(), None, None).await.expect("the store is usable after a failure");
    error
}

#[tokio::test]
async fn a_pull_by_tag_returns_names_and_a_file() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"1"), layer("b", &noise(100_000))]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    assert_eq!(images.pull(&registry.name(), None, None).await.unwrap().to_string(), id);
    let info = images.image(&registry.name()).unwrap();
    assert_eq!(info.id, id);
    assert_eq!(info.repo_tags, [registry.name()]);
    assert_eq!(info.repo_digests.len(), 1);
    assert!(info.erofs_path.is_file() && info.size > 0);
    // By id, by a part of it, by digest.
    for name in [&id, &id[..20], &id[7..15], &info.repo_digests[0]] {
        assert_eq!(images.image(name).expect(name).id, id);
    }
    assert!(images.fs_info().used_bytes >= info.size);
    // Layers are not kept, configuration and manifest are.
    let blobs = std::fs::read_dir(dir.path().join("content/blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 2);
    images.remove(&registry.name()).await.unwrap();
    images.remove(&registry.name()).await.unwrap();
    assert_clean(dir.path());
}

#[tokio::test]
async fn a_broken_transfer_is_resumed() {
    let cuts = AtomicUsize::new(0);
    let big = layer("big", &noise(3_000_000));
    let size = big.len();
    let registry = Registry::scripted(move |request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 100_000 {
            // Each connection delivers a megabyte.
            cuts.fetch_add(1, Ordering::Relaxed);
            return Response { cut: Some(1_000_000), ..response };
        }
        response
    });
    registry.image(&[big]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    let ranges: Vec<_> =
        registry.requests().iter().filter_map(|r| r.headers.get("range").cloned()).collect();
    assert!(ranges.len() >= 2, "{ranges:?}");
    let starts: Vec<usize> =
        ranges.iter().map(|r| r[6..].trim_end_matches('-').parse().unwrap()).collect();
    assert!(starts.is_sorted() && starts[0] > 0 && *starts.last().unwrap() < size, "{starts:?}");
}

#[tokio::test]
async fn a_server_without_ranges_is_read_from_the_start() {
    let first = AtomicUsize::new(0);
    let big = layer("big", &noise(400_000));
    let whole = big.clone();
    let registry = Registry::scripted(move |request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 100_000 {
            let honest = Response::ok(whole.clone());
            return match first.fetch_add(1, Ordering::Relaxed) {
                0 => Response { cut: Some(200_000), ..honest },
                _ => honest,
            };
        }
        response
    });
    registry.image(&[big]);
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).await.pull(&registry.name(), None, None).await.unwrap();
}

#[tokio::test]
async fn a_blob_with_wrong_bytes_is_refused() {
    let registry = Registry::scripted(|request, mut response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            response.body[700] ^= 1;
        }
        response
    });
    registry.image(&[layer("a", &noise(5000))]);
    let error = fails(&registry).await;
    assert!(matches!(error.inner(), Error::DigestMismatch { .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::BadImage);
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_refused() {
    let registry = Registry::scripted(|request, mut response| {
        if request.path.contains("/manifests/") {
            response.body.push(b'\n');
        }
        response
    });
    registry.image(&[layer("a", b"x")]);
    assert!(matches!(fails(&registry).await.inner(), Error::DigestMismatch { .. }));
}

#[tokio::test]
async fn a_blob_longer_than_its_descriptor_is_refused() {
    let registry = Registry::scripted(|request, mut response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            response.body.extend(noise(1 << 20));
        }
        response
    });
    registry.image(&[layer("a", &noise(5000))]);
    assert!(matches!(fails(&registry).await.inner(), Error::SizeMismatch { .. }));
}

#[tokio::test]
async fn a_blob_that_always_ends_early_fails_after_some_attempts() {
    let registry = Registry::scripted(|request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            return Response { cut: Some(0), ..response };
        }
        response
    });
    registry.image(&[layer("a", &noise(5000))]);
    let error = fails(&registry).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
}

#[tokio::test]
async fn a_silent_registry_times_out() {
    let registry = Registry::scripted(|request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            return Response { stall: Some(100), ..response };
        }
        response
    });
    registry.image(&[layer("a", &noise(5000))]);
    let start = Instant::now();
    let error = fails(&registry).await;
    assert!(matches!(error.inner(), Error::Stalled { seconds: 1, .. }), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn temporary_server_errors_are_retried() {
    let failures = AtomicUsize::new(0);
    let registry =
        Registry::scripted(move |_, response| match failures.fetch_add(1, Ordering::Relaxed) % 3 {
            2 => response,
            1 => Response::status(503).header("Retry-After", "0"),
            _ => Response::status(500),
        });
    registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).await.pull(&registry.name(), None, None).await.unwrap();
}

#[tokio::test]
async fn a_permanent_server_error_is_reported_with_its_message() {
    let registry = Registry::scripted(|_, _| {
        let mut response = Response::ok(r#"{"errors":[{"code":"X","message":"disk on fire"}]}"#);
        response.status = 500;
        response
    });
    let text = explain(&fails(&registry).await);
    assert!(text.contains("500") && text.contains("disk on fire"), "{text}");
}

#[tokio::test]
async fn an_unknown_image_fails_without_retries() {
    let registry = Registry::new();
    let error = fails(&registry).await;
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("test/image:v1"), "{error}");
}

#[tokio::test]
async fn a_huge_manifest_is_refused_before_it_is_read() {
    let registry = Registry::new();
    let mut body = br#"{"schemaVersion":2,"x":""#.to_vec();
    body.resize(5 << 20, b'a');
    registry.manifest("v1", &body, MANIFEST);
    let error = fails(&registry).await;
    assert!(
        matches!(error.inner(), Error::TooLarge { limit, .. } if *limit == 4 << 20),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_index_without_this_platform_lists_the_available_ones() {
    let registry = Registry::new();
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{{"mediaType":"{MANIFEST}","digest":"sha256:{}","size":3,"platform":{{"os":"linux","architecture":"riscv64"}}}}]}}"#,
        "0".repeat(64)
    );
    registry.manifest("v1", index.as_bytes(), "application/vnd.oci.image.index.v1+json");
    let text = fails(&registry).await.to_string();
    assert!(text.contains("linux/riscv64"), "{text}");
}

#[tokio::test]
async fn hostile_layers_fail_the_pull_and_leave_no_files() {
    for (path, word) in [("../../etc/cron.d/x", ".."), (".wh.", "whiteout")] {
        let registry = Registry::new();
        registry.image(&[layer("ok", b"x"), layer(path, b"evil")]);
        let error = fails(&registry).await;
        let text = explain(&error);
        assert!(text.contains(word) && text.contains("sha256:"), "{text}");
        assert_eq!(error.kind(), ErrorKind::BadImage);
    }
}

#[tokio::test]
async fn redirects_are_followed_without_credentials() {
    let storage = Registry::new();
    let target = storage.authority();
    let registry = Registry::scripted(move |request, response| {
        if request.headers.get("authorization").is_none_or(|v| !v.starts_with("Basic ")) {
            return Response::status(401).header("WWW-Authenticate", "Basic realm=x");
        }
        match request.path.contains("/blobs/") {
            true => Response::status(307)
                .header("Location", format!("http://{target}{}?sig=1", request.path)),
            false => response,
        }
    });
    registry.image(&[layer("a", b"x")]);
    storage.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let auth = Auth { username: "u".into(), password: "p".into(), ..Auth::default() };
    open(dir.path()).await.pull(&registry.name(), Some(auth), None).await.unwrap();
    assert!(storage.count("/blobs/") >= 2);
    assert!(storage.requests().iter().all(|r| !r.headers.contains_key("authorization")));
}

/// A registry with its own token service; `accept` decides about a token request.
fn with_tokens(accept: fn(&support::Request) -> bool) -> Registry {
    let port = std::sync::Arc::new(Mutex::new(0));
    let known = std::sync::Arc::clone(&port);
    let registry = Registry::scripted(move |request, response| {
        if request.path.starts_with("/token") {
            return match accept(request) {
                true => Response::ok(r#"{"token":"","access_token":"secret"}"#),
                false => Response::status(401),
            };
        }
        if request.headers.get("authorization").map(String::as_str) == Some("Bearer secret") {
            return response;
        }
        let challenge = format!(
            r#"Bearer realm="http://127.0.0.1:{}/token",service="the, registry",scope="repository:test/image:pull""#,
            known.lock().unwrap()
        );
        Response::status(401).header("WWW-Authenticate", challenge)
    });
    *port.lock().unwrap() = registry.port;
    registry.image(&[layer("a", b"x"), layer("b", b"y")]);
    registry
}

#[tokio::test]
async fn tokens_are_fetched_once_and_reused() {
    let registry = with_tokens(|request| {
        request.headers.get("authorization").map(String::as_str) == Some("Basic dTpw")
            && request.path.contains("service=the%2C+registry")
            && request.path.contains("scope=repository%3Atest%2Fimage%3Apull")
    });
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let auth = Auth { username: "u".into(), password: "p".into(), ..Auth::default() };
    images.pull(&registry.name(), Some(auth), None).await.unwrap();
    assert_eq!(registry.count("/token"), 1);
    let wrong = Auth { username: "u".into(), password: "wrong".into(), ..Auth::default() };
    let error = images.pull(&registry.name(), Some(wrong), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
}

#[tokio::test]
async fn identity_tokens_are_exchanged_and_registry_tokens_sent_unchanged() {
    let registry = with_tokens(|request| {
        request.method == "POST"
            && request.body.contains("grant_type=refresh_token")
            && request.body.contains("refresh_token=refresh%26me")
    });
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let auth = Auth { identity_token: "refresh&me".into(), ..Auth::default() };
    images.pull(&registry.name(), Some(auth), None).await.unwrap();
    let auth = Auth { registry_token: "secret".into(), ..Auth::default() };
    let before = registry.count("/token");
    images.pull(&registry.name(), Some(auth), None).await.unwrap();
    assert_eq!(registry.count("/token"), before);
}

#[tokio::test]
async fn mirrors_are_tried_first_and_may_be_incomplete() {
    let upstream = Registry::new();
    upstream.image(&[layer("a", b"x"), layer("b", &noise(5000))]);
    // Has the manifest and wrong blobs.
    let mirror = Registry::scripted(|request, mut response| {
        if request.path.contains("/blobs/") {
            response.body.reverse();
        }
        response
    });
    mirror.image(&[layer("a", b"x"), layer("b", &noise(5000))]);
    let dir = tempfile::tempdir().unwrap();
    let certs = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    let toml = format!("[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n", mirror.authority());
    config.config_path = hosts(certs.path(), &upstream.authority(), &toml);
    let images = image::Images::open(config).await.unwrap();
    images.pull(&upstream.name(), None, None).await.unwrap();
    assert!(mirror.count("/manifests/") >= 1);
    assert_eq!(upstream.count("/manifests/"), 0);
    assert!(upstream.count("/blobs/") >= 2);
}

#[tokio::test]
async fn a_refused_connection_is_reported_with_the_registrys_name() {
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let error = images.pull("127.0.0.1:1/a/b", None, None).await.unwrap_err();
    assert!(explain(&error).contains("127.0.0.1:1"), "{}", explain(&error));
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn concurrent_equal_pulls_are_shared() {
    let registry = Registry::scripted(|_, response| {
        std::thread::sleep(Duration::from_millis(100));
        response
    });
    registry.image(&[layer("a", &noise(100_000))]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let name = registry.name();
    let pulls = (0..8).map(|_| {
        let (images, name) = (images.clone(), name.clone());
        tokio::spawn(async move { images.pull(&name, None, None).await.unwrap() })
    });
    for pull in pulls.collect::<Vec<_>>() {
        pull.await.unwrap();
    }
    assert_eq!(registry.count("/manifests/"), 1);
    assert_eq!(registry.count("/blobs/"), 2);
}

#[tokio::test]
async fn a_pull_ends_when_its_last_caller_is_dropped() {
    let registry = Registry::scripted(|request, response| {
        if request.path.contains("/blobs/") && response.body.len() > 1000 {
            return Response { stall: Some(100), ..response };
        }
        response
    });
    registry.image(&[layer("a", &noise(5000))]);
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.stall_timeout_seconds = 600;
    let images = image::Images::open(config).await.unwrap();
    let pull = || {
        let (images, name) = (images.clone(), registry.name());
        tokio::spawn(async move { images.pull(&name, None, None).await })
    };
    let (first, second) = (pull(), pull());
    let start = Instant::now();
    while registry.count("/blobs/") < 2 {
        assert!(start.elapsed() < Duration::from_secs(30), "the pull does not reach its layer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    first.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ingest = || std::fs::read_dir(dir.path().join("content/ingest")).unwrap().count();
    assert_eq!(ingest(), 1, "the pull continues for the second caller");
    assert_eq!(registry.count("/manifests/"), 1, "and is the only one");
    second.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_clean(dir.path());
}

#[tokio::test]
async fn two_tags_share_an_image_and_a_tag_can_move() {
    let registry = Registry::new();
    let old = registry.image_as("v1", &[layer("a", b"old")], "old");
    registry.image_as("v2", &[layer("a", b"old")], "old");
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let name = |tag: &str| format!("{}/test/image:{tag}", registry.authority());
    images.pull(&name("v1"), None, None).await.unwrap();
    images.pull(&name("v2"), None, None).await.unwrap();
    assert_eq!(images.images().len(), 1);
    assert_eq!(images.image(&old).unwrap().repo_tags, [name("v1"), name("v2")]);
    let new = registry.image_as("v1", &[layer("a", b"new")], "new");
    images.pull(&name("v1"), None, None).await.unwrap();
    assert_eq!(images.image(&name("v1")).unwrap().id, new);
    assert_eq!(images.image(&old).unwrap().repo_tags, [name("v2")]);
    images.untag(&name("v2")).await.unwrap();
    assert!(images.image(&old).is_none());
    images.remove(&new).await.unwrap();
    assert_clean(dir.path());
}

#[tokio::test]
async fn a_held_image_outlives_its_removal() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    let hold = images.hold(&registry.name()).unwrap();
    images.remove(&id).await.unwrap();
    assert!(images.image(&id).is_none() && images.images().is_empty());
    assert!(hold.erofs_path().is_file());

    // The same after the process was killed, once the container holds the image again.
    let path = hold.erofs_path().to_owned();
    drop(images);
    let lock = dir.path().join("images.lock");
    std::fs::remove_file(&lock).unwrap();
    let images = open(dir.path()).await;
    assert!(images.images().is_empty());
    let again = images.hold(&id).unwrap();
    assert_eq!(images.collect_garbage().await.unwrap().images, 0);
    assert!(path.is_file());
    drop(again);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!path.exists());
    // The first hold belongs to the old process and has nothing to delete.
    drop(hold);
    assert_clean(dir.path());
}

#[tokio::test]
async fn images_survive_a_restart_and_temporary_files_do_not() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    let second = image::Images::open(config(dir.path())).await;
    assert!(matches!(second, Err(Error::InUse { .. })));
    drop(images);
    let put = |path: &str| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"left").unwrap();
    };
    let blob = format!("content/blobs/sha256/{}", "ab".repeat(32));
    for path in ["content/ingest/7", &blob, "images/.tmp-3/rootfs.erofs"] {
        put(path);
    }
    let images = open(dir.path()).await;
    assert_eq!(images.image(&registry.name()).unwrap().id, id);
    for path in ["content/ingest/7", &blob, "images/.tmp-3"] {
        assert!(!dir.path().join(path).exists(), "{path}");
    }
}

/// Three kinds of damage to a file: emptied, overwritten, replaced by a directory.
fn damage(path: &std::path::Path, kind: usize) {
    match kind {
        0 => std::fs::write(path, "").unwrap(),
        1 => {
            let length = std::fs::metadata(path).unwrap().len() as usize;
            std::fs::write(path, noise(length)).unwrap();
        }
        _ => {
            std::fs::remove_file(path).unwrap();
            std::fs::create_dir_all(path.join("deep")).unwrap();
        }
    }
}

#[tokio::test]
async fn a_damaged_image_is_moved_to_damaged_and_the_others_stay() {
    for file in ["record", "rootfs", "config", "version", "older version", "other's record"] {
        for kind in 0..3 {
            let registry = Registry::new();
            let good = registry.image_as("good", &[layer("a", b"x")], "A=1");
            let bad = registry.image_as("bad", &[layer("b", b"y")], "B=2");
            let name = |tag: &str| format!("{}/test/image:{tag}", registry.authority());
            let (good_name, bad_name) = (name("good"), name("bad"));
            let dir = tempfile::tempdir().unwrap();
            let images = open(dir.path()).await;
            for name in [&good_name, &bad_name] {
                images.pull(name, None, None).await.unwrap();
            }
            drop(images);
            let directory = |id: &str| dir.path().join("images").join(&id[7..]);
            let record = directory(&bad).join("record.json");
            match file {
                "record" => damage(&record, kind),
                "rootfs" => damage(&directory(&bad).join("rootfs.erofs"), [0, 0, 2][kind]),
                "config" => {
                    damage(&dir.path().join("content/blobs/sha256").join(&bad[7..]), kind);
                }
                "version" | "older version" => {
                    let text = std::fs::read_to_string(&record).unwrap();
                    let version = if file == "version" { 9 } else { 0 };
                    let text = text.replace("\"version\": 1", &format!("\"version\": {version}"));
                    std::fs::write(&record, text).unwrap();
                }
                _ => drop(std::fs::copy(directory(&good).join("record.json"), &record).unwrap()),
            }
            let images = open(dir.path()).await;
            let at = format!("{file}, {kind}: {:?}", images.damaged());
            assert_eq!(images.image(&good_name).unwrap().id, good, "{at}");
            assert!(images.image(&bad_name).is_none(), "{at}");
            assert!(!images.damaged().is_empty(), "{at}");
            let kept = |directory: &str| {
                dir.path().join(directory).join(&bad[7..]).join("rootfs.erofs").exists()
            };
            assert_eq!(kept("newer"), file == "version", "{at}");
            assert_eq!(kept("damaged"), file == "rootfs" && kind == 2, "{at}");
            images.pull(&bad_name, None, None).await.unwrap();
            drop(images);
            let images = open(dir.path()).await;
            assert_eq!(images.images().len(), 2, "{at}");
            assert!(images.damaged().iter().all(|d| d.reason.contains("earlier start")), "{at}");
        }
    }
}

#[tokio::test]
async fn names_are_rebuilt_from_the_records() {
    for kind in 0..5 {
        let registry = Registry::new();
        let old = registry.image_as("moves", &[layer("a", b"x")], "A=1");
        let name = |tag: &str| format!("{}/test/image:{tag}", registry.authority());
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path()).await;
        images.pull(&name("moves"), None, None).await.unwrap();
        let new = registry.image_as("moves", &[layer("b", b"y")], "B=2");
        images.pull(&name("moves"), None, None).await.unwrap();
        let before = images.images();
        drop(images);
        let refs = dir.path().join("images/refs.json");
        match kind {
            0..3 => damage(&refs, kind),
            3 => std::fs::remove_file(&refs).unwrap(),
            _ => std::fs::write(&refs, r#"{"version": 9, "refs": {}}"#).unwrap(),
        }
        let images = open(dir.path()).await;
        assert_eq!(images.image(&name("moves")).unwrap().id, new, "{kind}");
        assert!(images.image(&old).is_some(), "{kind}");
        let names = |all: &[image::ImageInfo]| {
            let mut names: Vec<_> =
                all.iter().map(|i| (i.repo_tags.clone(), i.repo_digests.clone())).collect();
            names.sort();
            names
        };
        assert_eq!(names(&images.images()), names(&before), "{kind}");
        assert_eq!(images.damaged().len(), usize::from(kind != 3), "{kind}");
        drop(images);
        let images = open(dir.path()).await;
        assert_eq!(images.image(&name("moves")).unwrap().id, new, "{kind}");
    }
}

#[tokio::test]
async fn a_store_of_the_previous_release_gets_names_in_its_records() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", b"1")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    images.pull(&registry.name(), None, None).await.unwrap();
    drop(images);
    let path = dir.path().join("images").join(&id[7..]).join("record.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let names = record.as_object_mut().unwrap().remove("names").unwrap();
    assert_eq!(names.as_array().unwrap().len(), 2);
    std::fs::write(&path, record.to_string()).unwrap();
    drop(open(dir.path()).await);
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(record["names"], names);
}

#[tokio::test]
async fn damaged_blobs_that_an_image_does_not_need_leave_it_usable() {
    for kind in 0..3 {
        let registry = Registry::new();
        let id = registry.image(&[layer("a", b"1")]);
        let dir = tempfile::tempdir().unwrap();
        let keeping = image::Config { keep_layers: true, ..config(dir.path()) };
        let images = image::Images::open(keeping.clone()).await.unwrap();
        images.pull(&registry.name(), None, None).await.unwrap();
        drop(images);
        let blobs = dir.path().join("content/blobs/sha256");
        let mut damaged = 0;
        for entry in std::fs::read_dir(&blobs).unwrap().flatten() {
            if entry.file_name().to_str() != Some(&id[7..]) {
                damage(&entry.path(), kind);
                damaged += 1;
            }
        }
        assert_eq!(damaged, 2, "a manifest and a layer");
        let images = image::Images::open(keeping).await.unwrap();
        assert!(images.image(&registry.name()).is_some());
        // A damaged layer of the right length is detected when it is read.
        assert!(!images.damaged().is_empty(), "{kind}");
        images.collect_garbage().await.unwrap();
        images.remove(&id).await.unwrap();
        images.pull(&registry.name(), None, None).await.unwrap();
    }
}

/// A small tmpfs; unmounted on drop.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        match nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some(options)) {
            Ok(()) => Some(Self(dir)),
            Err(e) => {
                println!("SKIP: cannot mount a tmpfs: {e}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_is_reported_with_the_path_and_leaves_the_store_usable() {
    // Sizes at which the layer is known not to fit, and sizes at which different writes fail first;
    // at the last size, the image's.
    for (size, layer_size) in [(2048, 4 << 20), (3072, 2 << 20), (4096, 2_500_000), (64, 100_000)] {
        let Some(disk) = SmallDisk::mount(&format!("size={size}k")) else { return };
        let images = open(disk.0.path()).await;
        let registry = Registry::new();
        registry.image(&[layer("big", &noise(layer_size))]);
        let error = images.pull(&registry.name(), None, None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error:?}");
        let root = disk.0.path().to_str().unwrap();
        assert!(error.to_string().contains(root), "{error}");
        let too_large = layer_size > size * 1024;
        assert_eq!(explain(&error).contains("bytes are needed"), too_large, "{error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_clean(disk.0.path());
        registry.image_as("small", &[layer("a", b"x")], "small");
        let small = format!("{}/test/image:small", registry.authority());
        images.pull(&small, None, None).await.unwrap();
        // Images can be removed on a full disk.
        let fill = disk.0.path().join("images/.tmp-fill");
        let _ = std::fs::write(&fill, vec![1; 8 << 20]);
        images.remove(&small).await.unwrap();
        assert!(images.images().is_empty());
        std::fs::remove_file(&fill).unwrap();
        assert_clean(disk.0.path());
    }
}

#[tokio::test]
async fn certificates_are_checked_against_the_configured_authority() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", &noise(200_000))]);
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let port = tls_proxy(&certified, registry.port).await;
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, certified.cert.pem()).unwrap();
    let authority = format!("localhost:{port}");
    let name = format!("{authority}/test/image:v1");
    let pull = async |toml: &str| {
        let (root, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut config = config(root.path());
        let server = format!("server = \"https://{authority}\"\n{toml}");
        config.config_path = hosts(certs.path(), &authority, &server);
        image::Images::open(config).await.unwrap().pull(&name, None, None).await
    };
    let trusted = format!("ca = {:?}", ca.to_str().unwrap());
    assert_eq!(pull(&trusted).await.unwrap().to_string(), id);
    assert_eq!(pull("skip_verify = true").await.unwrap().to_string(), id);
    let error = pull("").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(explain(&error).contains("certificate"), "{}", explain(&error));
    let error = pull("ca = \"/nowhere/ca.pem\"").await.unwrap_err();
    assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
    // Without configuration, any certificate is accepted on loopback, as in containerd.
    let root = tempfile::tempdir().unwrap();
    assert_eq!(open(root.path()).await.pull(&name, None, None).await.unwrap().to_string(), id);
}

/// TLS in front of a plain registry.
async fn tls_proxy(certified: &rcgen::CertifiedKey<rcgen::KeyPair>, target: u16) -> u16 {
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio_rustls::rustls::{ServerConfig, crypto::ring};
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let tls = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], PrivateKeyDer::Pkcs8(key))
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(tls));
    support::proxy(acceptor, target).await
}

#[tokio::test]
async fn invalid_archives_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let images = open(&dir.path().join("store")).await;
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let docker = |manifest: &str| {
        let mut builder = tar::Builder::new(layer("manifest.json", manifest.as_bytes()));
        builder.get_mut().truncate(512 + manifest.len().next_multiple_of(512));
        builder.into_inner().unwrap()
    };
    let escape = r#"[{"Config":"../../etc/passwd","Layers":[]}]"#;
    let absent = r#"[{"Config":"c.json","Layers":[]}]"#;
    for (bytes, reason) in [
        (b"no tar at all".to_vec(), "neither an OCI layout nor a docker archive"),
        (layer("x", b"y"), "index.json"),
        (vec![0x1f, 0x8b, 8, 0, 0, 0], "compressed"),
        (docker(escape), ".."),
        (docker(absent), "c.json"),
        (docker("{"), "manifest.json"),
    ] {
        let error = images.import(&file("archive", &bytes), None).await.unwrap_err();
        assert!(explain(&error).contains(reason), "{reason}: {}", explain(&error));
    }
    assert!(images.import(&dir.path().join("nowhere"), None).await.is_err());
    let error = images.import(&file("archive", b""), Some("BAD name")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_clean(&dir.path().join("store"));
}
