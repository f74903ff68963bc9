//! What a pod's agent runs in: a VM, or the host itself.

use std::path::Path;

use crate::error::Error;
use crate::model::HostNamespaces;
use crate::vmm::{Vmm, serial};

#[derive(Debug, Clone)]
pub(crate) enum Machine {
    Vm(Vmm),
    /// The pod has namespaces of the host, and no VM.
    Host(HostNamespaces),
}

impl Machine {
    pub(crate) fn vmm(&self) -> Result<&Vmm, Error> {
        match self {
            Self::Vm(vmm) => Ok(vmm),
            Self::Host(_) => {
                Err(Error::precondition("the pod has namespaces of the host, and no VM"))
            }
        }
    }

    /// None: the pod has a VM.
    pub(crate) fn host(&self) -> Option<HostNamespaces> {
        match self {
            Self::Vm(_) => None,
            Self::Host(namespaces) => Some(*namespaces),
        }
    }

    /// What the agent calls an image.
    pub(crate) fn image(&self, image: &Path) -> String {
        match self {
            Self::Vm(_) => serial('e', image.as_os_str().as_encoded_bytes()),
            Self::Host(_) => format!("{}{}", agent_api::host_pod::FILE, image.display()),
        }
    }
}
