//! Where a pod's agent runs: in a VM, or on the host.

use std::path::Path;

use crate::error::Error;
use crate::model::HostNamespaces;
use crate::vmm::{Vmm, serial};

#[derive(Debug, Clone)]
pub(crate) enum Machine {
    Vm(Vmm),
    /// A host pod: namespaces of the host, no VM.
    Host(HostNamespaces),
}

impl Machine {
    pub(crate) fn vmm(&self) -> Result<&Vmm, Error> {
        match self {
            Self::Vm(vmm) => Ok(vmm),
            Self::Host(_) => Err(Error::precondition("the pod has host namespaces and no VM")),
        }
    }

    /// None if the pod has a VM.
    pub(crate) fn host(&self) -> Option<HostNamespaces> {
        match self {
            Self::Vm(_) => None,
            Self::Host(namespaces) => Some(*namespaces),
        }
    }

    /// Name of an image in requests to the agent.
    pub(crate) fn image(&self, image: &Path) -> String {
        match self {
            Self::Vm(_) => serial('e', image.as_os_str().as_encoded_bytes()),
            Self::Host(_) => format!("{}{}", agent_api::host_pod::FILE, image.display()),
        }
    }
}
