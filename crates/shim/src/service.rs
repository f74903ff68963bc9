//! containerd's task API (api/runtime/task/v3/shim.proto; version 2 has the same messages under
//! another name).

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;

use crate::create::CreateOptions;
use crate::errors::{from_sandbox, invalid, unimplemented};
use crate::events::{any, timestamp};
use crate::pod::{Pod, signal_or_sigkill};
use crate::stats;
use crate::stdio::StdioPaths;

pub(crate) struct TaskService(pub(crate) Arc<Pod>);

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if !r.checkpoint.is_empty() {
            return Err(unimplemented("checkpoints"));
        }
        let stdio_paths =
            StdioPaths { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        let (id, bundle, rootfs) = (r.id, r.bundle.into(), r.rootfs);
        let pid = self.0.create(CreateOptions { id, bundle, rootfs, stdio_paths }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> Result<StartResponse> {
        let pid = self.0.start(&r.id, &r.exec_id).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> Result<StateResponse> {
        let found = self.0.find(&r.id, &r.exec_id)?;
        let (task, process) = (found.task(), found.process());
        let exit = process.exit();
        let stdio_paths = process.stdio_paths.clone();
        Ok(StateResponse {
            id: r.id,
            exec_id: r.exec_id,
            bundle: task.bundle.display().to_string(),
            pid: process.pid(),
            status: found.status().into(),
            stdin: stdio_paths.stdin,
            stdout: stdio_paths.stdout,
            stderr: stdio_paths.stderr,
            terminal: stdio_paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> Result<DeleteResponse> {
        let (pid, exit) = self.0.delete(&r.id, &r.exec_id).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> Result<PidsResponse> {
        let pid = self.0.task(&r.id)?.init.pid();
        let process = ProcessInfo { pid, ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> Result<Empty> {
        self.0.kill(&r.id, &r.exec_id, signal_or_sigkill(r.signal), r.all).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Result<Empty> {
        let stdio_paths =
            StdioPaths { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        let spec = r.spec.into_option().ok_or_else(|| invalid("the process is not specified"))?;
        self.0.add_exec(&r.id, &r.exec_id, stdio_paths, &spec.value).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> Result<Empty> {
        let found = self.0.find(&r.id, &r.exec_id)?;
        let side = |length: u32| u16::try_from(length).unwrap_or(u16::MAX);
        if let Some(control) = found.process().control() {
            control.resize(side(r.width), side(r.height)).await.map_err(from_sandbox)?;
        }
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> Result<Empty> {
        let found = self.0.find(&r.id, &r.exec_id)?;
        if r.stdin {
            found.process().close_stdin();
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> Result<WaitResponse> {
        let found = self.0.find(&r.id, &r.exec_id)?;
        let exit = found.process().wait().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> Result<StatsResponse> {
        let task = self.0.task(&r.id)?;
        let sandboxes = self.0.sandboxes()?;
        let metrics = if task.is_sandbox() {
            let measured = sandboxes.pod_stats(&self.0.paths.key).await;
            stats::pod_metrics(&measured.map_err(from_sandbox)?)
        } else {
            let measured = sandboxes.container_stats(&self.0.key(&r.id)).await;
            stats::container_metrics(&measured.map_err(from_sandbox)?)
        };
        Ok(StatsResponse { stats: MessageField::some(any(&metrics)), ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> Result<Empty> {
        let task = self.0.task(&r.id)?;
        if task.is_sandbox() {
            return Err(unimplemented("a resize of the pod"));
        }
        let resources = r.resources.into_option().ok_or_else(|| invalid("no resources given"))?;
        let resources = serde_json::from_slice(&resources.value)
            .map_err(|e| invalid(format!("resources: {e}")))?;
        let updated = self.0.sandboxes()?.update_container(&self.0.key(&r.id), resources).await;
        updated.map_err(from_sandbox)?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.task(&r.id).map_or(0, |task| task.init.pid());
        let (shim_pid, version) = (std::process::id(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(ConnectResponse { shim_pid, task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        self.0.request_shutdown();
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> Result<Empty> {
        self.0.set_paused(&r.id, true).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> Result<Empty> {
        self.0.set_paused(&r.id, false).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(unimplemented("checkpoints"))
    }
}
