//! A blocking CRI client in which every call has a deadline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cri::v1;
use cri::v1::image_service_client::ImageServiceClient;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use crate::wait;

const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a node's CRI socket.
pub struct Cri {
    tokio: tokio::runtime::Runtime,
    pub runtime: RuntimeServiceClient<Channel>,
    pub image: ImageServiceClient<Channel>,
}

/// Calls a method of the runtime or image client with a deadline.
macro_rules! call {
    ($self:ident . $service:ident . $method:ident ( $request:expr )) => {
        call!($self.$service.$method($request) within LIMIT)
    };
    ($self:ident . $service:ident . $method:ident ( $request:expr ) within $limit:expr) => {{
        let mut client = $self.$service.clone();
        let mut request = tonic::Request::new($request);
        request.set_timeout($limit);
        $self
            .tokio
            .block_on(async move { client.$method(request).await })
            .map(tonic::Response::into_inner)
    }};
}

/// The result of an exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A line of a CRI log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub stream: String,
    /// `F` full or `P` partial.
    pub tag: String,
    pub text: String,
}

impl Cri {
    /// Connects to a listening daemon.
    pub fn connect(socket: &Path) -> Result<Self> {
        let tokio =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = tokio
            .block_on(
                Endpoint::from_static("http://nacelle")
                    .connect_timeout(Duration::from_secs(5))
                    .connect_with_connector(connector),
            )
            .with_context(|| format!("connecting to {}", socket.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            image: ImageServiceClient::new(channel),
            tokio,
        })
    }

    /// Runs a call for which there is no method here.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.tokio.block_on(future)
    }

    pub fn pull(&self, image: &str) -> Result<String, tonic::Status> {
        self.pull_as(image, None)
    }

    pub fn pull_as(
        &self,
        image: &str,
        auth: Option<v1::AuthConfig>,
    ) -> Result<String, tonic::Status> {
        let image = Some(v1::ImageSpec { image: image.into(), ..Default::default() });
        call!(self.image.pull_image(v1::PullImageRequest { image, auth, ..Default::default() }))
            .map(|reply| reply.image_ref)
    }

    pub fn run_pod(&self, config: v1::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request =
            v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        call!(self.runtime.run_pod_sandbox(request)).map(|reply| reply.pod_sandbox_id)
    }

    pub fn stop_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.into() };
        call!(self.runtime.stop_pod_sandbox(request)).map(drop)
    }

    pub fn remove_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
        call!(self.runtime.remove_pod_sandbox(request)).map(drop)
    }

    pub fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatusResponse, tonic::Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        call!(self.runtime.pod_sandbox_status(request))
    }

    pub fn pod_ready(&self, id: &str) -> Result<bool, tonic::Status> {
        let status = self.pod_status(id)?.status.unwrap_or_default();
        Ok(status.state == v1::PodSandboxState::SandboxReady as i32)
    }

    pub fn pod_address(&self, id: &str) -> Result<String> {
        let status = self.pod_status(id)?.status.context("no status")?;
        Ok(status.network.context("no network")?.ip)
    }

    pub fn pods(&self) -> Result<Vec<v1::PodSandbox>, tonic::Status> {
        call!(self.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()))
            .map(|reply| reply.items)
    }

    pub fn create(&self, pod: &str, config: v1::ContainerConfig) -> Result<String, tonic::Status> {
        self.create_in(pod, None, config)
    }

    /// With the pod's configuration, which containerd reads and nacelled does not.
    fn create_in(
        &self,
        pod: &str,
        sandbox_config: Option<v1::PodSandboxConfig>,
        config: v1::ContainerConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config,
        };
        call!(self.runtime.create_container(request)).map(|reply| reply.container_id)
    }

    pub fn start(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest { container_id: id.into() };
        call!(self.runtime.start_container(request)).map(drop)
    }

    /// Creates and starts.
    pub fn run(&self, pod: &str, config: v1::ContainerConfig) -> Result<String> {
        let id = self.create(pod, config).context("CreateContainer")?;
        self.start(&id).context("StartContainer")?;
        Ok(id)
    }

    /// Creates and starts as a kubelet does, with the pod's configuration.
    pub fn run_in(
        &self,
        pod: &str,
        sandbox_config: &v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<String> {
        let id = self.create_in(pod, Some(sandbox_config.clone()), config);
        let id = id.context("CreateContainer")?;
        self.start(&id).context("StartContainer")?;
        Ok(id)
    }

    pub fn stop(&self, id: &str, grace: i64) -> Result<(), tonic::Status> {
        let request = v1::StopContainerRequest { container_id: id.into(), timeout: grace };
        call!(self.runtime.stop_container(request)).map(drop)
    }

    pub fn remove(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemoveContainerRequest { container_id: id.into() };
        call!(self.runtime.remove_container(request)).map(drop)
    }

    pub fn containers(&self) -> Result<Vec<v1::Container>, tonic::Status> {
        call!(self.runtime.list_containers(v1::ListContainersRequest::default()))
            .map(|reply| reply.containers)
    }

    pub fn status(&self, id: &str) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
        call!(self.runtime.container_status(request))?.status.context("no status")
    }

    /// The final status, once the container has exited.
    pub fn exited(&self, id: &str) -> Result<v1::ContainerStatus> {
        wait::until(&format!("container {id} exits"), LIMIT, || {
            let status = self.status(id)?;
            let exited = v1::ContainerState::ContainerExited as i32;
            Ok((status.state == exited).then_some(status))
        })
    }

    pub fn exec(&self, id: &str, command: &[&str]) -> Result<Output, tonic::Status> {
        self.exec_within(id, command, 180)
    }

    /// `timeout` in seconds; 0: none.
    pub fn exec_within(
        &self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<Output, tonic::Status> {
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout,
        };
        let limit = LIMIT.max(Duration::from_secs(timeout.unsigned_abs() + 30));
        let reply = call!(self.runtime.exec_sync(request) within limit)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output {
            code: reply.exit_code,
            stdout: text(&reply.stdout),
            stderr: text(&reply.stderr),
        })
    }

    /// Exec of a shell line that must succeed; returns its output without the last newline.
    pub fn shell(&self, id: &str, line: &str) -> Result<String> {
        let output = self.exec(id, &["sh", "-c", line])?;
        anyhow::ensure!(output.code == 0, "`{line}` in {id}: {output:?}");
        Ok(output.stdout.trim_end().to_owned())
    }

    /// The URL of a streaming exec. Letters of `streams`: i, o, e for stdin, stdout and stderr,
    /// t for a terminal.
    pub fn exec_url(
        &self,
        id: &str,
        streams: &str,
        command: &[&str],
    ) -> Result<String, tonic::Status> {
        let request = v1::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty: streams.contains('t'),
            stdin: streams.contains('i'),
            stdout: streams.contains('o'),
            stderr: streams.contains('e'),
        };
        call!(self.runtime.exec(request)).map(|reply| reply.url)
    }

    pub fn attach_url(&self, id: &str, streams: &str) -> Result<String, tonic::Status> {
        let request = v1::AttachRequest {
            container_id: id.into(),
            tty: streams.contains('t'),
            stdin: streams.contains('i'),
            stdout: streams.contains('o'),
            stderr: streams.contains('e'),
        };
        call!(self.runtime.attach(request)).map(|reply| reply.url)
    }

    pub fn forward_url(&self, pod: &str, ports: &[u16]) -> Result<String, tonic::Status> {
        let port = ports.iter().map(|port| i32::from(*port)).collect();
        let request = v1::PortForwardRequest { pod_sandbox_id: pod.into(), port };
        call!(self.runtime.port_forward(request)).map(|reply| reply.url)
    }

    /// Waits until a container's log has a line with this prefix; returns the line.
    pub fn logged(&self, id: &str, start: &str) -> Result<String> {
        let what = format!("container {id} logs {start:?}");
        let found = wait::until(&what, Duration::from_secs(60), || {
            let line = self.log(id)?.into_iter().find(|line| line.text.starts_with(start));
            Ok(line.map(|line| line.text))
        });
        found.with_context(|| format!("{:?}", self.log(id)))
    }

    /// The current lines of a container's log.
    pub fn log(&self, id: &str) -> Result<Vec<LogLine>> {
        let path = self.status(id)?.log_path;
        parse_log(&std::fs::read(&path).with_context(|| format!("log {path}"))?)
    }
}

/// Parses a CRI log: `<time> <stream> <tag> <text>` a line.
pub fn parse_log(bytes: &[u8]) -> Result<Vec<LogLine>> {
    let mut lines = Vec::new();
    for line in String::from_utf8_lossy(bytes).lines() {
        let mut parts = line.splitn(4, ' ');
        let mut part = || parts.next().map(str::to_owned);
        let (time, stream, tag, text) = (part(), part(), part(), part());
        let time = time.unwrap_or_default();
        anyhow::ensure!(
            time.len() > 20 && time.contains('T') && text.is_some(),
            "not a CRI log line: {line:?}"
        );
        lines.push(LogLine {
            stream: stream.unwrap_or_default(),
            tag: tag.unwrap_or_default(),
            text: text.unwrap_or_default(),
        });
    }
    Ok(lines)
}

/// A pod's configuration with defaults of the stories.
pub fn pod(name: &str, logs: &Path) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.into(),
            uid: format!("{name}-uid"),
            namespace: "stories".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: logs.join(name).display().to_string(),
        labels: [("story".into(), name.into())].into(),
        linux: Some(v1::LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

/// A container that runs `command` (none: the image's own) from `image`.
pub fn container(name: &str, image: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: image.into(), ..Default::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: PathBuf::from(name).join("0.log").display().to_string(),
        linux: Some(v1::LinuxContainerConfig::default()),
        ..Default::default()
    }
}

/// A writable mount of a path of the host.
pub fn mount(host: &Path, at: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.display().to_string(),
        container_path: at.into(),
        ..Default::default()
    }
}
