//! `nacelle run` and `run-pod`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use cri::convert::security::{MASKED_PATHS, READONLY_PATHS};
use cri::v1;

use super::arguments::{OWN_FAILURE, Run, RunPod};
use super::connect::{Client, call_error};
use super::interrupts::Interrupts;
use super::logs::{self, Reader};
use super::private::Private;
use super::remove::{self, LOGS_ANNOTATION};
use super::session::{self, Carry, Session};
use super::{find, images, volume};
use crate::DEFAULT_NETWORK_ANNOTATION;
use crate::api::AttachStart;
use crate::api::session_input::Input;

/// Namespace of the pods that this command creates.
const NAMESPACE: &str = "nacelle";
/// CFS period in microseconds; the kubelet's default.
const PERIOD: i64 = 100_000;
/// Between SIGTERM and SIGKILL of the container, after an interrupt.
const GRACE_SECONDS: i64 = 10;

/// The exit code of a process, which is then that of nacelle.
pub(super) fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(OWN_FAILURE))
}

/// `NAME=value` unchanged, `NAME` with its value in this process.
pub(super) fn environment(given: &[String]) -> Result<Vec<String>> {
    given
        .iter()
        .map(|entry| match entry.split_once('=') {
            Some(("", _)) => Err(anyhow!("--env {entry:?}: the name is missing")),
            Some(_) => Ok(entry.clone()),
            None => std::env::var(entry)
                .map(|value| format!("{entry}={value}"))
                .map_err(|_| anyhow!("--env {entry:?}: the variable is not set here")),
        })
        .collect()
}

pub(super) async fn run(socket: Option<&Path>, options: Run) -> Result<ExitCode> {
    if options.detach && (options.rm || options.interactive) {
        bail!("--detach cannot be combined with --rm or --interactive");
    }
    let (mut client, private) = match Client::connect(socket).await {
        Ok(client) => {
            let private = Private::join(&client);
            (client, private)
        }
        Err(error) if socket.is_some() => return Err(error),
        Err(_) => {
            let private = Private::start().await?;
            (private.connect().await?, Some(private))
        }
    };
    let outcome = run_with(&mut client, &options).await;
    if let Some(private) = private {
        private.leave().await;
    }
    outcome
}

async fn run_with(client: &mut Client, options: &Run) -> Result<ExitCode> {
    let container = container_config(options)?;
    if images::lookup(client, &options.image).await?.is_none() {
        eprintln!("Unable to find image '{}' locally, pulling it", options.image);
        images::fetch(client, &options.image, String::new(), String::new()).await?;
    }
    let pod = start_pod(client, options).await?;
    let outcome = run_in(client, options, &pod, container).await;
    let failed_early = outcome.is_err();
    if options.rm || failed_early {
        let removed = remove::remove_pod(client, &pod).await;
        if outcome.is_ok() {
            removed?;
        }
    } else if !options.detach {
        // Its logs and status are kept, its VM ends.
        remove::stop_pod(client, &pod.id).await?;
    }
    outcome
}

async fn run_in(
    client: &mut Client,
    options: &Run,
    pod: &v1::PodSandbox,
    config: v1::ContainerConfig,
) -> Result<ExitCode> {
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config),
        sandbox_config: None,
    };
    let id = client
        .runtime
        .create_container(request)
        .await
        .map_err(call_error)?
        .into_inner()
        .container_id;
    if options.detach {
        start(client, &id).await?;
        // A failure would remove the pod.
        let _ = crate::say(format_args!("{}", pod.id));
        return Ok(ExitCode::SUCCESS);
    }
    let code = if options.interactive || options.tty {
        attached(client, options, &id).await?
    } else {
        followed(client, &id).await?
    };
    Ok(exit_code(code))
}

async fn start(client: &mut Client, id: &str) -> Result<()> {
    let request = v1::StartContainerRequest { container_id: id.into() };
    client.runtime.start_container(request).await.map(drop).map_err(call_error)
}

/// Runs with the terminal or standard input of this process. Attaches before the start where
/// nacelled allows it, so that no output is lost.
async fn attached(client: &mut Client, options: &Run, id: &str) -> Result<i32> {
    let mut interrupts = Interrupts::new()?;
    let carry = Carry { stdin: options.interactive, tty: options.tty };
    let attach = || session::inputs(Input::Attach(AttachStart { container: id.into() }));
    let (mut sender, inputs) = attach();
    let mut reply = client.debug.attach(inputs).await;
    start(client, id).await?;
    if reply.is_err() {
        let (next_sender, inputs) = attach();
        sender = next_sender;
        reply = client.debug.attach(inputs).await;
    }
    let mut session = Session::start(sender, reply, carry).await?;
    tokio::select! {
        code = session.drive() => return code,
        () = interrupts.next() => {}
    }
    session.ignore_write_errors();
    let stop = remove::stop_container(client, id, GRACE_SECONDS);
    // Output until the end of the container is shown.
    let (code, ()) = tokio::try_join!(session.drive(), stop)?;
    Ok(code)
}

/// Runs without input: the output is read from the log, which has all of it.
async fn followed(client: &mut Client, id: &str) -> Result<i32> {
    let mut interrupts = Interrupts::new()?;
    start(client, id).await?;
    let log = logs::status(client, id).await?.log_path;
    let mut reader = Reader::new(PathBuf::from(log), false);
    tokio::select! {
        status = reader.follow(client, id) => return Ok(status?.exit_code),
        () = interrupts.next() => {}
    }
    remove::stop_container(client, id, GRACE_SECONDS).await?;
    Ok(reader.follow(client, id).await?.exit_code)
}

fn container_config(options: &Run) -> Result<v1::ContainerConfig> {
    let envs = environment(&options.env)?
        .into_iter()
        .filter_map(|entry| {
            let (key, value) = entry.split_once('=')?;
            Some(v1::KeyValue { key: key.into(), value: value.as_bytes().to_vec() })
        })
        .collect();
    let (command, args) = match &options.entrypoint {
        Some(program) => (vec![program.clone()], options.command.clone()),
        None => (vec![], options.command.clone()),
    };
    let mut security = v1::LinuxContainerSecurityContext {
        privileged: options.privileged,
        readonly_rootfs: options.read_only,
        namespace_options: Some(v1::NamespaceOption {
            pid: v1::NamespaceMode::Container as i32,
            ..Default::default()
        }),
        // A request without a profile means unconfined.
        seccomp: Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::RuntimeDefault as i32,
            ..Default::default()
        }),
        masked_paths: MASKED_PATHS.map(String::from).into(),
        readonly_paths: READONLY_PATHS.map(String::from).into(),
        ..Default::default()
    };
    if let Some(user) = &options.user {
        set_user(&mut security, user)?;
    }
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name(options.name.as_deref())?, attempt: 0 }),
        image: Some(v1::ImageSpec { image: options.image.clone(), ..Default::default() }),
        command,
        args,
        working_dir: options.workdir.clone().unwrap_or_default(),
        envs,
        mounts: options.volume.iter().map(|text| volume::volume(text)).collect::<Result<_>>()?,
        log_path: "0.log".into(),
        stdin: options.interactive,
        stdin_once: options.interactive,
        tty: options.tty,
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(limits(options.cpus, options.memory.as_deref())?),
            security_context: Some(security),
        }),
        ..Default::default()
    })
}

fn set_user(security: &mut v1::LinuxContainerSecurityContext, text: &str) -> Result<()> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    match user.parse::<u32>() {
        Ok(number) => security.run_as_user = Some(v1::Int64Value { value: i64::from(number) }),
        Err(_) => security.run_as_username = user.to_string(),
    }
    if let Some(group) = group {
        let number: u32 =
            group.parse().map_err(|_| anyhow!("--user {text:?}: the group has to be a number"))?;
        security.run_as_group = Some(v1::Int64Value { value: i64::from(number) });
    }
    Ok(())
}

fn limits(cpus: Option<f64>, memory: Option<&str>) -> Result<v1::LinuxContainerResources> {
    let mut limits = v1::LinuxContainerResources::default();
    if let Some(cpus) = cpus {
        // cpu.max refuses quotas below 1 ms.
        if !(cpus.is_finite() && (0.01..=1024.0).contains(&cpus)) {
            bail!("--cpus {cpus}: use a number between 0.01 and 1024");
        }
        limits.cpu_period = PERIOD;
        limits.cpu_quota = (cpus * PERIOD as f64).round() as i64;
    }
    if let Some(memory) = memory {
        limits.memory_limit_in_bytes = volume::size(memory)?;
    }
    Ok(limits)
}

fn name(given: Option<&str>) -> Result<String> {
    let Some(name) = given else { return Ok("main".into()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
    if name.is_empty()
        || name.len() > 63
        || !name.chars().all(plain)
        || name.starts_with(['.', '-'])
    {
        bail!("--name {name:?}: use up to 63 letters, digits, '-', '_' and '.'");
    }
    Ok(name.to_string())
}

fn random() -> Result<String> {
    let text =
        std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("reading a random id")?;
    Ok(text.trim().to_string())
}

async fn start_pod(client: &mut Client, options: &Run) -> Result<v1::PodSandbox> {
    let ports = options.publish.iter().map(|text| volume::port(text)).collect::<Result<_>>()?;
    let limits = limits(options.cpus, options.memory.as_deref())?;
    let context =
        v1::LinuxSandboxSecurityContext { privileged: options.privileged, ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig {
        resources: Some(limits),
        security_context: Some(context),
        ..Default::default()
    };
    make_pod(client, options.name.as_deref(), options.hostname.as_deref(), ports, linux).await
}

pub(super) async fn run_pod(client: &mut Client, options: RunPod) -> Result<()> {
    let limits = limits(options.cpus, options.memory.as_deref())?;
    let linux = v1::LinuxPodSandboxConfig { resources: Some(limits), ..Default::default() };
    let pod = make_pod(client, options.name.as_deref(), None, vec![], linux).await?;
    crate::say(format_args!("{}", pod.id))?;
    Ok(())
}

async fn make_pod(
    client: &mut Client,
    given: Option<&str>,
    hostname: Option<&str>,
    port_mappings: Vec<v1::PortMapping>,
    linux: v1::LinuxPodSandboxConfig,
) -> Result<v1::PodSandbox> {
    let uid = random()?;
    let name = match given {
        Some(_) => name(given)?,
        None => format!("run-{}", &uid[..8]),
    };
    let taken = |pod: &v1::PodSandbox| {
        pod.metadata.as_ref().is_some_and(|m| m.name == name && m.namespace == NAMESPACE)
    };
    if find::all_pods(client).await?.iter().any(taken) {
        bail!("the name {name} is in use: choose another one, or `nacelle rm -f {name}` first");
    }
    let logs = remove::logs_folder(client).await?.join(format!("{name}_{}", &uid[..8]));
    let logs = logs.to_string_lossy().into_owned();
    let metadata = v1::PodSandboxMetadata { name, uid, namespace: NAMESPACE.into(), attempt: 0 };
    let request = v1::PodSandboxConfig {
        hostname: hostname.unwrap_or(&metadata.name).to_string(),
        metadata: Some(metadata),
        log_directory: logs.clone(),
        port_mappings,
        annotations: BTreeMap::from([
            (LOGS_ANNOTATION.to_string(), logs),
            (DEFAULT_NETWORK_ANNOTATION.to_string(), "true".to_string()),
        ]),
        dns_config: host_dns(&RESOLV_CONF),
        linux: Some(linux),
        ..Default::default()
    };
    let request =
        v1::RunPodSandboxRequest { config: Some(request), runtime_handler: String::new() };
    let id = client.runtime.run_pod_sandbox(request).await.map_err(call_error)?.into_inner();
    let pods = find::all_pods(client).await?;
    pods.into_iter()
        .find(|pod| pod.id == id.pod_sandbox_id)
        .ok_or_else(|| anyhow!("pod {} was removed right after its start", id.pod_sandbox_id))
}

/// Resolver configurations of the node. The second one has the real name servers where the first one
/// names systemd-resolved's own address.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The node's name servers, without those on loopback, which pods cannot reach.
fn host_dns(paths: &[impl AsRef<Path>]) -> Option<v1::DnsConfig> {
    paths
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .map(|text| parse_resolv_conf(&text))
        .find(|dns| !dns.servers.is_empty())
}

fn parse_resolv_conf(text: &str) -> v1::DnsConfig {
    let mut dns = v1::DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let address = words.next().and_then(|a| a.parse::<std::net::IpAddr>().ok());
                dns.servers.extend(address.filter(|a| !a.is_loopback()).map(|a| a.to_string()));
            }
            Some("search") => dns.searches = words.map(str::to_string).collect(),
            Some("options") => dns.options.extend(words.map(str::to_string)),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::arguments::{Arguments, Command};
    use super::*;

    fn options(words: &[&str]) -> Run {
        let words = ["nacelle", "run"].iter().chain(words);
        let Command::Run(run) = Arguments::parse_from(words).command else { panic!("not a run") };
        run
    }

    #[test]
    fn options_become_a_container() {
        let config = container_config(&options(&[
            "-it",
            "-e",
            "A=b=c",
            "--cpus",
            "1.5",
            "-m",
            "64m",
            "-u",
            "7:8",
            "--entrypoint",
            "/e",
            "image",
            "x",
        ]))
        .unwrap();
        assert_eq!((config.command, config.args), (vec!["/e".to_string()], vec!["x".to_string()]));
        assert_eq!(config.envs[0].value, b"b=c");
        assert!(config.tty && config.stdin);
        let linux = config.linux.unwrap();
        let limits = linux.resources.unwrap();
        assert_eq!((limits.cpu_quota, limits.memory_limit_in_bytes), (150_000, 64 << 20));
        let security = linux.security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 7);
        assert_eq!(security.run_as_group.unwrap().value, 8);
    }

    #[test]
    fn invalid_options_are_refused_before_anything_starts() {
        for words in [
            &["--cpus", "0", "image"][..],
            &["-m", "much", "image"],
            &["-e", "=x", "image"],
            &["-u", "a:staff", "image"],
            &["--name", "a/b", "image"],
        ] {
            assert!(container_config(&options(words)).is_err(), "{words:?}");
        }
    }

    #[test]
    fn name_servers_on_loopback_are_left_out() {
        let dns = parse_resolv_conf(
            "# x\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nsearch a b\noptions ndots:5\n",
        );
        assert_eq!(dns.servers, ["10.0.0.2"]);
        assert_eq!(dns.searches, ["a", "b"]);
        assert_eq!(dns.options, ["ndots:5"]);
    }

    #[test]
    fn the_servers_behind_systemd_resolved_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("stub"), dir.path().join("real")];
        std::fs::write(&paths[0], "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(host_dns(&paths), None);
        std::fs::write(&paths[1], "nameserver 10.0.0.3\n").unwrap();
        assert_eq!(host_dns(&paths).unwrap().servers, ["10.0.0.3"]);
        std::fs::write(&paths[0], "nameserver 10.0.0.2\n").unwrap();
        assert_eq!(host_dns(&paths).unwrap().servers, ["10.0.0.2"]);
    }

    #[test]
    fn a_name_without_value_has_the_value_of_this_process() {
        assert_eq!(environment(&["A=b".into()]).unwrap(), ["A=b"]);
        assert!(environment(&["PATH".into()]).unwrap()[0].starts_with("PATH="));
        assert!(environment(&["NO_SUCH_VARIABLE_HERE".into()]).is_err());
    }
}
