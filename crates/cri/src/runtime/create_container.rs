//! CreateContainer.

use std::sync::Arc;

use sandbox::model::{ContainerSpec, ContainerState, PidMode, PodState, PodView};
use serde::Deserialize;
use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::convert::container::{ImageParts, ImageVolume, PodParts, to_spec};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn create_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, Status> {
        let missing = |field: &str| refusal_status(Refusal::invalid(field, "missing"));
        let config = request.config.ok_or_else(|| missing("config"))?;
        let name = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        if name.is_empty() {
            return Err(missing("config.image.image"));
        }
        let pod = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        if pod.state != PodState::Ready {
            return Err(Status::failed_precondition(format!("pod {} is not running", pod.id)));
        }
        let image = self.images.image(&name).ok_or_else(|| {
            Status::not_found(format!("no image {name:?} on this node: pull it first"))
        })?;
        // A removal of an image meanwhile leaves its file until the pod has opened it.
        let mounted = config.mounts.iter().filter_map(|mount| mount.image.as_ref());
        let names = mounted.map(|image| image.image.as_str()).chain([image.id.as_str()]);
        let _held: Vec<_> = names.map(|name| self.images.hold(name)).collect();
        let (container, attempt) = match &config.metadata {
            Some(metadata) => (metadata.name.clone(), metadata.attempt),
            None => Default::default(),
        };
        let what = format!("look at the files of the host that container {container} names");
        let conversion = self.conversions.begin((pod.id.clone(), container, attempt))?;
        let (config, images) = (Arc::new(config), self.images.clone());
        let (pod_id, settings) = (pod.id.clone(), self.config.clone());
        // Looks at the host's files, which may lie on a network.
        let spec = self.sandboxes.run_on_host_files(&pod_id, what, move || {
            let _conversion = conversion;
            let parts = ImageParts {
                id: &image.id,
                rootfs: image.erofs_path.clone(),
                configuration: Some(&*image.config),
            };
            let find = |name: &str| {
                let found = images.image(name)?;
                Some(ImageVolume { id: found.id, rootfs: found.erofs_path })
            };
            convert(&config, &pod, &parts, &find, &settings)
        });
        let spec = spec.await.map_err(sandbox_status)?.map_err(refusal_status)?;
        self.check_target(&pod_id, &spec)?;
        let container_id =
            self.sandboxes.create_container(&pod_id, spec).await.map_err(sandbox_status)?;
        Ok(v1::CreateContainerResponse { container_id })
    }

    /// Processes can be shared with a container that runs in the same pod.
    fn check_target(&self, pod: &str, spec: &ContainerSpec) -> Result<(), Status> {
        let PidMode::Target(target) = &spec.pid else { return Ok(()) };
        let view = self.sandboxes.container(target).map_err(sandbox_status)?;
        if view.pod != pod {
            return Err(Status::invalid_argument(format!(
                "target container {target} is not of pod {pod}"
            )));
        }
        if view.state != ContainerState::Running {
            return Err(Status::failed_precondition(format!(
                "target container {target} is not running"
            )));
        }
        Ok(())
    }
}

fn convert(
    config: &v1::ContainerConfig,
    pod: &PodView,
    image: &ImageParts<'_>,
    find: crate::convert::container::FindImage<'_>,
    settings: &crate::Config,
) -> Result<ContainerSpec, Refusal> {
    let request = v1::PodSandboxConfig::deserialize(&pod.spec.origin).unwrap_or_default();
    let parts = PodParts { hostname: &pod.spec.hostname, request: &request };
    to_spec(config, &parts, image, find, settings)
}
