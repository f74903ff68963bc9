//! Version, Status, RuntimeConfig.

use sandbox::model::Filter;
use serde_json::json;
use tonic::Status;

use super::Runtime;
use crate::v1;

/// Version of the kubelet's side of the interface; has never been anything else.
const KUBELET_API_VERSION: &str = "0.1.0";
const RUNTIME_NAME: &str = "nacelle";
const RUNTIME_API_VERSION: &str = "v1";

impl Runtime {
    pub(super) async fn version(
        &self,
        _: v1::VersionRequest,
    ) -> Result<v1::VersionResponse, Status> {
        Ok(v1::VersionResponse {
            version: KUBELET_API_VERSION.into(),
            runtime_name: RUNTIME_NAME.into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: RUNTIME_API_VERSION.into(),
        })
    }

    /// Two conditions that a kubelet waits for, each with its reason in words while it is not met.
    pub(super) async fn status(
        &self,
        request: v1::StatusRequest,
    ) -> Result<v1::StatusResponse, Status> {
        let conditions = vec![
            condition("RuntimeReady", "HostCannotRunVms", self.health.runtime().await),
            condition("NetworkReady", "NetworkNotReady", self.health.network().await),
        ];
        let features =
            v1::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
        let handler =
            |name: &str| v1::RuntimeHandler { name: name.to_string(), features: Some(features) };
        let mut info = std::collections::BTreeMap::new();
        if request.verbose {
            info.insert("config".to_string(), self.health.facts().to_string());
            info.insert("damaged".to_string(), self.damaged().await.to_string());
        }
        Ok(v1::StatusResponse {
            status: Some(v1::RuntimeStatus { conditions }),
            info,
            runtime_handlers: std::iter::once(handler(""))
                .chain(self.config.handlers.iter().map(|name| handler(name)))
                .collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
        })
    }

    /// What is stored on this node and cannot be read.
    async fn damaged(&self) -> serde_json::Value {
        let pods = self.sandboxes.pods(&Filter::default()).into_iter().filter(|pod| pod.unreadable);
        let pods: Vec<_> = pods.map(|pod| json!({ "id": pod.id, "reason": pod.reason })).collect();
        let images = self.images.damaged().into_iter();
        let images: Vec<_> =
            images.map(|one| json!({ "path": one.path, "reason": one.reason })).collect();
        json!({
            "pods": pods,
            "images": images,
            "networks": self.health.damaged_networks().await,
        })
    }

    pub(super) async fn runtime_config(
        &self,
        _: v1::RuntimeConfigRequest,
    ) -> Result<v1::RuntimeConfigResponse, Status> {
        Ok(v1::RuntimeConfigResponse {
            linux: Some(v1::LinuxRuntimeConfiguration {
                cgroup_driver: v1::CgroupDriver::Cgroupfs as i32,
            }),
        })
    }
}

fn condition(kind: &str, reason: &str, trouble: Option<String>) -> v1::RuntimeCondition {
    v1::RuntimeCondition {
        r#type: kind.to_string(),
        status: trouble.is_none(),
        reason: trouble.as_ref().map_or(String::new(), |_| reason.to_string()),
        message: trouble.unwrap_or_default(),
    }
}
