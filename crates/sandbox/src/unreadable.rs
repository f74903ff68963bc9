//! A pod whose record is unreadable, reconstructed from its header, single fields of the record,
//! and names derived from its id.
//!
//! Such a pod is not ready and has no containers. It keeps its name, uid and network, and can be
//! stopped and removed; so its processes are killed before its name is free again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::host::cgroup;
use crate::journal::{Header, PartialRecord, Unreadable};
use crate::model::{Meta, PodSpec};
use crate::policy::{Effect, EmptyDirs, Phase, Pod};
use crate::ports::Attachment;

/// Paths of the pod on this node.
pub(crate) struct NodePaths<'a> {
    pub(crate) cgroup_root: &'a Path,
    pub(crate) state_dir: PathBuf,
    pub(crate) directory: PathBuf,
    pub(crate) boot_id: &'a str,
}

pub(crate) struct Reconstructed {
    pub(crate) pod: Pod,
    /// Uids that the pod's VMM has or may have.
    pub(crate) uids: Vec<u32>,
}

/// Blocks.
pub(crate) fn reconstruct(unreadable: Unreadable, paths: &NodePaths<'_>) -> Reconstructed {
    let Unreadable { id, why, header, partial, made } = unreadable;
    let PartialRecord { boot_id, created_at, uid, netns, ledger, attachment, meta, spec } = partial;
    let mut spec = spec.unwrap_or_else(empty_spec);
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
    let same_boot = boot_id.as_deref() == Some(paths.boot_id);
    let ledger = effects_to_undo(&id, paths, leaf, ledger, same_boot);
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
        reason: format!(
            "the pod's record is unreadable: {why}; stop or remove the pod to end its processes"
        ),
        uid: jail_uid.unwrap_or_default(),
        netns: pod_netns.unwrap_or_default(),
        ledger,
        attachment: Arc::new(attachment),
        kernel_release: String::new(),
        trace: Vec::new(),
        empty_dirs: EmptyDirs::default(),
        containers: Default::default(),
        unreadable: true,
    };
    Reconstructed { pod, uids }
}

/// Effects to undo. Undoing a missing effect is no error, so the list has every effect that a pod
/// can have and whose name derives from its id. A path from a damaged record is used only if it
/// belongs to this pod.
fn effects_to_undo(
    id: &str,
    paths: &NodePaths<'_>,
    leaf: Option<(PathBuf, Vec<PathBuf>)>,
    partial: Vec<Effect>,
    same_boot: bool,
) -> Vec<Effect> {
    let scratch = paths.directory.join("scratch.img");
    let mut effects = vec![Effect::StateDir { path: paths.state_dir.clone() }, Effect::Network];
    let is_ours = |leaf: &Path| {
        leaf.starts_with(paths.cgroup_root)
            && leaf.file_name().is_some_and(|name| *name == *format!("nacelle-{id}"))
            && leaf.components().all(|c| c != std::path::Component::ParentDir)
    };
    let recorded = partial.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, parents } => Some((leaf.clone(), parents.clone())),
        _ => None,
    });
    match leaf.or(recorded).filter(|(leaf, _)| is_ours(leaf)) {
        Some((leaf, mut parents)) => {
            parents.retain(|parent| leaf.starts_with(parent) && parent != paths.cgroup_root);
            effects.push(Effect::Cgroup { leaf, parents });
        }
        None => {
            let found = cgroup::find_leaves(paths.cgroup_root, id).into_iter();
            effects.extend(found.map(|leaf| Effect::Cgroup { leaf, parents: Vec::new() }));
        }
    }
    effects.push(Effect::ScratchDisk { path: scratch });
    // Pids are valid only in the boot in which they were recorded.
    let is_process = |e: &Effect| matches!(e, Effect::Vmm { .. } | Effect::FileServer { .. });
    effects.extend(partial.into_iter().filter(|effect| same_boot && is_process(effect)));
    effects
}

fn empty_spec() -> PodSpec {
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
