//! gRPC service (`proto/agent/v1`): calls the implementation of each request and maps errors to
//! gRPC status codes. Requests run as tasks of their own, so that a disconnected client does not
//! interrupt one halfway.

use std::pin::Pin;
use std::sync::Arc;

use agent_api::v1::agent_server::Agent as Service;
use agent_api::{MIN_PROTOCOL, PROTOCOL, negotiate, v1};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::agent::Agent;
use crate::containers::{create, exec, freeze, remove, signal, start, stats, update};
use crate::error::{Error, Result};
use crate::guest::{cpus, devices, identity, network, shutdown};

#[derive(Debug, Clone)]
pub struct AgentService {
    agent: Arc<Agent>,
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let read_trimmed = error.chain();
        tracing::debug!(error = read_trimmed, "request failed");
        match error {
            Error::NotFound { .. } | Error::Command { missing: true, .. } => {
                Self::not_found(read_trimmed)
            }
            Error::Exists { .. } => Self::already_exists(read_trimmed),
            Error::Invalid { .. } => Self::invalid_argument(read_trimmed),
            Error::Precondition(_) | Error::Command { .. } => {
                Self::failed_precondition(read_trimmed)
            }
            Error::Exhausted { .. } => Self::resource_exhausted(read_trimmed),
            Error::Deadline { .. } | Error::Hung { .. } => Self::deadline_exceeded(read_trimmed),
            Error::Os { .. } | Error::Helper { .. } => Self::internal(read_trimmed),
        }
    }
}

type Reply<T> = std::result::Result<Response<T>, Status>;

fn into_reply<T>(result: Result<T>) -> Reply<T> {
    result.map(Response::new).map_err(Status::from)
}

impl AgentService {
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Runs a request to completion even if the client cancels the call.
    async fn run<T, F>(&self, request_fn: impl FnOnce(Arc<Agent>) -> F) -> Reply<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match tokio::spawn(request_fn(Arc::clone(&self.agent))).await {
            Ok(result) => into_reply(result),
            Err(error) => {
                tracing::error!(%error, "the task of a request panicked");
                Err(Status::internal("internal error of the agent"))
            }
        }
    }
}

fn read_trimmed(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

async fn configure_pod(agent: Arc<Agent>, request: v1::ConfigurePodRequest) -> Result<()> {
    if let Some(pod) = agent.lock().pod.as_ref()
        && pod.id != request.pod_id
    {
        return Err(Error::Exists { what: "pod", id: pod.id.clone() });
    }
    if let Some(host) = &agent.config.host {
        crate::host_namespaces::configure(host, &agent.config.base, &request)?;
        agent.lock().pod =
            Some(crate::agent::Pod { id: request.pod_id, hostname: request.hostname });
        return Ok(());
    }
    // Clock and entropy first: the later steps may write timestamps and draw random numbers.
    identity::set_clock(request.unix_time_ns)?;
    identity::add_entropy(&request.entropy)?;
    identity::set_hostname(&request.hostname)?;
    let macs: Vec<String> = request.interfaces.iter().map(|each| each.mac.clone()).collect();
    devices::rescan(&[], &macs).await?;
    network::configure(&request.interfaces, &request.routes)?;
    // After the interfaces: `net.*.conf.<interface>` exists only then.
    identity::set_sysctls(&request.sysctls)?;
    crate::guest::shm::set_up(&agent.config.base.join("shm"), request.shm_size)?;
    // In tests the page cache is the host's.
    agent.reclaim.enable(request.reclaim_idle && agent.config.is_guest);
    agent.lock().pod = Some(crate::agent::Pod { id: request.pod_id, hostname: request.hostname });
    Ok(())
}

#[tonic::async_trait]
impl Service for AgentService {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Reply<v1::HelloReply> {
        // Also a ping of the host.
        self.agent.reserve_memory();
        let newest = request.into_inner().protocol;
        let uptime = read_trimmed("/proc/uptime");
        let seconds: f64 =
            uptime.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
        Ok(Response::new(v1::HelloReply {
            protocol: negotiate(newest, MIN_PROTOCOL..=PROTOCOL),
            min_protocol: MIN_PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: read_trimmed("/proc/sys/kernel/osrelease"),
            boot_id: read_trimmed("/proc/sys/kernel/random/boot_id"),
            uptime_ms: (seconds * 1000.0) as u64,
            configured: self.agent.lock().pod.is_some(),
        }))
    }

    async fn configure_pod(
        &self,
        request: Request<v1::ConfigurePodRequest>,
    ) -> Reply<v1::ConfigurePodReply> {
        let request = request.into_inner();
        self.run(|agent| async move {
            configure_pod(agent, request).await.map(|()| v1::ConfigurePodReply {})
        })
        .await
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Reply<v1::CreateContainerReply> {
        let request = request.into_inner();
        self.run(|agent| async move { create::create(&agent, request).await }).await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Reply<v1::StartContainerReply> {
        let id = request.into_inner().container_id;
        self.run(|agent| async move {
            start::start(&agent, &id).await.map(|()| v1::StartContainerReply {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Reply<v1::RemoveContainerReply> {
        let id = request.into_inner().container_id;
        self.run(|agent| async move {
            remove::remove(&agent, &id).await.map(|()| v1::RemoveContainerReply {})
        })
        .await
    }

    async fn update_container(
        &self,
        request: Request<v1::UpdateContainerRequest>,
    ) -> Reply<v1::UpdateContainerReply> {
        let v1::UpdateContainerRequest { container_id, linux_resources } = request.into_inner();
        self.run(|agent| async move {
            agent.reserve_memory();
            update::update(&agent, &container_id, &linux_resources).await?;
            Ok(v1::UpdateContainerReply {})
        })
        .await
    }

    async fn freeze_container(
        &self,
        request: Request<v1::FreezeContainerRequest>,
    ) -> Reply<v1::FreezeContainerReply> {
        let v1::FreezeContainerRequest { container_id, frozen } = request.into_inner();
        self.run(move |agent| async move {
            freeze::freeze(&agent, &container_id, frozen).await?;
            Ok(v1::FreezeContainerReply {})
        })
        .await
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Reply<v1::ExecReply> {
        let request = request.into_inner();
        self.run(|agent| async move {
            let pid = exec::exec(&agent, request).await?.unsigned_abs();
            Ok(v1::ExecReply { pid })
        })
        .await
    }

    async fn signal_process(
        &self,
        request: Request<v1::SignalProcessRequest>,
    ) -> Reply<v1::SignalProcessReply> {
        let v1::SignalProcessRequest { container_id, exec_id, signal, all, await_handler } =
            request.into_inner();
        self.run(move |agent| async move {
            if await_handler && !all {
                signal::wait_for_handler(&agent, &container_id, &exec_id, signal).await;
            }
            signal::signal(&agent, &container_id, &exec_id, signal, all)?;
            Ok(v1::SignalProcessReply {})
        })
        .await
    }

    async fn resize_tty(
        &self,
        request: Request<v1::ResizeTtyRequest>,
    ) -> Reply<v1::ResizeTtyReply> {
        let v1::ResizeTtyRequest { container_id, exec_id, width, height } = request.into_inner();
        let state = self.agent.lock();
        let result = state
            .process(&container_id, &exec_id)
            .and_then(|process| process.resize(width, height));
        into_reply(result.map(|()| v1::ResizeTtyReply {}))
    }

    async fn list_processes(
        &self,
        _: Request<v1::ListProcessesRequest>,
    ) -> Reply<v1::ListProcessesReply> {
        let state = self.agent.lock();
        let mut processes = Vec::new();
        for (id, container) in &state.containers {
            processes.push(container.init.describe(id, ""));
            processes
                .extend(container.execs.iter().map(|(exec, process)| process.describe(id, exec)));
        }
        Ok(Response::new(v1::ListProcessesReply { processes }))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = std::result::Result<v1::Event, Status>> + Send>>;

    async fn events(&self, _: Request<v1::EventsRequest>) -> Reply<Self::EventsStream> {
        let agent = Arc::clone(&self.agent);
        let stream = {
            let mut state = agent.lock();
            state.events.stream += 1;
            state.events.stream
        };
        // Ends the previous stream.
        agent.events_changed.notify_waiters();
        let events = futures_util::stream::unfold((agent, 0), move |(agent, sent)| async move {
            loop {
                let mut changed = std::pin::pin!(agent.events_changed.notified());
                // Enabled before the check, so that a notification in between is not lost.
                changed.as_mut().enable();
                let next = {
                    let state = agent.lock();
                    if state.events.stream != stream {
                        return None;
                    }
                    state.events.after(sent)
                };
                if let Some(event) = next {
                    let sequence = event.sequence;
                    return Some((Ok(event), (Arc::clone(&agent), sequence)));
                }
                changed.await;
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn ack_events(
        &self,
        request: Request<v1::AckEventsRequest>,
    ) -> Reply<v1::AckEventsReply> {
        self.agent.lock().events.acknowledge(request.into_inner().sequence);
        self.agent.remove_collected_execs();
        Ok(Response::new(v1::AckEventsReply {}))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Reply<v1::StatsReply> {
        self.run(|agent| async move {
            agent.reserve_memory();
            let reply = stats::stats(&agent).await?;
            let cpu = reply.pod.as_ref().and_then(|pod| pod.cpu.as_ref());
            agent.reclaim.sample(cpu.map_or(0, |cpu| cpu.usage_ns));
            Ok(reply)
        })
        .await
    }

    async fn rescan_devices(
        &self,
        request: Request<v1::RescanDevicesRequest>,
    ) -> Reply<v1::RescanDevicesReply> {
        let request = request.into_inner();
        self.run(|agent| async move {
            agent.config.require_vm()?;
            if request.disk_serials.is_empty() && request.macs.is_empty() {
                // A share has no serial or MAC to wait for; its mount waits.
                devices::rescan_pci().await?;
            }
            devices::rescan(&request.disk_serials, &request.macs).await?;
            Ok(v1::RescanDevicesReply {})
        })
        .await
    }

    async fn release_device(
        &self,
        request: Request<v1::ReleaseDeviceRequest>,
    ) -> Reply<v1::ReleaseDeviceReply> {
        let request = request.into_inner();
        self.run(|agent| async move {
            agent.config.require_vm()?;
            if !request.disk_serial.is_empty() {
                devices::release_disk(&request.disk_serial).await?;
            }
            if !request.mac.is_empty() {
                devices::release_nic(&request.mac).await?;
            }
            Ok(v1::ReleaseDeviceReply {})
        })
        .await
    }

    async fn write_volume(
        &self,
        request: Request<v1::WriteVolumeRequest>,
    ) -> Reply<v1::WriteVolumeReply> {
        let result = self.agent.lock().volumes.write(request.get_ref());
        into_reply(result.map(|()| v1::WriteVolumeReply {}))
    }

    async fn prepare_empty_dir(
        &self,
        request: Request<v1::PrepareEmptyDirRequest>,
    ) -> Reply<v1::PrepareEmptyDirReply> {
        let request = request.into_inner();
        self.run(|agent| async move {
            agent.config.require_vm()?;
            let mut dirs = Arc::clone(&agent.empty_dirs).lock_owned().await;
            let mut scratch = Arc::clone(&agent.scratch).lock_owned().await;
            let task = tokio::task::spawn_blocking(move || dirs.prepare(&mut scratch, &request));
            let ready = task.await.map_err(|error| Error::Helper {
                operation: "prepare an emptyDir",
                reason: error.to_string(),
            })??;
            if !ready {
                // Remains of an earlier attempt.
                agent.delete_trash();
            }
            Ok(v1::PrepareEmptyDirReply { ready })
        })
        .await
    }

    async fn read_volume_file(
        &self,
        request: Request<v1::ReadVolumeFileRequest>,
    ) -> Reply<v1::ReadVolumeFileReply> {
        let v1::ReadVolumeFileRequest { volume_id, path, limit } = request.into_inner();
        let result = self.agent.lock().volumes.read(&volume_id, &path, limit);
        into_reply(result.map(|content| v1::ReadVolumeFileReply { content }))
    }

    async fn resize_pod(
        &self,
        request: Request<v1::ResizePodRequest>,
    ) -> Reply<v1::ResizePodReply> {
        let wanted = request.into_inner().cpus;
        self.run(move |agent| async move {
            agent.config.require_vm()?;
            agent.reserve_memory();
            let task = tokio::task::spawn_blocking(move || cpus::resize(wanted));
            let cpus = task.await.map_err(|error| Error::Helper {
                operation: "set CPUs online",
                reason: error.to_string(),
            })??;
            Ok(v1::ResizePodReply { cpus })
        })
        .await
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Reply<v1::ShutdownReply> {
        let agent = Arc::clone(&self.agent);
        tokio::spawn(async move {
            // Lets the reply be sent first.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            if agent.config.is_guest {
                shutdown::power_off(|| agent.pod_cgroup.is_populated()).await;
            } else {
                let _ = agent.pod_cgroup.kill();
                std::process::exit(0);
            }
        });
        Ok(Response::new(v1::ShutdownReply {}))
    }
}
