//! The header, `pods/<id>/header.json`: what the node must know of a pod whose record is
//! unreadable.
//!
//! It is written before the record. Fields are never renamed and never change their meaning; fields
//! may be added. So every release reads the headers of all others: unknown fields are ignored,
//! missing fields have their default.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::model::Meta;
use crate::policy::{Effect, Pod};

/// Informational; no reader depends on it.
const VERSION: u32 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Header {
    version: u32,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) namespace: String,
    /// Uid of the Kubernetes object.
    pub(crate) uid: String,
    pub(crate) attempt: u32,
    /// A kubelet finds its pods by label.
    pub(crate) labels: BTreeMap<String, String>,
    /// Runtime handler.
    pub(crate) handler: String,
    /// Nanoseconds since the epoch.
    created_ns: u64,
    /// Uid of the VMM.
    pub(crate) jail_uid: Option<u32>,
    /// The pod's leaf cgroup, and those ancestors that were created for it.
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) cgroup_parents: Vec<PathBuf>,
    pub(crate) netns: PathBuf,
    /// First is the primary address.
    pub(crate) addresses: Vec<IpAddr>,
}

impl Header {
    pub(crate) fn of(pod: &Pod) -> Self {
        let Meta { name, namespace, uid, attempt, labels, annotations: _ } = pod.spec.meta.clone();
        let created = pod.created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let cgroup = pod.ledger.iter().find_map(|effect| match effect {
            Effect::Cgroup { leaf, parents } => Some((leaf.clone(), parents.clone())),
            _ => None,
        });
        let (cgroup, cgroup_parents) = cgroup.unzip();
        Self {
            version: VERSION,
            id: pod.id.clone(),
            name,
            namespace,
            uid,
            attempt,
            labels,
            handler: pod.spec.handler.clone(),
            created_ns: u64::try_from(created.as_nanos()).unwrap_or_default(),
            jail_uid: Some(pod.uid),
            cgroup,
            cgroup_parents: cgroup_parents.unwrap_or_default(),
            netns: pod.netns.clone(),
            addresses: pod.attachment.addresses.clone(),
        }
    }

    /// None if unreadable or of another pod.
    pub(crate) fn decode(bytes: &[u8], id: &str) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|header: &Self| header.id == id)
    }

    pub(crate) fn created_at(&self) -> Option<SystemTime> {
        (self.created_ns != 0).then(|| UNIX_EPOCH + Duration::from_nanos(self.created_ns))
    }
}
