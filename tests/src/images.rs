//! The images that the stories run: real programs from Debian's packages, as OCI layouts.
//!
//! Each has three layers: Debian's essential packages (the same blob in every image), the program's
//! own files, and a small one that only removes files: a whiteout of a file, one of a directory, and
//! an opaque directory ([`WHITEOUTS`]). `busybox` is smaller: the C library, the program with its
//! applets as hard links, a whiteout. `python` has zstd layers, all others gzip.
//!
//! Built once ([`make_all`], some minutes) and kept in nacelle's cache. Needs root, mmdebstrap and
//! tar; no loop devices.

mod layers;
mod trees;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use self::layers::Compression;
use crate::layout;

/// To be increased when images change in a way that is not part of [`IMAGES`].
const RECIPE: &str = "2";

/// Paths that the last layer removes.
pub const WHITEOUTS: &[&str] =
    &["/etc/issue.net", "/usr/share/common-licenses", "/usr/share/base-files/motd"];

/// A program on top of Debian's essential packages.
struct Recipe {
    name: &'static str,
    packages: &'static [&'static str],
    compression: Compression,
    /// Shell lines that finish the tree, which is `$1`.
    finish: &'static str,
    /// Folders below /run, which mmdebstrap leaves empty, with their owners.
    folders: &'static [(&'static str, &'static str)],
    /// The `config` member of the image's configuration.
    config: fn() -> Value,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const IMAGES: &[Recipe] = &[
    Recipe {
        name: "nginx",
        packages: &["nginx-light"],
        compression: Compression::Gzip,
        // Logs go to the container's stdout and stderr.
        finish: r#"ln -sf /dev/stdout "$1/var/log/nginx/access.log"
            ln -sf /dev/stderr "$1/var/log/nginx/error.log""#,
        folders: &[],
        config: || {
            json!({
                "Entrypoint": ["nginx"], "Cmd": ["-g", "daemon off;"], "Env": [PATH],
                "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT", "WorkingDir": "/",
            })
        },
    },
    Recipe {
        name: "redis",
        packages: &["redis-server", "redis-tools"],
        compression: Compression::Gzip,
        finish: "",
        folders: &[],
        config: || {
            json!({
                "Entrypoint": ["redis-server"],
                "Cmd": ["--bind", "*", "-::*", "--protected-mode", "no", "--save", ""],
                "Env": [PATH], "User": "redis", "WorkingDir": "/var/lib/redis",
                "ExposedPorts": {"6379/tcp": {}}, "StopSignal": "SIGTERM",
            })
        },
    },
    Recipe {
        name: "postgres",
        packages: &["postgresql-15", "postgresql-client-15"],
        compression: Compression::Gzip,
        // The database cluster is in the image: initdb takes minutes in a nested virtual machine.
        // The start script runs initdb if the directory is empty, as on a new volume.
        finish: r#"cat > "$1/usr/local/bin/start-postgres" <<'END'
#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb -D "$PGDATA" -U postgres -E UTF8 --locale=C.UTF-8 --auth=trust
    echo "host all all all trust" >> "$PGDATA/pg_hba.conf"
fi
exec postgres -D "$PGDATA" -c listen_addresses='*' -c jit=off "$@"
END
            chmod 755 "$1/usr/local/bin/start-postgres"
            chroot "$1" setpriv --reuid=postgres --regid=postgres --init-groups \
                /usr/lib/postgresql/15/bin/initdb -D /var/lib/postgresql/data -U postgres \
                -E UTF8 --locale=C.UTF-8 --auth=trust --no-sync > /dev/null
            echo "host all all all trust" >> "$1/var/lib/postgresql/data/pg_hba.conf""#,
        folders: &[("/run/postgresql", "postgres")],
        config: || {
            json!({
                "Entrypoint": ["start-postgres"],
                "Env": [
                    // Before Debian's wrappers, which choose between versions with a lot of Perl.
                    PATH.replace("PATH=", "PATH=/usr/lib/postgresql/15/bin:"),
                    "PGDATA=/var/lib/postgresql/data",
                ],
                "User": "postgres", "WorkingDir": "/var/lib/postgresql",
                "ExposedPorts": {"5432/tcp": {}},
                // Fast shutdown; SIGTERM would wait for clients to disconnect.
                "StopSignal": "SIGINT",
            })
        },
    },
    Recipe {
        name: "python",
        packages: &["python3"],
        compression: Compression::Zstd,
        finish: "",
        folders: &[],
        config: || json!({"Cmd": ["python3"], "Env": [PATH, "LANG=C.UTF-8"], "WorkingDir": "/srv"}),
    },
    // For stories of the guest kernel: packet filters, links, file systems, tracing.
    Recipe {
        name: "kernel-tools",
        packages: &[
            "arptables",
            "conntrack",
            "dmsetup",
            "dosfstools",
            "e2fsprogs",
            "ebtables",
            "iproute2",
            "ipset",
            "iptables",
            "ipvsadm",
            "mount",
            "nfacct",
            "nftables",
            "squashfs-tools",
            "strace",
            "tcpdump",
            "wireguard-tools",
            "xfsprogs",
        ],
        compression: Compression::Gzip,
        // xfsprogs depends on Python and ICU for xfs_scrub.
        finish: r#"rm -rf "$1"/usr/lib/python3* "$1"/usr/share/python3 "$1"/usr/bin/python3* \
            "$1"/usr/bin/py3* "$1"/usr/lib/x86_64-linux-gnu/libicu* "$1"/usr/sbin/xfs_scrub* \
            "$1"/usr/lib/x86_64-linux-gnu/libpython3* "$1"/usr/share/media-types"#,
        folders: &[],
        config: || json!({"Cmd": ["sh"], "Env": [PATH], "WorkingDir": "/"}),
    },
    // Container engines, run in a container.
    Recipe {
        name: "engines",
        packages: &[
            "aardvark-dns",
            "ca-certificates",
            "crun",
            "docker.io",
            "iproute2",
            "iptables",
            "netavark",
            "podman",
            "procps",
        ],
        compression: Compression::Zstd,
        finish: r#"rm -rf "$1"/usr/share/docker.io/contrib "$1"/usr/bin/containerd-stress \
            "$1"/usr/bin/containerd-shim "$1"/usr/bin/containerd-shim-runc-v1
            printf '[network]\nnetwork_backend = "netavark"\n' > "$1/etc/containers/containers.conf""#,
        folders: &[],
        config: || json!({"Cmd": ["sh"], "Env": [PATH], "WorkingDir": "/", "Volumes": {"/volume": {}}}),
    },
];

/// Folder of an image's OCI layout.
pub fn layout(name: &str) -> Result<PathBuf> {
    let top =
        std::env::var_os("NACELLE_IMAGES").map_or_else(|| "/nacelle/images".into(), PathBuf::from);
    let folder = top.join(name);
    if !folder.join("index.json").exists() {
        bail!(
            "there is no image {name} in {}: make them with `nacelle-tests images DIR` and name \
             the directory in NACELLE_IMAGES",
            top.display()
        );
    }
    Ok(folder)
}

/// Writes the layout of an image with a layer of these files on `base`.
pub fn with_files(base: &str, folder: &Path, files: &[(&str, &str)]) -> Result<PathBuf> {
    with_volumes(base, folder, files, &[])
}

/// Like [`with_files`], and with VOLUMEs.
pub fn with_volumes(
    base: &str,
    folder: &Path,
    files: &[(&str, &str)],
    volumes: &[&str],
) -> Result<PathBuf> {
    let (mut layers, mut config) = layout::read(&layout(base)?)?;
    let tree = folder.join("tree");
    for (path, text) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
        fs::write(path, text)?;
    }
    let paths: Vec<PathBuf> = files.iter().map(|(path, _)| PathBuf::from(path)).collect();
    layers.push(layers::pack(&tree, &paths, Compression::Gzip)?);
    if !volumes.is_empty() {
        config["Volumes"] = volumes.iter().map(|path| ((*path).to_owned(), json!({}))).collect();
    }
    layout::write(&folder.join("layout"), &layers, &config)
}

/// Writes `count` images that differ in a small layer: a program that needs no libraries, as
/// `/bin/busybox`, and a file `/number`. Their names are `NAME-N`.
pub fn numbered(folder: &Path, program: &Path, name: &str, count: usize) -> Result<Vec<PathBuf>> {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("bin"))?;
    fs::copy(program, tree.join("bin/busybox"))
        .with_context(|| format!("copying {}", program.display()))?;
    let pack = |paths: &[&str]| {
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        layers::pack(&tree, &paths, Compression::Gzip)
    };
    let below = pack(&["bin", "bin/busybox"])?;
    let image = |n: usize| {
        fs::write(tree.join("number"), format!("{n}\n"))?;
        let layers = [below.clone(), pack(&["number"])?];
        layout::write(&folder.join(format!("{name}-{n}")), &layers, &json!({"Env": [PATH]}))
    };
    (0..count).map(image).collect()
}

/// Copies the layouts of all images to `folder`; builds them first if they are not in the cache.
pub fn make_all(folder: &Path) -> Result<()> {
    let made = cache()?.join(format!("images/{}", key()));
    if !made.exists() {
        let parent = made.parent().context("a folder in the cache has a parent")?;
        fs::create_dir_all(parent)?;
        let scratch = tempfile::Builder::new().prefix("new-").tempdir_in(parent)?;
        let ready = scratch.path().join("ready");
        make(&scratch.path().join("trees"), &ready)?;
        // Another process may have built the same images.
        if fs::rename(&ready, &made).is_err() && !made.exists() {
            bail!("cannot move the images to {}", made.display());
        }
    }
    fs::create_dir_all(folder)?;
    copy(&made, folder)
}

/// Cache key: a hash of the recipes.
fn key() -> String {
    let mut text = format!("{RECIPE} {WHITEOUTS:?} {}", trees::RECIPE);
    for image in IMAGES {
        text.push_str(&format!(
            "\n{} {:?} {:?} {:?} {} {}",
            image.name,
            image.packages,
            image.folders,
            image.compression,
            image.finish,
            (image.config)()
        ));
    }
    layout::digest(text.as_bytes()).trim_start_matches("sha256:")[..16].to_owned()
}

/// The cache directory, as in `cargo xtask`.
fn cache() -> Result<PathBuf> {
    let of = |name: &str| std::env::var_os(name).map(PathBuf::from);
    of("NACELLE_CACHE")
        .or_else(|| Some(of("XDG_CACHE_HOME")?.join("nacelle")))
        .or_else(|| Some(of("HOME")?.join(".cache/nacelle")))
        .context("neither HOME nor NACELLE_CACHE is set")
}

fn make(scratch: &Path, ready: &Path) -> Result<()> {
    let sources = Some(cache()?.join("apt/sources.list")).filter(|file| file.exists());
    let tree = |name: &str| scratch.join(name);
    std::thread::scope(|scope| -> Result<()> {
        let base = scope.spawn(|| trees::debian(&tree("base"), &[], "", sources.as_deref()));
        let busybox = scope.spawn(|| busybox(&tree("busybox"), ready, sources.as_deref()));
        // In parallel: dpkg and downloads leave the CPUs idle most of the time.
        let others: Vec<_> = IMAGES
            .iter()
            .map(|image| {
                let (tree, sources) = (tree(image.name), sources.as_deref());
                scope.spawn(move || {
                    trees::debian(&tree, image.packages, image.finish, sources)?;
                    image
                        .folders
                        .iter()
                        .try_for_each(|(path, owner)| trees::folder(&tree, path, owner))
                })
            })
            .collect();
        for handle in others.into_iter().chain([base, busybox]) {
            handle.join().map_err(|_| anyhow::anyhow!("a thread making an image panicked"))??;
        }
        Ok(())
    })?;
    let base = trees::files(&tree("base"))?;
    let whiteouts = layers::whiteout_layer(&scratch.join("away"), WHITEOUTS)?;
    for kind in [Compression::Gzip, Compression::Zstd] {
        let below = layers::pack(&tree("base"), &base, kind)?;
        let above = layers::pack(&whiteouts.0, &whiteouts.1, kind)?;
        for image in IMAGES.iter().filter(|image| image.compression == kind) {
            let own = trees::changed(&tree(image.name), &tree("base"))?;
            let own = layers::pack(&tree(image.name), &own, kind)?;
            let layers = [below.clone(), own, above.clone()];
            layout::write(&ready.join(image.name), &layers, &(image.config)())
                .with_context(|| format!("writing the image {}", image.name))?;
        }
    }
    share_blobs(ready)
}

/// Replaces equal blobs of several images by hard links.
fn share_blobs(ready: &Path) -> Result<()> {
    let mut first: HashMap<OsString, PathBuf> = HashMap::new();
    for image in fs::read_dir(ready)? {
        for blob in fs::read_dir(image?.path().join("blobs/sha256"))? {
            let blob = blob?;
            match first.entry(blob.file_name()) {
                Entry::Occupied(same) => {
                    fs::remove_file(blob.path())?;
                    fs::hard_link(same.get(), blob.path())?;
                }
                Entry::Vacant(new) => {
                    new.insert(blob.path());
                }
            }
        }
    }
    Ok(())
}

fn busybox(tree: &Path, ready: &Path, sources: Option<&Path>) -> Result<()> {
    let (library, program) = trees::busybox(tree, sources)?;
    let away = layers::whiteout_layer(&tree.with_extension("away"), &["/bin/taken-away"])?;
    let layers = [
        layers::pack(tree, &library, Compression::Gzip)?,
        layers::pack(tree, &program, Compression::Gzip)?,
        layers::pack(&away.0, &away.1, Compression::Gzip)?,
    ];
    let config = json!({"Cmd": ["sh"], "Env": [PATH], "WorkingDir": "/"});
    layout::write(&ready.join("busybox"), &layers, &config).context("writing the image busybox")?;
    Ok(())
}

/// Copies a directory; files are hard-linked where possible.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let entries = fs::read_dir(from).with_context(|| format!("reading {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            if target.exists() {
                fs::remove_file(&target)?;
            }
            if fs::hard_link(entry.path(), &target).is_err() {
                fs::copy(entry.path(), &target)
                    .with_context(|| format!("writing {}", target.display()))?;
            }
        }
    }
    Ok(())
}
