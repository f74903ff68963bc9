use super::*;
use crate::convert::userns::Range;

fn mount(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.into(),
        ..Default::default()
    }
}

fn read_only(host: &Path, container: &str) -> v1::Mount {
    v1::Mount { readonly: true, ..mount(host, container) }
}

fn image(name: &str, sub_path: &str) -> v1::Mount {
    v1::Mount {
        image: Some(v1::ImageSpec { image: name.into(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        ..read_only(Path::new(""), "/x")
    }
}

fn convert(mounts: &[v1::Mount]) -> Result<Vec<Volume>, Refusal> {
    convert_with(mounts, &BTreeMap::new(), None)
}

fn convert_with(
    mounts: &[v1::Mount],
    annotations: &BTreeMap<String, String>,
    user_namespace: Option<UserNamespace>,
) -> Result<Vec<Volume>, Refusal> {
    let images = |name: &str| (name == "here").then(|| PathBuf::from("/images/here.erofs"));
    let pod = &v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata { uid: "u-1".into(), ..Default::default() }),
        annotations: [(empty_dir::LIMITS_ANNOTATION.into(), "cache=1Mi".into())].into(),
        ..Default::default()
    };
    let (on_host, privileged) = (false, false);
    let context =
        Context { annotations, user_namespace, pod, on_host, privileged, images: &images };
    volumes(mounts, &context)
}

#[test]
fn a_pod_without_a_vm_has_everything_from_the_host_itself() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let socket = dir.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::os::unix::fs::symlink("..1", dir.join("..data")).unwrap();
    let log = dir.join("log");
    std::fs::write(&log, "").unwrap();
    let ask = |mount: v1::Mount| {
        let (none, pod) = (BTreeMap::new(), v1::PodSandboxConfig::default());
        let context = Context {
            annotations: &none,
            user_namespace: None,
            pod: &pod,
            on_host: true,
            privileged: false,
            images: &|_| None,
        };
        volumes(&[mount], &context).map(|mut volumes| volumes.remove(0))
    };
    for (path, mount) in [
        (&socket, mount(&socket, "/run/socket")),
        (&dir, read_only(&dir, "/config")),
        (&log, mount(&log, TERMINATION_LOG)),
        (&log, mount(&log, "/etc/hosts")),
    ] {
        let shared = VolumeSource::Shared { host_path: path.clone() };
        assert_eq!(ask(mount).unwrap().source, shared);
    }
    let both = |path: &Path| {
        let propagation = v1::MountPropagation::PropagationBidirectional as i32;
        ask(v1::Mount { propagation, ..mount(path, "/x") })
    };
    let shared = mountinfo::of(&dir).unwrap().is_some_and(|mount| mount.shared);
    match both(&dir) {
        Ok(volume) => assert!(shared && volume.propagation == Propagation::Bidirectional),
        Err(refusal) => assert!(!shared && refusal.to_string().contains("make-rshared")),
    }
}

fn source(mount: v1::Mount) -> VolumeSource {
    convert(&[mount]).unwrap().remove(0).source
}

fn refused(mount: v1::Mount) -> String {
    convert(&[mount]).unwrap_err().to_string()
}

/// A folder without links in its path.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

#[test]
fn files_and_directories_of_the_host_are_shared_with_links_resolved() {
    let (_dir, root) = folder();
    std::fs::write(root.join("file"), "x").unwrap();
    std::os::unix::fs::symlink("file", root.join("link")).unwrap();
    let found = convert(&[read_only(&root, "/etc//x/."), mount(&root.join("link"), "y")]).unwrap();
    let from = |host_path| VolumeSource::Shared { host_path };
    // Those with fewer parts come first.
    assert_eq!((found[0].container_path.as_str(), found[0].access), ("/y", Access::ReadWrite));
    assert_eq!(found[0].source, from(root.join("file")));
    assert_eq!((found[1].container_path.as_str(), found[1].access), ("/etc/x", Access::ReadOnly));
    assert_eq!(found[1].source, from(root.clone()));
    let rro = v1::Mount { recursive_read_only: true, ..read_only(&root, "/x") };
    assert_eq!(convert(&[rro]).unwrap()[0].access, Access::ReadOnlyRecursive);
}

#[test]
fn a_missing_directory_is_created_unless_another_mount_is_invalid() {
    let (_dir, root) = folder();
    let missing = root.join("a/b");
    let wrong = mount(Path::new("relative"), "/y");
    assert!(convert(&[mount(&missing, "/x"), wrong]).is_err());
    assert!(!missing.exists());
    assert_eq!(source(mount(&missing, "/x")), VolumeSource::Shared { host_path: missing.clone() });
    assert!(missing.is_dir());
}

#[test]
fn files_written_by_a_kubelet_are_copied_or_synced() {
    let (_dir, root) = folder();
    std::os::unix::fs::symlink("..2024", root.join("..data")).unwrap();
    assert_eq!(
        source(read_only(&root, "/config")),
        VolumeSource::Synced { host_path: root.clone() }
    );
    assert_eq!(source(mount(&root, "/config")), VolumeSource::Shared { host_path: root.clone() });

    let hosts = root.join("etc-hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost").unwrap();
    for path in SMALL_FILES {
        assert_eq!(source(mount(&hosts, path)), VolumeSource::Copied { host_path: hosts.clone() });
    }
    std::fs::File::options().write(true).open(&hosts).unwrap().set_len(SMALL + 1).unwrap();
    assert_eq!(
        source(mount(&hosts, "/etc/hosts")),
        VolumeSource::Shared { host_path: hosts.clone() }
    );
}

#[test]
fn the_termination_log_is_written_back_at_the_requested_path() {
    let (_dir, root) = folder();
    let log = root.join("log");
    std::fs::write(&log, "").unwrap();
    let back = VolumeSource::WrittenBack { host_path: log.clone() };
    let shared = VolumeSource::Shared { host_path: log.clone() };
    let elsewhere = [(TERMINATION_LOG_ANNOTATION.to_string(), "/tmp/last".to_string())].into();
    for (annotations, path, expected) in [
        (&BTreeMap::new(), TERMINATION_LOG, &back),
        (&BTreeMap::new(), "/tmp/last", &shared),
        (&elsewhere, "/tmp/last", &back),
        (&elsewhere, TERMINATION_LOG, &shared),
    ] {
        let found = convert_with(&[mount(&log, path)], annotations, None).unwrap();
        assert_eq!(&found[0].source, expected, "{path}");
    }
}

#[test]
fn an_image_is_a_read_only_volume_with_an_optional_folder_in_it() {
    let expected = |sub_path: &str| VolumeSource::Image {
        image: "/images/here.erofs".into(),
        sub_path: sub_path.into(),
    };
    assert_eq!(source(image("here", "")), expected(""));
    assert_eq!(source(image("here", "/etc/ssl")), expected("etc/ssl"));
    for wrong in [
        image("", ""),
        image("elsewhere", ""),
        image("here", "../x"),
        v1::Mount { readonly: false, ..image("here", "") },
        v1::Mount { host_path: "/tmp".into(), ..image("here", "") },
    ] {
        let text = refused(wrong);
        assert!(text.starts_with("mounts[0].image: ImageVolumeMountFailed: "), "{text}");
    }
}

#[test]
fn a_mounts_mapping_is_its_pods_or_none() {
    let (_dir, root) = folder();
    let ids = vec![v1::IdMapping { container_id: 0, host_id: 1000, length: 10 }];
    let mapped =
        v1::Mount { uid_mappings: ids.clone(), gid_mappings: ids, ..mount(&root, "/data") };
    let range = |host| Range { host, length: 10 };
    let pod = |host| Some(UserNamespace { uids: range(host), gids: range(host) });
    let none = BTreeMap::new();
    assert!(convert_with(std::slice::from_ref(&mapped), &none, pod(1000)).is_ok());
    for other in [pod(2000), None] {
        let refusal = convert_with(std::slice::from_ref(&mapped), &none, other).unwrap_err();
        assert!(refusal.to_string().starts_with("mounts[0].uidMappings"));
    }
}

#[test]
fn unsupported_requests_are_rejected_with_the_field() {
    let (_dir, root) = folder();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    std::fs::write(root.join("file"), "").unwrap();
    let base = mount(&root, "/x");
    let two_way = v1::MountPropagation::PropagationBidirectional as i32;
    let one_way = v1::MountPropagation::PropagationHostToContainer as i32;
    let rro = v1::Mount { recursive_read_only: true, readonly: true, ..base.clone() };
    let table = [
        (v1::Mount { propagation: two_way, ..base.clone() }, "propagation"),
        (v1::Mount { propagation: 9, ..base.clone() }, "propagation"),
        (v1::Mount { propagation: one_way, ..rro.clone() }, "recursive_read_only"),
        (v1::Mount { propagation: two_way, ..rro.clone() }, "recursive_read_only"),
        (v1::Mount { readonly: false, ..rro }, "recursive_read_only"),
        (v1::Mount { image_sub_path: "x".into(), ..base.clone() }, "image_sub_path"),
        (v1::Mount { mount_options: vec!["noexec".into()], ..base.clone() }, "mount_options"),
        (v1::Mount { uid_mappings: vec![v1::IdMapping::default()], ..base }, "uidMappings"),
        (mount(Path::new(""), "/x"), "host_path"),
        (mount(Path::new("relative"), "/x"), "host_path"),
        (mount(&root.join("file/below"), "/x"), "host_path"),
        (mount(&root.join("socket"), "/x"), "host_path"),
        (mount(Path::new("/dev/null"), "/x"), "host_path"),
        (mount(&root, ""), "container_path"),
        (mount(&root, "/"), "container_path"),
        (mount(&root, "/a/../b"), "container_path"),
    ];
    for (mount, field) in table {
        let text = refused(mount);
        assert!(text.starts_with(&format!("mounts[0].{field}: ")), "{text}");
    }
    assert!(refused(mount(&root.join("socket"), "/x")).contains("a socket"));
    let many = vec![mount(&root, "/x"); MAX_MOUNTS + 1];
    assert!(convert(&many).unwrap_err().to_string().starts_with("mounts: "));
}

#[test]
fn an_images_own_volumes_are_kept_where_the_request_mounts_nothing() {
    let own = |paths: &[&str], taken: &[&str]| {
        let volume = |path: &&str| Volume {
            container_path: (*path).to_owned(),
            source: VolumeSource::Shared { host_path: "/h".into() },
            access: Access::ReadWrite,
            propagation: Propagation::Private,
        };
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let config = oci_spec::image::ConfigBuilder::default().volumes(paths).build().unwrap();
        let taken: Vec<Volume> = taken.iter().map(volume).collect();
        of_image(Some(&config), &taken)
    };
    let found = own(&["/var/data/", "cache", "/a/../b", "/", "/dev", "/x"], &["/x"]).unwrap();
    assert_eq!(found, ["/b", "/cache", "/var/data"]);
    // Below or above a mount of the request, both are there.
    assert_eq!(own(&["/x/y", "/x", "/x"], &["/x/y/z"]).unwrap(), ["/x", "/x/y"]);
    assert!(own(&["/dev/shm", "/sys/fs/cgroup", "/proc/x"], &[]).unwrap().is_empty());
    assert_eq!(own(&["/devices", "/system"], &[]).unwrap(), ["/devices", "/system"]);
    assert!(of_image(None, &[]).unwrap().is_empty());
    let many: Vec<String> = (0..=MAX_MOUNTS).map(|n| format!("/{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(own(&many, &[]).is_err());
}

#[test]
fn container_engines_in_a_privileged_container_get_volumes_unless_mounted() {
    let asked = |path: &str| Volume {
        container_path: path.into(),
        ..convert(&[mount(Path::new("/"), "/x")]).unwrap().remove(0)
    };
    assert_eq!(of_engines(&[], &[]), ENGINES);
    assert_eq!(of_engines(&[asked("/data")], &["/var/lib/dockers".into()]), ENGINES);
    assert!(of_engines(&[asked("/var/lib")], &[]).is_empty());
    let volumes = [asked("/var/lib/docker"), asked("/var/lib/containers/storage")];
    assert_eq!(of_engines(&volumes, &["/var/lib/buildkit".into()]), ["/var/lib/containerd"]);
}

#[test]
fn a_mount_replaces_default_mounts_except_dev_and_proc() {
    let (_dir, root) = folder();
    for place in ["/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/proc/meminfo", "/run"] {
        assert_eq!(convert(&[mount(&root, place)]).unwrap()[0].container_path, place);
    }
    for (place, words) in [
        ("/dev", "made for the container"),
        ("/proc", "own processes"),
        ("/proc/1", "inside /proc"),
        ("/proc/sys/kernel", "inside /proc"),
    ] {
        let text = refused(mount(&root, place));
        assert!(text.starts_with("mounts[0].container_path") && text.contains(words), "{text}");
    }
}

#[test]
fn devices_of_the_guest_are_not_volumes() {
    let (none, pod) = (BTreeMap::new(), v1::PodSandboxConfig::default());
    let ask = |host: &str, place: &str, privileged| {
        let context = Context {
            annotations: &none,
            user_namespace: None,
            pod: &pod,
            on_host: false,
            privileged,
            images: &|_| None,
        };
        volumes(&[mount(Path::new(host), place)], &context)
    };
    assert_eq!(ask("/dev/net/tun", "/dev/net/tun", false), Ok(Vec::new()));
    assert_eq!(ask("/dev/", "/dev", true), Ok(Vec::new()));
    let text = ask("/dev", "/dev", false).unwrap_err().to_string();
    assert!(text.contains("privileged"), "{text}");
    let text = ask("/dev/ptmx", "/dev/x", false).unwrap_err().to_string();
    assert!(text.contains("is a device"), "{text}");
}

#[test]
fn an_empty_dir_is_in_the_guest_and_may_be_bidirectional() {
    let (_dir, root) = folder();
    let volumes = root.join("pods/u-1/volumes/kubernetes.io~empty-dir");
    let (cache, data) = (volumes.join("cache"), volumes.join("data"));
    for path in [&cache.join("sub"), &data] {
        std::fs::create_dir_all(path).unwrap();
    }
    std::os::unix::fs::symlink(&root, root.join("link")).unwrap();
    let through_link = root.join("link").join(cache.strip_prefix(&root).unwrap());
    let empty_dir = |folder: &Path, below: &str, size_limit| VolumeSource::EmptyDir {
        host_path: if below.is_empty() { folder.to_owned() } else { folder.join(below) },
        directory: folder.to_owned(),
        sub_path: below.into(),
        size_limit,
    };
    let limit = Some(1 << 20);
    assert_eq!(source(mount(&cache, "/c")), empty_dir(&cache, "", limit));
    assert_eq!(source(mount(&through_link, "/c")), empty_dir(&cache, "", limit));
    assert_eq!(source(mount(&cache.join("sub"), "/c")), empty_dir(&cache, "sub", limit));
    assert_eq!(source(mount(&data, "/c")), empty_dir(&data, "", None));
    let propagation = v1::MountPropagation::PropagationBidirectional as i32;
    let both = |path: &Path| v1::Mount { propagation, ..mount(path, "/c") };
    assert_eq!(convert(&[both(&cache)]).unwrap()[0].propagation, Propagation::Bidirectional);
    assert!(refused(both(&root)).contains("PROPAGATION_BIDIRECTIONAL"));
    assert!(refused(both(&volumes)).contains("PROPAGATION_BIDIRECTIONAL"));
}
