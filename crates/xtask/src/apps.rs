//! Root file systems with real programs from Debian's packages: the stuff that test and demo
//! images are made of. One tar a program, cached. The packages are unpacked, not configured, so a
//! tree holds a program and the libraries it needs and little else; what configuring would have
//! brought (users, mostly) is written here.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{debs, paths, run};

/// Raised when the recipe changes in a way that [`TREES`] does not show.
const RECIPE: &str = "2";

/// What every tree has: a shell and the tools that tests call.
const COMMON: &[&str] = &["bash", "coreutils", "busybox-static", "base-files", "iproute2"];

/// What no test looks at: documentation, and what Postgres would compile its queries with.
const NOT_NEEDED: &[&str] = &[
    "usr/share/{doc,man,info,locale,i18n,lintian,common-licenses}",
    "var/cache/*",
    "var/lib/apt",
    "usr/lib/*/{libLLVM*,libz3*,perl}",
    "usr/lib/postgresql/*/lib/{bitcode,llvmjit*}",
    "usr/share/{perl,perl5}",
];

struct Tree {
    name: &'static str,
    packages: &'static [&'static str],
    /// User and group of the program, with its id.
    user: Option<(&'static str, u32)>,
    /// Folders that configuring the packages would have made, owned by the user.
    folders: &'static [&'static str],
}

const TREES: &[Tree] = &[
    Tree {
        name: "tools",
        packages: &["curl", "procps", "libcap2-bin", "ca-certificates"],
        user: None,
        folders: &[],
    },
    Tree {
        name: "nginx",
        packages: &["nginx-light", "curl"],
        user: Some(("www-data", 33)),
        folders: &["var/lib/nginx", "var/log/nginx"],
    },
    Tree {
        name: "redis",
        packages: &["redis-server", "redis-tools"],
        user: Some(("redis", 101)),
        folders: &["var/lib/redis", "var/log/redis", "data"],
    },
    Tree {
        name: "postgres",
        packages: &["postgresql-15", "postgresql-client-15"],
        user: Some(("postgres", 102)),
        folders: &["var/lib/postgresql", "var/run/postgresql", "run/postgresql"],
    },
    Tree { name: "python", packages: &["python3"], user: None, folders: &[] },
];

/// `cargo xtask apps`: makes the trees and prints their folder.
pub(crate) fn run() -> Result<i32> {
    println!("{}", ensure()?.display());
    Ok(0)
}

/// The folder of `NAME.tar`, made at its first use.
pub(crate) fn ensure() -> Result<PathBuf> {
    let recipe: String = TREES
        .iter()
        .map(|tree| {
            format!("{} {:?} {:?} {:?};", tree.name, tree.packages, tree.user, tree.folders)
        })
        .collect();
    let key = run::key([RECIPE.as_bytes(), COMMON.join(",").as_bytes(), recipe.as_bytes()]);
    paths::cached("apps", &key, |dir| {
        run::stage("making root file systems for test images", || {
            TREES.iter().try_for_each(|tree| make(dir, tree))
        })
    })
}

fn make(dir: &Path, tree: &Tree) -> Result<()> {
    let root = dir.join(tree.name);
    let include: Vec<_> = COMMON.iter().chain(tree.packages).copied().collect();
    run::quiet(
        Command::new("mmdebstrap")
            .args(["--quiet", "--variant=extract"])
            .arg(format!("--include={}", include.join(",")))
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
            .arg("bookworm")
            .arg(&root)
            .arg(debs::sources()?),
    )?;
    run::quiet(
        Command::new("bash")
            .args(["-O", "globstar", "-c"])
            .arg(format!("rm -rf {}", NOT_NEEDED.join(" ")))
            .current_dir(&root),
    )?;
    let mut passwd = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n".to_owned();
    let mut group = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n".to_owned();
    if let Some((user, id)) = tree.user {
        passwd += &format!("{user}:x:{id}:{id}:{user}:/:/bin/sh\n");
        group += &format!("{user}:x:{id}:\n");
    }
    fs::write(root.join("etc/passwd"), passwd)?;
    fs::write(root.join("etc/group"), group)?;
    for folder in tree.folders {
        let path = root.join(folder);
        fs::create_dir_all(&path)?;
        if let Some((_, id)) = tree.user {
            chown(&path, Some(id), Some(id))?;
        }
    }
    // Alternatives and configuration that maintainer scripts would have set up.
    if !root.join("bin/sh").exists() {
        std::os::unix::fs::symlink("bash", root.join("usr/bin/sh"))?;
    }
    let tar = dir.join(format!("{}.tar", tree.name));
    run::quiet(
        Command::new("tar")
            .args(["--sort=name", "--mtime=@0", "--numeric-owner", "--exclude=./dev/*"])
            .arg("-cf")
            .arg(tar)
            .arg("-C")
            .arg(&root)
            .arg("."),
    )?;
    fs::remove_dir_all(&root)?;
    Ok(())
}
