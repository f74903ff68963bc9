//! The service that extends the CRI (proto/nacelle/v1/nacelle.proto).

mod console;
mod pull;
mod session;
mod streamed;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use cri::Health;
use cri::errors::{image_status, sandbox_status};
use image::Images;
use sandbox::Sandboxes;
use tonic::{Request, Response, Status, Streaming};

use self::streamed::Streamed;
use super::health::NodeHealth;
use crate::api;

pub(super) struct Debug {
    sandboxes: Sandboxes,
    images: Images,
    health: Arc<NodeHealth>,
}

impl Debug {
    pub(super) fn new(sandboxes: Sandboxes, images: Images, health: Arc<NodeHealth>) -> Self {
        Self { sandboxes, images, health }
    }
}

#[async_trait]
impl api::debug_server::Debug for Debug {
    async fn info(&self, _: Request<api::InfoRequest>) -> Result<Response<api::InfoReply>, Status> {
        Ok(Response::new(api::InfoReply {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            config: self.health.facts().to_string(),
            runtime_trouble: self.health.runtime().await.unwrap_or_default(),
            network_trouble: self.health.network().await.unwrap_or_default(),
        }))
    }

    type ConsoleStream = Streamed<api::ConsoleChunk>;

    async fn console(
        &self,
        request: Request<api::ConsoleRequest>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        console::console(&self.sandboxes, request.into_inner()).map(Response::new)
    }

    async fn trace(
        &self,
        request: Request<api::TraceRequest>,
    ) -> Result<Response<api::TraceReply>, Status> {
        let phases = self.sandboxes.trace(&request.into_inner().pod).map_err(sandbox_status)?;
        let phases = phases.into_iter().map(|phase| api::Phase {
            name: phase.name,
            start_us: phase.start_us,
            duration_us: phase.duration_us,
        });
        Ok(Response::new(api::TraceReply { phases: phases.collect() }))
    }

    type ExecStream = Streamed<api::SessionOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<api::SessionInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        session::exec(&self.sandboxes, request.into_inner()).await.map(Response::new)
    }

    type AttachStream = Streamed<api::SessionOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<api::SessionInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        session::attach(&self.sandboxes, request.into_inner()).await.map(Response::new)
    }

    type PullStream = Streamed<api::PullProgress>;

    async fn pull(
        &self,
        request: Request<api::PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        Ok(Response::new(pull::pull(self.images.clone(), request.into_inner())))
    }

    async fn import(
        &self,
        request: Request<api::ImportRequest>,
    ) -> Result<Response<api::ImportReply>, Status> {
        let request = request.into_inner();
        let path = Path::new(&request.path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument(format!("path: {path:?} is not absolute")));
        }
        let name = Some(request.name.as_str()).filter(|name| !name.is_empty());
        let ids = self.images.import(path, name).await.map_err(image_status)?;
        let image_ids = ids.iter().map(ToString::to_string).collect();
        Ok(Response::new(api::ImportReply { image_ids }))
    }
}
