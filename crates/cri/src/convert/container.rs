//! CreateContainer's request to a [`ContainerSpec`] with the OCI runtime spec that containerd would
//! make of it. The guest fills in root, cgroup path and namespaces' paths.

use std::path::{Component, Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Linux, LinuxDeviceCgroupBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources,
    Mount, MountBuilder, Process, Spec, SpecBuilder, User,
};
use sandbox::model::{ContainerSpec, Meta, PidMode, RootfsSpec};

use super::{Refusal, mounts, process, resources, seccomp, security, signal};
use crate::config::Config;
use crate::v1;

const OCI_VERSION: &str = "1.1.0";

/// The image as far as a container needs it.
#[derive(Debug)]
pub struct ImageParts<'a> {
    pub id: &'a str,
    /// EROFS file on the host.
    pub rootfs: PathBuf,
    pub configuration: Option<&'a ImageConfiguration>,
}

#[allow(deprecated)] // old kubelets still name profiles in the deprecated field
pub fn to_spec(
    request: &v1::ContainerConfig,
    hostname: &str,
    image: &ImageParts<'_>,
    config: &Config,
) -> Result<ContainerSpec, Refusal> {
    let (name, attempt) = metadata(request.metadata.as_ref())?;
    unsupported_parts(request)?;
    let linux = request.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    security::namespaces(context.namespace_options.as_ref())
        .and_then(|()| {
            security::mandatory_access(
                context.selinux_options.as_ref(),
                context.apparmor.as_ref(),
                &context.apparmor_profile,
            )
        })
        .map_err(|refusal| refusal.inside("linux.security_context"))?;

    let image_config = image.configuration.and_then(|c| c.config().as_ref());
    let image_user = image_config.and_then(|c| c.user().as_deref()).unwrap_or_default();
    let identity = process::identity(&context, image_user)
        .map_err(|refusal| refusal.inside("linux.security_context"))?;
    let oci = oci_spec(request, &linux, &context, &identity, hostname, image_config, config)?;
    let stop = image_config.and_then(|c| c.stop_signal().as_deref());
    Ok(ContainerSpec {
        meta: Meta {
            name,
            attempt,
            labels: request.labels.clone(),
            annotations: request.annotations.clone(),
            ..Meta::default()
        },
        rootfs: RootfsSpec { image: image.rootfs.clone(), read_only: context.readonly_rootfs },
        oci,
        user: identity.lookup,
        pid: pid_mode(&context),
        stdin: request.stdin,
        stdin_once: request.stdin_once,
        tty: request.tty,
        log_path: log_path(&request.log_path)?,
        volumes: mounts::volumes(&request.mounts)?,
        devices: Vec::new(),
        strict_groups: false,
        image_name: request.image.as_ref().map(named).unwrap_or_default(),
        image_id: image.id.to_string(),
        stop_signal: signal::stop_signal(request.stop_signal, stop)?,
        origin: serde_json::to_value(request).unwrap_or_default(),
    })
}

/// The name people know the image by, for they read it in listings.
fn named(spec: &v1::ImageSpec) -> String {
    let given = &spec.user_specified_image;
    if given.is_empty() { spec.image.clone() } else { given.clone() }
}

fn metadata(metadata: Option<&v1::ContainerMetadata>) -> Result<(String, u32), Refusal> {
    match metadata {
        Some(metadata) if !metadata.name.is_empty() => {
            Ok((metadata.name.clone(), metadata.attempt))
        }
        _ => Err(Refusal::invalid("metadata.name", "empty; a container needs a name")),
    }
}

fn unsupported_parts(request: &v1::ContainerConfig) -> Result<(), Refusal> {
    if let Some(device) = request.devices.first() {
        return Err(Refusal::unsupported(
            "devices",
            format!("{}: devices of the host do not reach into a pod's VM", device.host_path),
        ));
    }
    if let Some(device) = request.cdi_devices.first() {
        return Err(Refusal::unsupported(
            "CDI_devices",
            format!("{}: devices of the host do not reach into a pod's VM", device.name),
        ));
    }
    if request.windows.is_some() {
        return Err(Refusal::unsupported("windows", "this is a Linux node"));
    }
    Ok(())
}

/// Below the pod's log folder, wherever that is.
fn log_path(path: &str) -> Result<String, Refusal> {
    let inside = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside || path.contains('\0') {
        return Err(Refusal::invalid(
            "log_path",
            format!("{path:?} is not a path below the pod's log_directory"),
        ));
    }
    Ok(path.to_string())
}

/// A request without any word on namespaces gets processes of its own, as kubelets ask for by
/// default; within the message POD is the interface's zero and means what it says.
fn pid_mode(context: &v1::LinuxContainerSecurityContext) -> PidMode {
    let Some(options) = &context.namespace_options else { return PidMode::Container };
    match options.pid() {
        v1::NamespaceMode::Container => PidMode::Container,
        v1::NamespaceMode::Target => PidMode::Target(options.target_id.clone()),
        v1::NamespaceMode::Pod | v1::NamespaceMode::Node => PidMode::Pod,
    }
}

fn oci_spec(
    request: &v1::ContainerConfig,
    linux: &v1::LinuxContainerConfig,
    context: &v1::LinuxContainerSecurityContext,
    identity: &process::Identity,
    hostname: &str,
    image: Option<&oci_spec::image::Config>,
    config: &Config,
) -> Result<Spec, Refusal> {
    let capabilities = security::capabilities(context)
        .map_err(|refusal| refusal.inside("linux.security_context"))?;
    let profile = match seccomp::choose(context, config.default_seccomp)
        .map_err(|refusal| refusal.inside("linux.security_context"))?
    {
        seccomp::Choice::Default => {
            Some(seccomp::default_profile(&capabilities.bounding().clone().unwrap_or_default()))
        }
        seccomp::Choice::Unconfined => None,
        seccomp::Choice::File(path) => Some(seccomp::load(&path)?),
    };
    let requested = linux.resources.clone().unwrap_or_default();
    let mut limits =
        resources::to_oci(&requested).map_err(|refusal| refusal.inside("linux.resources"))?;
    device_rules(&mut limits, context.privileged)?;

    let mut user = User::default();
    user.set_uid(identity.uid);
    user.set_gid(identity.gid);
    user.set_additional_gids(Some(identity.groups.clone()).filter(|groups| !groups.is_empty()));
    let mut process = Process::default();
    process.set_terminal(Some(request.tty));
    process.set_user(user);
    process.set_args(Some(process::command_line(&request.command, &request.args, image)?));
    process.set_env(Some(process::environment(hostname, request.tty, &request.envs, image)?));
    process.set_cwd(process::working_dir(&request.working_dir, image)?);
    process.set_capabilities(Some(capabilities));
    process.set_rlimits(None);
    process.set_no_new_privileges(Some(context.no_new_privs));
    process.set_apparmor_profile(None);
    process.set_oom_score_adj(i32::try_from(requested.oom_score_adj).ok());

    let mut inner = Linux::default();
    inner.set_namespaces(Some(namespaces(pid_mode(context))?));
    inner.set_resources(Some(limits));
    inner.set_seccomp(profile.map(seccomp::for_guest));
    inner.set_devices(None);
    let paths = |given: &[String], default: &[&str]| {
        let list = if given.is_empty() {
            default.iter().map(ToString::to_string).collect()
        } else {
            given.to_vec()
        };
        Some(list).filter(|_| !context.privileged)
    };
    inner.set_masked_paths(paths(&context.masked_paths, &security::MASKED_PATHS));
    inner.set_readonly_paths(paths(&context.readonly_paths, &security::READONLY_PATHS));

    SpecBuilder::default()
        .version(OCI_VERSION)
        .hostname(hostname)
        .process(process)
        .mounts(default_mounts(context.privileged)?)
        .linux(inner)
        .build()
        .map(|mut spec| {
            spec.set_root(None);
            spec
        })
        .map_err(internal)
}

/// Network, IPC and UTS belong to the pod: the guest joins the container to them.
fn namespaces(pid: PidMode) -> Result<Vec<oci_spec::runtime::LinuxNamespace>, Refusal> {
    let mut types = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if pid == PidMode::Container {
        types.push(LinuxNamespaceType::Pid);
    }
    types
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build().map_err(internal))
        .collect()
}

/// Everything for a privileged container, else only what the guest's runtime adds by itself (null,
/// zero, full, random, urandom, tty, ptys).
fn device_rules(limits: &mut LinuxResources, privileged: bool) -> Result<(), Refusal> {
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(privileged)
        .access("rwm")
        .build()
        .map_err(internal)?;
    limits.set_devices(Some(vec![rule]));
    Ok(())
}

/// What containerd mounts into every container. /dev/shm is the pod's and comes from the guest.
fn default_mounts(privileged: bool) -> Result<Vec<Mount>, Refusal> {
    let access = if privileged { "rw" } else { "ro" };
    let table: [(&str, &str, &str, &[&str]); 6] = [
        ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ];
    table
        .into_iter()
        .map(|(destination, kind, source, options)| {
            MountBuilder::default()
                .destination(destination)
                .typ(kind)
                .source(source)
                .options(options.iter().map(ToString::to_string).collect::<Vec<_>>())
                .build()
                .map_err(internal)
        })
        .collect()
}

fn internal(error: oci_spec::OciSpecError) -> Refusal {
    Refusal::invalid("config", error.to_string())
}

#[cfg(test)]
mod tests {
    use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder};

    use super::*;

    fn image() -> ImageConfiguration {
        let config = ConfigBuilder::default()
            .cmd(vec!["/bin/server".to_string()])
            .user("web")
            .stop_signal("SIGQUIT")
            .build()
            .unwrap();
        ImageConfigurationBuilder::default().config(config).build().unwrap()
    }

    fn request() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 3 }),
            image: Some(v1::ImageSpec { image: "reg/web:1".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn convert(request: &v1::ContainerConfig) -> Result<ContainerSpec, Refusal> {
        let image = image();
        let parts = ImageParts { id: "sha256:1", rootfs: "/e".into(), configuration: Some(&image) };
        to_spec(request, "pod", &parts, &Config::default())
    }

    fn secured(context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
        let linux =
            v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
        v1::ContainerConfig { linux: Some(linux), ..request() }
    }

    #[test]
    fn a_plain_request_gets_containerds_defaults() {
        let spec = convert(&request()).unwrap();
        assert_eq!((spec.meta.name.as_str(), spec.meta.attempt), ("c", 3));
        assert_eq!((spec.user.as_str(), spec.stop_signal), ("web", 3));
        assert_eq!(spec.pid, PidMode::Container);
        let linux = spec.oci.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some());
        assert_eq!(linux.masked_paths().as_ref().unwrap().len(), security::MASKED_PATHS.len());
        let process = spec.oci.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["/bin/server"]);
        assert_eq!(process.no_new_privileges(), Some(false));
        let sys = |m: &&Mount| m.destination() == Path::new("/sys");
        let sys = spec.oci.mounts().as_ref().unwrap().iter().find(sys).unwrap();
        assert!(sys.options().as_ref().unwrap().contains(&"ro".to_string()));
        assert!(spec.oci.root().is_none());
    }

    #[test]
    fn a_privileged_container_has_no_masks_and_no_filter() {
        let spec = convert(&secured(v1::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }))
        .unwrap();
        let linux = spec.oci.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none() && linux.masked_paths().is_none());
        assert!(linux.readonly_paths().is_none());
        assert!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        let mounts = spec.oci.mounts().as_ref().unwrap();
        assert!(!mounts.iter().any(|m| m.options().iter().flatten().any(|o| o == "ro")));
    }

    #[test]
    fn pid_modes_are_kept() {
        let with = |pid, target: &str| {
            let options =
                v1::NamespaceOption { pid, target_id: target.into(), ..Default::default() };
            convert(&secured(v1::LinuxContainerSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }))
            .unwrap()
        };
        let own = |spec: &ContainerSpec| {
            let namespaces = spec.oci.linux().as_ref().unwrap().namespaces().clone().unwrap();
            namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Pid)
        };
        let container = with(1, "");
        assert!(container.pid == PidMode::Container && own(&container));
        let pod = with(0, "");
        assert!(pod.pid == PidMode::Pod && !own(&pod));
        assert_eq!(with(3, "abc").pid, PidMode::Target("abc".into()));
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        let host_pid = v1::NamespaceOption { pid: 2, ..Default::default() };
        let table = [
            (v1::ContainerConfig { metadata: None, ..request() }, "metadata.name"),
            (v1::ContainerConfig { log_path: "../x".into(), ..request() }, "log_path"),
            (v1::ContainerConfig { log_path: "/x".into(), ..request() }, "log_path"),
            (v1::ContainerConfig { devices: vec![v1::Device::default()], ..request() }, "devices"),
            (
                v1::ContainerConfig { cdi_devices: vec![v1::CdiDevice::default()], ..request() },
                "CDI_devices",
            ),
            (v1::ContainerConfig { working_dir: "x".into(), ..request() }, "working_dir"),
            (v1::ContainerConfig { stop_signal: 999, ..request() }, "stop_signal"),
            (
                secured(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(host_pid),
                    ..Default::default()
                }),
                "linux.security_context.namespace_options.pid",
            ),
        ];
        for (request, field) in table {
            let text = convert(&request).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
