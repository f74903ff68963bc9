//! containerd's Sandbox service (api/runtime/sandbox/v1/sandbox.proto), for `sandboxer = "shim"`.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc::Result;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use serde_json::json;

use crate::errors::from_sandbox;
use crate::events::{any, timestamp};
use crate::pod::Pod;
use crate::stats;

/// Names of CRI's PodSandboxState, which containerd parses.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

pub(crate) struct SandboxService(pub(crate) Arc<Pod>);

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let options = r.options.as_ref();
        self.0
            .create_sandbox(&r.sandbox_id, r.bundle_path.as_ref(), options, &r.netns_path)
            .await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let (pid, created_at) = self.0.start_sandbox(&r.sandbox_id).await?;
        let created_at = MessageField::some(timestamp(created_at));
        Ok(StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, r: PlatformRequest) -> Result<PlatformResponse> {
        self.0.check_platform_of(&r.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        self.0.stop_sandbox(&r.sandbox_id).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let exit = self.0.wait_sandbox(&r.sandbox_id).await?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let view = self.0.sandbox_status(&r.sandbox_id)?;
        let mut response = SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: view.pid,
            state: if view.ready { READY } else { NOT_READY }.to_owned(),
            created_at: MessageField::some(timestamp(view.created_at)),
            exited_at: view.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        };
        if r.verbose {
            let info = json!({
                "pid": view.pid,
                "runtimeType": crate::runtime::RUNTIME,
                "version": env!("CARGO_PKG_VERSION"),
                "shimPid": std::process::id(),
                "stateDirectory": self.0.paths.state,
                "rootDirectory": self.0.paths.root,
            });
            response.info.insert("info".to_owned(), info.to_string());
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, r: PingRequest) -> Result<PingResponse> {
        self.0.ping_sandbox(&r.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        self.0.shutdown_sandbox(&r.sandbox_id).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        self.0.check_sandbox_is_ready(&r.sandbox_id)?;
        let measured = self.0.sandboxes()?.pod_stats(&self.0.paths.key).await;
        let metrics = stats::pod_metrics(&measured.map_err(from_sandbox)?);
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = r.sandbox_id;
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.data = MessageField::some(any(&metrics));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest};
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use containerd_shim_protos::sandbox_async::SandboxClient;
    use containerd_shim_protos::shim_async::{Client, TaskClient};
    use containerd_shim_protos::ttrpc::asynchronous::Server;
    use containerd_shim_protos::ttrpc::asynchronous::transport::{Listener, Socket};
    use containerd_shim_protos::ttrpc::context::{self, Context};
    use containerd_shim_protos::ttrpc::{Code, Error};
    use sandbox::Sandboxes;
    use sandbox::synthetic_pods::EmptyNode;

    use super::*;
    use crate::events::Publisher;
    use crate::paths::PodPaths;
    use crate::serve::services;
    use crate::settings::Settings;

    const ID: &str = "0123abcd";

    /// A shim that serves on a socket; starts of VMs fail.
    struct Shim {
        dir: tempfile::TempDir,
        pod: Arc<Pod>,
        sandbox: SandboxClient,
        tasks: TaskClient,
        _server: Server,
    }

    impl Shim {
        async fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let settings = Settings {
                state: dir.path().join("state"),
                root: dir.path().join("root"),
                ..Settings::default()
            };
            let paths = PodPaths::new(&settings, "k8s.io", ID);
            paths.create_dirs().unwrap();
            let config = settings.sandbox_config(&paths, 0x7001_0000);
            let node = Arc::new(EmptyNode);
            let sandboxes = Sandboxes::open_with(config, node.clone(), node).await.unwrap();
            let address = dir.path().join("no.sock").display().to_string();
            let publisher = Publisher::start("k8s.io".into(), address);
            let pod = Pod::new("k8s.io".into(), paths, settings, publisher);
            assert!(pod.sandboxes.set(sandboxes).is_ok());
            let socket = dir.path().join("shim.sock");
            let listener = tokio::net::UnixListener::bind(&socket).unwrap();
            let mut server = Server::new()
                .add_listener(Listener::from(listener))
                .register_service(services(&pod));
            server.start().await.unwrap();
            let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
            let client = Client::new(Socket::new(stream));
            let (sandbox, tasks) = (SandboxClient::new(client.clone()), TaskClient::new(client));
            Self { dir, pod, sandbox, tasks, _server: server }
        }

        async fn create(&self, id: &str) -> Result<CreateSandboxResponse> {
            let options =
                Any { type_url: "runtime.v1.PodSandboxConfig".into(), ..Default::default() };
            self.create_with(id, Some(options)).await
        }

        async fn create_with(
            &self,
            id: &str,
            options: Option<Any>,
        ) -> Result<CreateSandboxResponse> {
            let request = CreateSandboxRequest {
                sandbox_id: id.into(),
                bundle_path: self.dir.path().display().to_string(),
                options: options.into(),
                netns_path: "/var/run/netns/none".into(),
                ..Default::default()
            };
            self.sandbox.create_sandbox(limit(), &request).await
        }

        async fn start_sandbox(&self, id: &str) -> Result<StartSandboxResponse> {
            let request = StartSandboxRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.start_sandbox(limit(), &request).await
        }

        async fn stop(&self, id: &str) -> Result<StopSandboxResponse> {
            let request = StopSandboxRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.stop_sandbox(limit(), &request).await
        }

        async fn wait(&self, id: &str) -> Result<WaitSandboxResponse> {
            let request = WaitSandboxRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.wait_sandbox(limit(), &request).await
        }

        async fn status(&self, id: &str) -> Result<SandboxStatusResponse> {
            let request =
                SandboxStatusRequest { sandbox_id: id.into(), verbose: true, ..Default::default() };
            self.sandbox.sandbox_status(limit(), &request).await
        }

        async fn ping(&self, id: &str) -> Result<PingResponse> {
            let request = PingRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.ping_sandbox(limit(), &request).await
        }

        async fn metrics(&self, id: &str) -> Result<SandboxMetricsResponse> {
            let request = SandboxMetricsRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.sandbox_metrics(limit(), &request).await
        }

        async fn platform(&self, id: &str) -> Result<PlatformResponse> {
            let request = PlatformRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.platform(limit(), &request).await
        }

        async fn shutdown(&self, id: &str) -> Result<ShutdownSandboxResponse> {
            let request = ShutdownSandboxRequest { sandbox_id: id.into(), ..Default::default() };
            self.sandbox.shutdown_sandbox(limit(), &request).await
        }

        async fn exits(&self) -> bool {
            let shutdown = self.pod.shutdown.cancelled();
            tokio::time::timeout(Duration::from_millis(500), shutdown).await.is_ok()
        }

        /// A task of a bundle with this container type.
        async fn create_task(&self, id: &str, container_type: &str) -> Result<u32> {
            let bundle = self.dir.path().join("bundles").join(id);
            write_spec(&bundle, container_type);
            let request = CreateTaskRequest {
                id: id.into(),
                bundle: bundle.display().to_string(),
                ..Default::default()
            };
            self.tasks.create(limit(), &request).await.map(|response| response.pid)
        }
    }

    fn write_spec(bundle: &Path, container_type: &str) {
        std::fs::create_dir_all(bundle).unwrap();
        let spec = json!({ "ociVersion": "1.0.2", "hostname": "from-spec", "annotations": {
            "io.kubernetes.cri.container-type": container_type,
            "io.kubernetes.cri.sandbox-id": ID } });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    }

    fn limit() -> Context {
        context::with_timeout(30_000_000_000)
    }

    fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
        match result {
            Err(Error::RpcStatus(status)) => status.code(),
            other => panic!("expected a status: {other:?}"),
        }
    }

    #[tokio::test]
    async fn requests_before_create_and_for_other_sandboxes_are_not_found() {
        let shim = Shim::start().await;
        assert_eq!(code(shim.create("other").await), Code::INVALID_ARGUMENT);
        for created in [false, true] {
            let id = if created { "other" } else { ID };
            if created {
                shim.create(ID).await.unwrap();
            }
            assert_eq!(code(shim.start_sandbox(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.stop(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.wait(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.status(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.ping(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.metrics(id).await), Code::NOT_FOUND);
            assert_eq!(code(shim.platform("other").await), Code::NOT_FOUND);
            assert_eq!(code(shim.shutdown("other").await), Code::NOT_FOUND);
        }
        let platform = shim.platform(ID).await.unwrap().platform.unwrap();
        assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
        assert!(!shim.exits().await, "a request for another sandbox ended the shim");
    }

    #[tokio::test]
    async fn a_sandbox_is_created_once_and_stays_through_task_shutdown() {
        let shim = Shim::start().await;
        shim.create(ID).await.unwrap();
        assert_eq!(code(shim.create(ID).await), Code::ALREADY_EXISTS);
        shim.ping(ID).await.unwrap();
        let status = shim.status(ID).await.unwrap();
        assert_eq!((&*status.sandbox_id, &*status.state, status.pid), (ID, NOT_READY, 0));
        assert!(status.created_at.is_some() && status.exited_at.is_none());
        let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
        assert_eq!(info["shimPid"], std::process::id());
        assert_eq!(code(shim.metrics(ID).await), Code::FAILED_PRECONDITION);
        // A pause container's task would be a second sandbox; containers need a running one.
        assert_eq!(code(shim.create_task(ID, "sandbox").await), Code::ALREADY_EXISTS);
        assert!(shim.create_task("c", "container").await.is_err());
        assert!(!shim.pod.has_tasks());
        // containerd sends it after the deletion of each task.
        shim.tasks.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
        assert!(!shim.exits().await, "the Task service ended a shim with a sandbox");
        shim.ping(ID).await.unwrap();
    }

    #[tokio::test]
    async fn options_that_are_no_pod_configuration_are_refused() {
        let shim = Shim::start().await;
        let other = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
        assert_eq!(code(shim.create_with(ID, Some(other)).await), Code::INVALID_ARGUMENT);
        assert_eq!(code(shim.status(ID).await), Code::NOT_FOUND);
        // Without options the bundle's specification counts.
        write_spec(shim.dir.path(), "sandbox");
        shim.create_with(ID, None).await.unwrap();
    }

    #[tokio::test]
    async fn a_sandbox_whose_vm_does_not_start_is_stopped_and_can_be_shut_down() {
        let shim = Shim::start().await;
        shim.create(ID).await.unwrap();
        let waiting = {
            let client = shim.sandbox.clone();
            let request = WaitSandboxRequest { sandbox_id: ID.into(), ..Default::default() };
            tokio::spawn(async move { client.wait_sandbox(limit(), &request).await })
        };
        let error = shim.start_sandbox(ID).await.unwrap_err();
        assert!(error.to_string().contains("no "), "{error}");
        assert_eq!(waiting.await.unwrap().unwrap().exit_status, 255);
        assert_eq!(code(shim.start_sandbox(ID).await), Code::FAILED_PRECONDITION);
        assert_eq!(code(shim.ping(ID).await), Code::FAILED_PRECONDITION);
        let status = shim.status(ID).await.unwrap();
        assert!(status.state == NOT_READY && status.exited_at.is_some());
        shim.stop(ID).await.unwrap();
        assert_eq!(shim.wait(ID).await.unwrap().exit_status, 255);
        shim.shutdown(ID).await.unwrap();
        assert!(shim.exits().await);
        assert_eq!(code(shim.create(ID).await), Code::UNAVAILABLE);
    }

    #[tokio::test]
    async fn a_created_sandbox_stops_without_having_run_and_more_than_once() {
        let shim = Shim::start().await;
        shim.create(ID).await.unwrap();
        for _ in 0..2 {
            shim.stop(ID).await.unwrap();
            assert_eq!(shim.wait(ID).await.unwrap().exit_status, 0);
        }
        assert_eq!(code(shim.start_sandbox(ID).await), Code::FAILED_PRECONDITION);
        for _ in 0..2 {
            shim.shutdown(ID).await.unwrap();
        }
        assert!(shim.exits().await);
    }

    #[tokio::test]
    async fn shutdown_ends_a_shim_whose_sandbox_was_not_created() {
        let shim = Shim::start().await;
        shim.shutdown(ID).await.unwrap();
        assert!(shim.exits().await);
    }
}
