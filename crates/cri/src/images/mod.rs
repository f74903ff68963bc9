//! ImageService.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::Stream;
use image::Images;
use sandbox::Sandboxes;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::convert::Refusal;
use crate::convert::image::{auth, info, to_cri};
use crate::convert::time::nanos;
use crate::errors::{image_status, refusal_status};
use crate::v1;

/// The service. A cheap handle.
#[derive(Clone)]
pub struct Image {
    images: Images,
    /// For what containers wrote beside the images.
    sandboxes: Sandboxes,
    /// Runtime handlers that an image can be pulled for.
    handlers: Arc<Vec<String>>,
}

type Pages = std::pin::Pin<Box<dyn Stream<Item = Result<v1::StreamImagesResponse, Status>> + Send>>;

impl Image {
    pub fn new(images: Images, sandboxes: Sandboxes, config: &Config) -> Self {
        Self { images, sandboxes, handlers: Arc::new(config.handlers.clone()) }
    }

    fn check_handler(&self, spec: Option<&v1::ImageSpec>) -> Result<(), Status> {
        let handler = spec.map(|spec| spec.runtime_handler.as_str()).unwrap_or_default();
        if handler.is_empty() || self.handlers.iter().any(|known| known == handler) {
            return Ok(());
        }
        let reason = format!("{handler:?} is no runtime handler of this node");
        Err(refusal_status(Refusal::invalid("image.runtime_handler", &reason)))
    }

    fn list(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let wanted = filter.and_then(|filter| filter.image).map(|spec| spec.image);
        match wanted.filter(|name| !name.is_empty()) {
            Some(name) => self.images.image(&name).iter().map(to_cri).collect(),
            None => self.images.images().iter().map(to_cri).collect(),
        }
    }
}

/// The image that a request names.
fn named(spec: Option<v1::ImageSpec>) -> Result<String, Status> {
    spec.map(|spec| spec.image)
        .filter(|name| !name.is_empty())
        .ok_or_else(|| refusal_status(Refusal::invalid("image.image", "empty: name an image")))
}

#[async_trait]
impl v1::image_service_server::ImageService for Image {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let images = self.list(request.into_inner().filter);
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    type StreamImagesStream = Pages;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Pages>, Status> {
        let images = self.list(request.into_inner().filter);
        let pages = crate::runtime::paged(images, |images| v1::StreamImagesResponse { images });
        Ok(Response::new(pages))
    }

    /// An unknown image is an empty answer, not an error.
    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let found = self.images.image(&named(request.image)?);
        Ok(Response::new(v1::ImageStatusResponse {
            image: found.as_ref().map(to_cri),
            info: match &found {
                Some(image) if request.verbose => info(image),
                _ => Default::default(),
            },
        }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        self.check_handler(request.image.as_ref())?;
        let name = named(request.image)?;
        let id = self.images.pull(&name, auth(request.auth), None).await.map_err(image_status)?;
        Ok(Response::new(v1::PullImageResponse { image_ref: id.to_string() }))
    }

    /// An unknown image is no error.
    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let name = named(request.into_inner().image)?;
        match self.images.remove(&name).await {
            Ok(()) => {}
            Err(error) if error.kind() == image::ErrorKind::NotFound => {}
            Err(error) => return Err(image_status(error)),
        }
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let timestamp = nanos(std::time::SystemTime::now());
        let info = self.images.fs_info();
        let mountpoint = info.mountpoint.to_string_lossy().into_owned();
        let usage = |used_bytes, inodes_used| v1::FilesystemUsage {
            timestamp,
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: mountpoint.clone() }),
            used_bytes: Some(v1::UInt64Value { value: used_bytes }),
            inodes_used: Some(v1::UInt64Value { value: inodes_used }),
        };
        // As the guests measured it last.
        let (mut written, mut files) = (0, 0);
        for container in self.sandboxes.all_stats().values().flat_map(|pod| &pod.containers) {
            written += container.writable_layer.used_bytes;
            files += container.writable_layer.inodes_used;
        }
        // Writable layers stand on the same file system as images.
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![usage(info.used_bytes, info.inodes_used)],
            container_filesystems: vec![usage(written, files)],
        }))
    }
}
