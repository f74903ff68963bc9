//! Mounts of a container: the default ones (runtime-spec config-linux.md, "Default Filesystems"),
//! those of the OCI spec, and its volumes.

use std::path::{Component, Path};

use oci_spec::runtime::{Mount, MountBuilder};

use super::spec_context::{Bind, SpecContext};
use crate::error::{Error, Result};

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount> {
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
        .map_err(|error| Error::invalid("oci_spec.mounts", error.to_string()))
}

fn text<'a>(path: &'a Path, what: &'static str) -> Result<&'a str> {
    path.to_str().ok_or_else(|| Error::invalid(what, "a path is not UTF-8"))
}

fn defaults(context: &SpecContext<'_>) -> Result<[Mount; 7]> {
    Ok([
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        // The pod's, shared by all its containers; the OCI spec cannot override it.
        mount(
            "/dev/shm",
            "bind",
            text(context.shm, "shm")?,
            &["rbind", "nosuid", "noexec", "nodev"],
        )?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"])?,
    ])
}

/// Changes a default mount for a user namespace: sysfs and mqueue cannot be mounted there, as the
/// pod's network and IPC namespaces belong to the initial one, so the guest's are bind-mounted.
fn in_user_namespace(mut mount: Mount, context: &SpecContext<'_>) -> Mount {
    let Some(userns) = &context.userns else { return mount };
    let mut options = mount.options().clone().unwrap_or_default();
    let source = match mount.typ().as_deref() {
        Some("sysfs") => Path::new("/sys"),
        Some("mqueue") => userns.mqueue,
        Some("devpts") if !userns.mapping.has_group(5) => {
            options.retain(|option| option != "gid=5");
            mount.set_options(Some(options));
            return mount;
        }
        _ => return mount,
    };
    options.insert(0, "rbind".to_owned());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source.to_owned()));
    mount.set_options(Some(options));
    mount
}

pub(super) fn complete(given: Vec<Mount>, context: &SpecContext<'_>) -> Result<Vec<Mount>> {
    for destination in given.iter().map(Mount::destination) {
        check_destination(destination)?;
    }
    for bind in context.binds {
        check_destination(&bind.destination)?;
        if bind.destination == Path::new("/dev") {
            return Err(Error::invalid("volumes", "a volume cannot be mounted at /dev"));
        }
    }
    let is_volume = |path: &Path| context.binds.iter().any(|bind| bind.destination == path);
    let mut all: Vec<Mount> = Vec::new();
    for default in defaults(context)? {
        let destination = default.destination();
        if is_volume(destination) {
            continue;
        }
        let own = given.iter().find(|mount| mount.destination() == destination);
        let mount = match own {
            Some(own) if destination != Path::new("/dev/shm") => own.clone(),
            _ => default,
        };
        all.push(in_user_namespace(mount, context));
    }
    for mount in given {
        let known = all.iter().any(|present| present.destination() == mount.destination());
        if !known && !is_volume(mount.destination()) {
            all.push(mount);
        }
    }
    for Bind { source, destination, .. } in context.binds {
        // Propagation and flags were set on the staged mount.
        let source = text(source, "volumes")?;
        all.push(mount(text(destination, "volumes")?, "bind", source, &["rbind"])?);
    }
    // Parents before the mounts below them.
    all.sort_by_key(|mount| mount.destination().components().count());
    Ok(all)
}

pub(super) fn check_destination(path: &Path) -> Result<()> {
    let plain = path.is_absolute()
        && path != Path::new("/")
        && !path.components().any(|component| component == Component::ParentDir);
    if plain {
        Ok(())
    } else {
        Err(Error::invalid(
            "mount destination",
            format!("{} is not an absolute path below /", path.display()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::tests::context;
    use super::*;

    fn bind(destination: &str) -> Bind {
        Bind { source: "/v".into(), destination: destination.into(), directory: true }
    }

    fn places(mounts: &[Mount]) -> Vec<&str> {
        mounts.iter().filter_map(|mount| mount.destination().to_str()).collect()
    }

    #[test]
    fn every_container_gets_the_pods_shm_and_volumes_in_order() {
        let binds = [bind("/data/x/y"), bind("/data"), bind("/dev/termination-log")];
        let given = vec![
            mount("/dev/shm", "tmpfs", "shm", &[]).unwrap(),
            mount("/sys", "sysfs", "sysfs", &["rw"]).unwrap(),
            mount("/tmp", "tmpfs", "tmpfs", &[]).unwrap(),
        ];
        let mounts = complete(given, &context(&binds)).unwrap();
        let at = |path: &str| places(&mounts).iter().position(|place| *place == path).unwrap();
        assert_eq!(mounts[at("/dev/shm")].source().as_deref(), Some(Path::new("/run/nacelle/shm")));
        assert_eq!(mounts[at("/sys")].options().as_deref().unwrap(), ["rw"]);
        assert!(at("/dev") < at("/dev/termination-log"));
        assert!(at("/data") < at("/data/x/y") && at("/sys") < at("/sys/fs/cgroup"));
        assert_eq!(mounts.len(), 11);
    }

    #[test]
    fn a_volume_replaces_a_default_mount_except_dev() {
        let mounts = complete(Vec::new(), &context(&[bind("/dev/shm")])).unwrap();
        let all = places(&mounts);
        assert_eq!(all.iter().filter(|place| **place == "/dev/shm").count(), 1);
        let own = mounts.iter().find(|mount| mount.destination() == Path::new("/dev/shm"));
        assert_eq!(own.unwrap().source().as_deref(), Some(Path::new("/v")));
        for bad in ["/dev", "/", "x", "/a/../b"] {
            assert!(complete(Vec::new(), &context(&[bind(bad)])).is_err(), "{bad}");
        }
    }
}
