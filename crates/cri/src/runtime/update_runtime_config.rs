//! UpdateRuntimeConfig: a kubelet's word on the node's pod CIDR. It is for runtimes that write their
//! CNI configuration from a template; this one has none, and takes what the node's network provider
//! writes. As with containerd without a template, a sound request succeeds and changes nothing.

use std::net::IpAddr;

use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::errors::refusal_status;
use crate::v1;

impl Runtime {
    pub(super) async fn update_runtime_config(
        &self,
        request: v1::UpdateRuntimeConfigRequest,
    ) -> Result<v1::UpdateRuntimeConfigResponse, Status> {
        let network = request.runtime_config.and_then(|config| config.network_config);
        let cidrs = network.map(|network| network.pod_cidr).unwrap_or_default();
        check(&cidrs).map_err(refusal_status)?;
        if !cidrs.is_empty() {
            tracing::info!(cidrs, "the pod CIDR is left to the node's CNI configuration");
        }
        Ok(v1::UpdateRuntimeConfigResponse {})
    }
}

/// Several of them are separated by commas.
fn check(cidrs: &str) -> Result<(), Refusal> {
    let is_network = |cidr: &str| {
        let Some((address, length)) = cidr.trim().split_once('/') else { return false };
        let most = match address.parse() {
            Ok(IpAddr::V4(_)) => 32,
            Ok(IpAddr::V6(_)) => 128,
            Err(_) => return false,
        };
        length.parse::<u8>().is_ok_and(|length| length <= most)
    };
    if cidrs.is_empty() || cidrs.split(',').all(is_network) {
        return Ok(());
    }
    Err(Refusal::invalid(
        "runtime_config.network_config.pod_cidr",
        format!("{cidrs:?} is not a list of networks like 10.0.0.0/24"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_both_families_are_accepted_and_others_rejected() {
        for valid in ["", "10.0.0.0/24", "10.0.0.0/24, fd00::/64"] {
            assert_eq!(check(valid), Ok(()), "{valid}");
        }
        for wrong in ["10.0.0.0", "10.0.0.0/33", "pods", "10.0.0.0/24,", "fd00::/129"] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
