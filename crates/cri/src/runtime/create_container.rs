//! CreateContainer.

use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::convert::container::{ImageParts, to_spec};
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
        let image = self.images.image(&name).ok_or_else(|| {
            Status::not_found(format!("no image {name:?} on this node: pull it first"))
        })?;
        // A removal of the image meanwhile leaves its file until the pod has opened it.
        let _held = self.images.hold(&image.id);
        let parts = ImageParts {
            id: &image.id,
            rootfs: image.erofs_path.clone(),
            configuration: Some(&*image.config),
        };
        let spec =
            to_spec(&config, &pod.spec.hostname, &parts, &self.config).map_err(refusal_status)?;
        let container_id =
            self.sandboxes.create_container(&pod.id, spec).await.map_err(sandbox_status)?;
        Ok(v1::CreateContainerResponse { container_id })
    }
}
