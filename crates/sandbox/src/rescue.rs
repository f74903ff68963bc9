//! A pod whose record cannot be read, made from what is known all the same: its header, single
//! fields of the record, its id and what is named after that.
//!
//! Such a pod is not ready and has no containers. It keeps its name, its uid and its network, and
//! can be stopped and removed; so what may still run of it is ended before its name is given again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::host::cgroup;
use crate::journal::{Header, Rescued, Unread};
use crate::model::{Meta, PodSpec};
use crate::policy::{Effect, EmptyDirs, Phase, Pod};
use crate::ports::Attachment;

/// Where things of the pod are on this node.
pub(crate) struct Place<'a> {
    pub(crate) cgroup_root: &'a Path,
    pub(crate) state_dir: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) boot_id: &'a str,
}

pub(crate) struct Known {
    pub(crate) pod: Pod,
    /// That the pod's VMM has or may have.
    pub(crate) uids: Vec<u32>,
}

/// Blocks.
pub(crate) fn known(unread: Unread, place: &Place<'_>) -> Known {
    let Unread { id, why, header, rescued, made } = unread;
    let Rescued { boot_id, created_at, uid, netns, ledger, attachment, meta, spec } = rescued;
    let mut spec = spec.unwrap_or_else(bare);
    spec.meta = meta.unwrap_or_default();
    let mut attachment = attachment.unwrap_or_default();
    let (mut pod_netns, mut created, mut jail_uid) = (netns, created_at, uid);
    let mut leaf = None;
    if let Some(header) = header {
        created = header.created_at().or(created);
        let Header { name, namespace, uid, attempt, labels, .. } = header;
        let annotations = std::mem::take(&mut spec.meta.annotations);
        spec.meta = Meta { name, namespace, uid, attempt, labels, annotations };
        spec.handler = header.handler;
        jail_uid = header.jail_uid.or(jail_uid);
        pod_netns = Some(header.netns);
        leaf = header.cgroup.map(|leaf| (leaf, header.cgroup_parents));
        if attachment.addresses.is_empty() {
            attachment = Attachment { addresses: header.addresses, ..attachment };
        }
    }
    let same_boot = boot_id.as_deref() == Some(place.boot_id);
    let ledger = effects(&id, place, leaf, ledger, same_boot);
    let mut uids: Vec<u32> = jail_uid.into_iter().collect();
    for effect in &ledger {
        if let Effect::Cgroup { leaf, .. } = effect {
            uids.extend(cgroup::uids(leaf));
        }
    }
    let pod = Pod {
        id,
        spec: Arc::new(spec),
        created_at: created.or(made).unwrap_or(SystemTime::UNIX_EPOCH),
        phase: Phase::NotReady,
        reason: format!("the pod's record cannot be read: {why}; what runs of it ends with a stop"),
        uid: jail_uid.unwrap_or_default(),
        netns: pod_netns.unwrap_or_default(),
        ledger,
        attachment: Arc::new(attachment),
        kernel_release: String::new(),
        trace: Vec::new(),
        empty_dirs: EmptyDirs::default(),
        containers: Default::default(),
        unread: true,
    };
    Known { pod, uids }
}

/// What has to be undone. Undoing what is not there is no error, so everything that a pod can have
/// and that is named after its id is in it. A damaged record is believed only where what it says
/// belongs to this pod.
fn effects(
    id: &str,
    place: &Place<'_>,
    leaf: Option<(PathBuf, Vec<PathBuf>)>,
    rescued: Vec<Effect>,
    same_boot: bool,
) -> Vec<Effect> {
    let scratch = place.folder.join("scratch.img");
    let mut effects = vec![Effect::StateDir { path: place.state_dir.clone() }, Effect::Network];
    let is_ours = |leaf: &Path| {
        leaf.starts_with(place.cgroup_root)
            && leaf.file_name().is_some_and(|name| *name == *format!("nacelle-{id}"))
            && leaf.components().all(|c| c != std::path::Component::ParentDir)
    };
    let of_record = rescued.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, parents } => Some((leaf.clone(), parents.clone())),
        _ => None,
    });
    match leaf.or(of_record).filter(|(leaf, _)| is_ours(leaf)) {
        Some((leaf, mut parents)) => {
            parents.retain(|parent| leaf.starts_with(parent) && parent != place.cgroup_root);
            effects.push(Effect::Cgroup { leaf, parents });
        }
        None => {
            let found = cgroup::find_leaves(place.cgroup_root, id).into_iter();
            effects.extend(found.map(|leaf| Effect::Cgroup { leaf, parents: Vec::new() }));
        }
    }
    effects.push(Effect::ScratchDisk { path: scratch });
    // A pid means something in the boot in which it was written down.
    let is_process = |e: &Effect| matches!(e, Effect::Vmm { .. } | Effect::FileServer { .. });
    effects.extend(rescued.into_iter().filter(|effect| same_boot && is_process(effect)));
    effects
}

fn bare() -> PodSpec {
    PodSpec {
        meta: Meta::default(),
        hostname: String::new(),
        handler: String::new(),
        cgroup_parent: String::new(),
        log_directory: String::new(),
        sysctls: Default::default(),
        dns: Default::default(),
        ports: Vec::new(),
        vcpus: None,
        memory_mib: None,
        cpu: Default::default(),
        host: None,
        origin: serde_json::Value::Null,
    }
}
