//! CreateContainer's request to a [`ContainerSpec`] with the OCI runtime spec that containerd would
//! make of it. The guest fills in root, cgroup path and namespaces' paths.

use std::path::{Component, Path, PathBuf};

use oci_spec::image::{Config as ImageConfig, ImageConfiguration};
use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, Mount, MountBuilder, Process, Spec, SpecBuilder,
    User,
};
use sandbox::apparmor::AppArmor;
use sandbox::model::{ContainerSpec, HostNamespaces, Meta, PidMode, RootfsSpec};

use super::devices::{self, Devices};
use super::security::{CapabilitySet, Selinux};
use super::userns::{UserNamespace, user_namespace};
use super::{
    Refusal, check_meta, check_name, mounts, process, resources, seccomp, security, signal,
};
use crate::config::Config;
use crate::v1;

#[cfg(test)]
mod tests;

const OCI_VERSION: &str = "1.1.0";

/// The image as far as a container needs it.
#[derive(Debug)]
pub struct ImageParts<'a> {
    pub id: &'a str,
    /// EROFS file on the host.
    pub rootfs: PathBuf,
    pub configuration: Option<&'a ImageConfiguration>,
}

/// The pod as far as a container of it needs it.
#[derive(Debug)]
pub struct PodParts<'a> {
    pub hostname: &'a str,
    /// The request that created it.
    pub request: &'a v1::PodSandboxConfig,
}

/// An image that is mounted as a volume.
#[derive(Debug)]
pub struct ImageVolume {
    pub id: String,
    pub rootfs: PathBuf,
}

/// Finds an image of this node by a name or an id.
pub type FindImage<'a> = &'a dyn Fn(&str) -> Option<ImageVolume>;

const CONTEXT: &str = "linux.security_context";

/// Accesses files of the host that the request names. Blocks.
pub fn to_spec(
    request: &v1::ContainerConfig,
    pod: &PodParts<'_>,
    image: &ImageParts<'_>,
    find_image: FindImage<'_>,
    config: &Config,
) -> Result<ContainerSpec, Refusal> {
    let (name, attempt) = metadata(request.metadata.as_ref())?;
    check_meta(&request.labels, &request.annotations)?;
    unsupported_parts(request)?;
    let linux = request.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    let image_config = image.configuration.and_then(|c| c.config().as_ref());
    let in_context = |refusal: Refusal| refusal.in_field(CONTEXT);
    let host = own_namespaces(&context, pod).map_err(in_context)?;
    security::selinux(context.selinux_options.as_ref(), Selinux::of_host()).map_err(in_context)?;
    let user_namespace = own_user_namespace(&context, pod).map_err(in_context)?;
    let image_user = image_config.and_then(|c| c.user().as_deref()).unwrap_or_default();
    let identity = process::identity(&context, image_user).map_err(in_context)?;

    let devices = match host {
        None => devices::devices(&request.devices, &request.mounts)?,
        Some(_) => devices::of_host(&request.devices)?,
    };
    let blocks = devices.blocks.clone();
    let pid = pid_mode(&context, host);
    let available = if host.is_some() { CapabilitySet::of_process() } else { CapabilitySet::ALL };
    let asked = RequestParts {
        request,
        linux: &linux,
        context: &context,
        image: image_config,
        pid: &pid,
        available,
    };
    let oci = oci_spec(&asked, &identity, user_namespace, devices, pod.hostname, config)?;
    let stop = image_config.and_then(|c| c.stop_signal().as_deref());
    let stop_signal = signal::stop_signal(request.stop_signal, stop)?;
    let log_path = log_path(&request.log_path)?;
    let volumes = mounts::volumes(
        &request.mounts,
        &mounts::Context {
            annotations: &request.annotations,
            user_namespace,
            pod: pod.request,
            on_host: host.is_some(),
            privileged: context.privileged,
            images: &|name| find_image(name).map(|found| found.rootfs),
        },
    )?;
    let strict_volumes = mounts::strict(&pod.request.annotations, &volumes)?;
    let mut own_volumes = mounts::of_image(image_config, &volumes)?;
    if context.privileged && host.is_none() && !context.readonly_rootfs {
        own_volumes.extend(mounts::of_engines(&volumes, &own_volumes));
    }
    Ok(ContainerSpec {
        meta: Meta {
            name,
            attempt,
            labels: request.labels.clone(),
            annotations: request.annotations.clone(),
            ..Meta::default()
        },
        rootfs: RootfsSpec {
            image: image.rootfs.clone(),
            read_only: context.readonly_rootfs,
            volumes: own_volumes,
        },
        oci,
        user: identity.lookup,
        pid,
        stdin: request.stdin,
        stdin_once: request.stdin_once,
        tty: request.tty,
        log_path,
        volumes,
        devices: blocks,
        strict_groups: identity.strict,
        image_name: request.image.as_ref().map(named).unwrap_or_default(),
        image_id: image.id.to_string(),
        stop_signal,
        strict_volumes,
        origin: origin(request, find_image),
    })
}

/// The host namespaces of the pod; a container can have no others.
fn own_namespaces(
    context: &v1::LinuxContainerSecurityContext,
    pod: &PodParts<'_>,
) -> Result<Option<HostNamespaces>, Refusal> {
    let own = security::namespaces(context.namespace_options.as_ref())?;
    let of_pod = pod.request.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let of_pod = security::namespaces(of_pod.and_then(|pod| pod.namespace_options.as_ref()))?;
    let (own, pods) = (own.unwrap_or_default(), of_pod.unwrap_or_default());
    for (field, asked, has) in [
        ("network", own.network, pods.network),
        ("pid", own.pid, pods.pid),
        ("ipc", own.ipc, pods.ipc),
    ] {
        if asked && !has {
            return Err(Refusal::invalid(
                format!("namespace_options.{field}"),
                "NODE, but the pod's own namespace_options do not have it",
            ));
        }
    }
    Ok(of_pod)
}

/// A container has the user namespace of its pod.
fn own_user_namespace(
    context: &v1::LinuxContainerSecurityContext,
    pod: &PodParts<'_>,
) -> Result<Option<UserNamespace>, Refusal> {
    let of_pod = pod.request.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if context.privileged && !of_pod.is_some_and(|pod| pod.privileged) {
        return Err(Refusal::invalid(
            "privileged",
            "not set in the pod's security context; a privileged container needs a \
             privileged pod",
        ));
    }
    let own = user_namespace(context.namespace_options.as_ref())?;
    if own != user_namespace(of_pod.and_then(|pod| pod.namespace_options.as_ref()))? {
        return Err(Refusal::invalid(
            "namespace_options.userns_options",
            "not those of the pod; all its containers share one user namespace",
        ));
    }
    Ok(own)
}

/// The request as returned in statuses: with the ids of mounted images.
fn origin(request: &v1::ContainerConfig, find_image: FindImage<'_>) -> serde_json::Value {
    let mut request = request.clone();
    for image in request.mounts.iter_mut().filter_map(|mount| mount.image.as_mut()) {
        image.image_ref = find_image(&image.image).map(|found| found.id).unwrap_or_default();
    }
    serde_json::to_value(request).unwrap_or_default()
}

/// The image's name for listings.
fn named(spec: &v1::ImageSpec) -> String {
    let given = &spec.user_specified_image;
    if given.is_empty() { spec.image.clone() } else { given.clone() }
}

fn metadata(metadata: Option<&v1::ContainerMetadata>) -> Result<(String, u32), Refusal> {
    match metadata {
        Some(metadata) if !metadata.name.is_empty() => {
            check_name("metadata.name", &metadata.name)?;
            Ok((metadata.name.clone(), metadata.attempt))
        }
        _ => Err(Refusal::invalid("metadata.name", "empty; a container needs a name")),
    }
}

fn unsupported_parts(request: &v1::ContainerConfig) -> Result<(), Refusal> {
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

/// A request without namespace options gets its own PID namespace, as kubelets request by
/// default; in a given message, POD (zero) means the pod's.
fn pid_mode(context: &v1::LinuxContainerSecurityContext, host: Option<HostNamespaces>) -> PidMode {
    let Some(options) = &context.namespace_options else { return PidMode::Container };
    match options.pid() {
        v1::NamespaceMode::Container => PidMode::Container,
        v1::NamespaceMode::Target => PidMode::Target(options.target_id.clone()),
        // The pod's are the host's.
        v1::NamespaceMode::Pod if host.is_some_and(|host| host.pid) => PidMode::Node,
        v1::NamespaceMode::Pod => PidMode::Pod,
        v1::NamespaceMode::Node => PidMode::Node,
    }
}

/// Parts of the request, and the image's configuration.
struct RequestParts<'a> {
    request: &'a v1::ContainerConfig,
    linux: &'a v1::LinuxContainerConfig,
    context: &'a v1::LinuxContainerSecurityContext,
    image: Option<&'a ImageConfig>,
    pid: &'a PidMode,
    available: CapabilitySet,
}

fn oci_spec(
    asked: &RequestParts<'_>,
    identity: &process::Identity,
    user_namespace: Option<UserNamespace>,
    devices: Devices,
    hostname: &str,
    config: &Config,
) -> Result<Spec, Refusal> {
    let context = asked.context;
    let Devices { blocks: _, nodes, rules } = devices;
    let capabilities = security::capabilities(context, asked.available)
        .map_err(|refusal| refusal.in_field(CONTEXT))?;
    let profile = match seccomp::choose(context, config.default_seccomp)
        .map_err(|refusal| refusal.in_field(CONTEXT))?
    {
        seccomp::Choice::Default => {
            Some(seccomp::default_profile(&capabilities.bounding().clone().unwrap_or_default()))
        }
        seccomp::Choice::Unconfined => None,
        seccomp::Choice::File(path) => Some(seccomp::load(&path)?),
    };
    let requested = asked.linux.resources.clone().unwrap_or_default();
    let mut limits =
        resources::to_oci(&requested).map_err(|refusal| refusal.in_field("linux.resources"))?;
    limits.set_devices(Some(device_rules(rules, context.privileged)?));

    let mut inner = Linux::default();
    inner.set_namespaces(Some(namespaces(asked.pid, user_namespace)?));
    if let Some(ids) = user_namespace {
        inner.set_uid_mappings(Some(ids.uids.to_oci()?));
        inner.set_gid_mappings(Some(ids.gids.to_oci()?));
    }
    inner.set_resources(Some(limits));
    inner.set_seccomp(profile.map(seccomp::for_guest));
    inner.set_devices(Some(nodes).filter(|nodes| !nodes.is_empty()));
    // `procMount: Unmasked` has none.
    let paths = |given: &[String]| {
        Some(given.to_vec()).filter(|given| !given.is_empty() && !context.privileged)
    };
    inner.set_masked_paths(paths(&context.masked_paths));
    inner.set_readonly_paths(paths(&context.readonly_paths));

    SpecBuilder::default()
        .version(OCI_VERSION)
        .hostname(hostname)
        .process(process_of(asked, identity, capabilities, hostname)?)
        .mounts(default_mounts(context.privileged)?)
        .linux(inner)
        .build()
        .map(|mut spec| {
            spec.set_root(None);
            spec
        })
        .map_err(internal)
}

fn process_of(
    asked: &RequestParts<'_>,
    identity: &process::Identity,
    capabilities: LinuxCapabilities,
    hostname: &str,
) -> Result<Process, Refusal> {
    let RequestParts { request, linux, context, image, pid: _, available: _ } = asked;
    let mut user = User::default();
    user.set_additional_gids(Some(identity.groups.clone()).filter(|groups| !groups.is_empty()));
    let mut process = Process::default();
    process.set_terminal(Some(request.tty));
    process.set_user(user);
    process.set_args(Some(process::command_line(&request.command, &request.args, *image)?));
    process.set_env(Some(process::environment(hostname, request.tty, &request.envs, *image)?));
    process.set_cwd(process::working_dir(&request.working_dir, *image)?);
    process.set_capabilities(Some(capabilities));
    process.set_rlimits(None);
    process.set_no_new_privileges(Some(context.no_new_privs));
    let profile = security::apparmor(context, &AppArmor::of_host());
    process.set_apparmor_profile(profile.map_err(|refusal| refusal.in_field(CONTEXT))?);
    let score = linux.resources.as_ref().map_or(0, |resources| resources.oom_score_adj);
    process.set_oom_score_adj(i32::try_from(score).ok());
    Ok(process)
}

/// Network, IPC and UTS belong to the pod: the guest joins the container to them.
fn namespaces(pid: &PidMode, user: Option<UserNamespace>) -> Result<Vec<LinuxNamespace>, Refusal> {
    let mut types = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if *pid == PidMode::Container {
        types.push(LinuxNamespaceType::Pid);
    }
    if user.is_some() {
        types.push(LinuxNamespaceType::User);
    }
    types
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build().map_err(internal))
        .collect()
}

/// All devices for a privileged container, else the requested ones; the guest's agent
/// adds the default ones (null, zero, full, random, urandom, tty, ptmx, ptys, tun).
fn device_rules(
    asked: Vec<LinuxDeviceCgroup>,
    privileged: bool,
) -> Result<Vec<LinuxDeviceCgroup>, Refusal> {
    let all = LinuxDeviceCgroupBuilder::default()
        .allow(privileged)
        .access("rwm")
        .build()
        .map_err(internal)?;
    Ok(std::iter::once(all).chain(asked.into_iter().filter(|_| !privileged)).collect())
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
