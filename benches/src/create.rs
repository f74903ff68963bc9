//! Containers through CRI sockets: what each call of a container's life takes, in one pod of each
//! runtime, alternating between runtimes. The first container stays until the end, as a kubelet leaves a
//! container's predecessor there until the next one runs: images are in use all the time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cri::v1;
use cri::v1::image_service_client::ImageServiceClient;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use crate::table;

/// A runtime that serves CRI.
#[derive(Debug, Clone)]
pub struct Peer {
    pub name: String,
    pub socket: PathBuf,
}

impl std::str::FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, socket) = text.split_once('=').context("not like NAME=SOCKET")?;
        Ok(Self { name: name.to_owned(), socket: socket.into() })
    }
}

/// Calls in the order in which they are made.
const CALLS: [&str; 5] =
    ["CreateContainer", "StartContainer", "ExecSync", "StopContainer", "RemoveContainer"];

/// Runs `rounds` containers in each runtime after a first one; prints the medians.
pub fn run(peers: &[Peer], image: &str, rounds: usize, logs: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut sides = Vec::new();
        for peer in peers {
            sides.push(Side::start(peer, image, logs).await.context(peer.name.clone())?);
        }
        let mut first = Vec::new();
        for side in &mut sides {
            first.push(side.round(0).await?);
        }
        let mut times = vec![vec![Vec::new(); CALLS.len()]; sides.len()];
        for round in 1..=rounds {
            for (side, times) in sides.iter_mut().zip(&mut times) {
                for (times, time) in times.iter_mut().zip(side.round(round).await?) {
                    times.push(time);
                }
            }
        }
        let mut header = vec!["call"];
        for side in &sides {
            header.extend([side.name.as_str(), "best", "worst", "first"]);
        }
        let mut rows = vec![pod_row(&sides)];
        for (n, call) in CALLS.iter().enumerate() {
            let mut row = vec![(*call).to_owned()];
            for (times, first) in times.iter_mut().zip(&first) {
                let median = table::median(&mut times[n]);
                let worst = times[n].last().copied().unwrap_or_default();
                row.extend([median, times[n][0], worst].map(ms));
                row.push(first.get(n).copied().map(ms).unwrap_or_default());
            }
            rows.push(row);
        }
        let title = format!("Calls of a container's life (median of {rounds}, after a first one)");
        table::print(&title, &header, &rows);
        for side in &mut sides {
            side.end().await?;
        }
        Ok(())
    })
}

fn pod_row(sides: &[Side]) -> Vec<String> {
    let mut row = vec!["RunPodSandbox (once)".to_owned()];
    for side in sides {
        row.extend([ms(side.pod_us), String::new(), String::new(), String::new()]);
    }
    row
}

fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

pub async fn connect(peer: &Peer) -> Result<Channel> {
    let socket = peer.socket.clone();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://node").connect_with_connector(connector).await?)
}

pub async fn pull(channel: &Channel, image: &str) -> Result<()> {
    let spec = Some(v1::ImageSpec { image: image.into(), ..Default::default() });
    let pull = v1::PullImageRequest { image: spec, ..Default::default() };
    ImageServiceClient::new(channel.clone()).pull_image(pull).await.context("PullImage")?;
    Ok(())
}

struct Side {
    name: String,
    client: RuntimeServiceClient<Channel>,
    image: String,
    pod: String,
    pod_config: v1::PodSandboxConfig,
    pod_us: u64,
}

impl Side {
    async fn start(peer: &Peer, image: &str, logs: &Path) -> Result<Self> {
        let channel = connect(peer).await?;
        pull(&channel, image).await?;
        let mut client = RuntimeServiceClient::new(channel);
        let logs = logs.join(&peer.name);
        std::fs::create_dir_all(&logs)?;
        let pod_config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "bench".into(),
                uid: "bench-uid".into(),
                namespace: "bench".into(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        let request =
            v1::RunPodSandboxRequest { config: Some(pod_config.clone()), ..Default::default() };
        let begin = Instant::now();
        let reply = client.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        let pod_us = begin.elapsed().as_micros() as u64;
        Ok(Self {
            name: peer.name.clone(),
            client,
            image: image.into(),
            pod: reply.into_inner().pod_sandbox_id,
            pod_config,
            pod_us,
        })
    }

    /// Microseconds of each of [`CALLS`].
    /// The first container is left running.
    async fn round(&mut self, round: usize) -> Result<Vec<u64>> {
        let mut times = Vec::new();
        let mut lap = Instant::now();
        let mut took = || {
            times.push(lap.elapsed().as_micros() as u64);
            lap = Instant::now();
        };
        let name = format!("c{round}");
        let config = v1::ContainerConfig {
            log_path: format!("{name}.log"),
            metadata: Some(v1::ContainerMetadata { name, attempt: 0 }),
            image: Some(v1::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: ["sleep", "1000"].map(str::to_owned).to_vec(),
            linux: Some(v1::LinuxContainerConfig::default()),
            ..Default::default()
        };
        let create = v1::CreateContainerRequest {
            pod_sandbox_id: self.pod.clone(),
            config: Some(config),
            sandbox_config: Some(self.pod_config.clone()),
        };
        let created = self.client.create_container(create).await.context("CreateContainer")?;
        took();
        let container_id = created.into_inner().container_id;
        let start = v1::StartContainerRequest { container_id: container_id.clone() };
        self.client.start_container(start).await.context("StartContainer")?;
        took();
        let exec = v1::ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: ["echo", "x"].map(str::to_owned).to_vec(),
            timeout: 60,
        };
        let output = self.client.exec_sync(exec).await.context("ExecSync")?.into_inner();
        took();
        if output.stdout != b"x\n" {
            bail!("ExecSync of {}: {output:?}", self.name);
        }
        if round == 0 {
            return Ok(times);
        }
        let stop = v1::StopContainerRequest { container_id: container_id.clone(), timeout: 0 };
        self.client.stop_container(stop).await.context("StopContainer")?;
        took();
        let remove = v1::RemoveContainerRequest { container_id };
        self.client.remove_container(remove).await.context("RemoveContainer")?;
        took();
        Ok(times)
    }

    async fn end(&mut self) -> Result<()> {
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: self.pod.clone() };
        self.client.stop_pod_sandbox(stop).await.context("StopPodSandbox")?;
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id: self.pod.clone() };
        self.client.remove_pod_sandbox(remove).await.context("RemovePodSandbox")?;
        Ok(())
    }
}
