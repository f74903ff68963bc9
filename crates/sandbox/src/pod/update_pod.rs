//! UpdatePod: memory plugged and unplugged, CPUs brought online or parked, caps of the pod's cgroup
//! on the host.
//!
//! Growing begins on the host, shrinking in the guest, so that the guest never has CPUs that the
//! host keeps it from using longer than it must. More memory comes first, as it may be refused; less
//! comes last, as it may be had in part only.

use std::path::PathBuf;
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::LinuxResources;

use super::handle::Handle;
use super::memory::{self, Shrunk};
use super::run_pod::limit_cpu;
use crate::error::Error;
use crate::model::{CpuLimits, PodResources};
use crate::policy::{Change, Effect, Pod};

/// cpu.max's default period, microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

pub(super) async fn update_pod(
    handle: &Arc<Handle>,
    mut change: PodResources,
) -> Result<(), Error> {
    if handle.machine.host().is_some() {
        // It has no size of its own: its containers' limits are all there is.
        handle.ready_pod()?;
        return Ok(());
    }
    let _one_at_a_time = handle.resizing.lock().await;
    let pod = handle.ready_pod()?;
    if change.vcpus == Some(0) {
        return Err(Error::invalid("a pod needs at least 1 vCPU"));
    }
    let before = match change.memory_mib {
        Some(wanted) => Some(memory::grow(handle, wanted.into()).await?),
        None => None,
    };
    let cap = change.cpu.filter(|new| *new != pod.spec.cpu);
    let raised = cap.filter(|new| share(*new) >= share(pod.spec.cpu));
    if let Some(limits) = raised {
        set_cap(handle, &pod, limits).await;
    }
    let resized = match change.vcpus.filter(|new| *new != vcpus(handle, &pod)) {
        Some(wanted) => resize(handle, &pod, wanted).await,
        None => Ok(()),
    };
    if let Err(error) = resized {
        if raised.is_some() {
            set_cap(handle, &pod, pod.spec.cpu).await;
        }
        if let Some(before) = before {
            memory::ungrow(handle, before).await;
        }
        return Err(error);
    }
    if let (Some(limits), None) = (cap, raised) {
        set_cap(handle, &pod, limits).await;
    }
    let kept = match change.memory_mib {
        Some(wanted) => match memory::shrink(handle, wanted).await? {
            Shrunk::Done => None,
            Shrunk::Kept(kept) => Some((change.memory_mib.replace(kept), kept)),
        },
        None => None,
    };
    handle.commit(vec![Change::Resized { change }]).await?;
    let Some((wanted, kept)) = kept else { return Ok(()) };
    Err(Error::precondition(format!(
        "guest uses too much of its memory to be left with {} MiB; it has {kept} MiB now",
        wanted.unwrap_or_default()
    )))
}

/// CPUs that run in the guest.
fn vcpus(handle: &Handle, pod: &Pod) -> u8 {
    pod.spec.vcpus.unwrap_or(handle.node.config.default_vcpus)
}

/// Of all CPU time, in thousandths of a CPU.
fn share(limits: CpuLimits) -> u64 {
    let period = limits.period_us.unwrap_or(DEFAULT_PERIOD).max(1);
    limits.quota_us.map_or(u64::MAX, |quota| quota.saturating_mul(1000) / period)
}

async fn set_cap(handle: &Handle, pod: &Pod, limits: CpuLimits) {
    let leaf: Option<&PathBuf> = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf),
        _ => None,
    });
    if let Some(leaf) = leaf {
        limit_cpu(leaf, &handle.node.cgroup_root, limits).await;
    }
}

async fn ask(handle: &Handle, cpus: u8) -> Result<u32, Error> {
    let request = v1::ResizePodRequest { cpus: cpus.into() };
    let call =
        handle.guest.call("resize the pod", |mut c| async move { c.resize_pod(request).await });
    Ok(call.await?.cpus)
}

async fn resize(handle: &Handle, pod: &Pod, wanted: u8) -> Result<(), Error> {
    let got = ask(handle, wanted).await?;
    if got >= wanted.into() {
        return Ok(());
    }
    if let Err(error) = ask(handle, vcpus(handle, pod)).await {
        tracing::warn!(pod = handle.id, %error, "guest keeps CPUs that nobody wants");
    }
    Err(Error::OutOfRange {
        message: format!(
            "{wanted} vCPUs are wanted, the pod's VM can run {got}: the pod has to be made anew \
             (max_vcpus)"
        ),
    })
}

/// Limits of a container that are about to be raised: the VM must be able to keep them. Memory is
/// plugged in if it has too little, CPUs are brought online as far as there are more.
pub(super) async fn make_room(
    handle: &Arc<Handle>,
    id: &str,
    old: &LinuxResources,
    new: &LinuxResources,
) -> Result<(), Error> {
    if handle.machine.host().is_some() {
        return Ok(());
    }
    let _one_at_a_time = handle.resizing.lock().await;
    let pod = handle.ready_pod()?;
    let limit = |r: &LinuxResources| r.memory().and_then(|m| m.limit()).filter(|l| *l > 0);
    if let Some(wanted) = limit(new)
        && limit(old).is_some_and(|has| wanted > has)
    {
        let mib = u64::try_from(wanted).unwrap_or(u64::MAX).div_ceil(1 << 20);
        let before = memory::grow(handle, mib).await?;
        if mib > before.into() {
            let memory_mib = u32::try_from(mib).ok();
            let change = PodResources { memory_mib, ..Default::default() };
            handle.commit(vec![Change::Resized { change }]).await?;
        }
    }
    let others = pod.containers.values().filter(|c| c.id != id && c.exit.is_none());
    let wanted: u64 = others.map(|c| thousandths(&c.resources)).sum::<u64>() + thousandths(new);
    let most = handle.node.config.vcpus_at_most(1);
    let wanted = u8::try_from(wanted.div_ceil(1000)).unwrap_or(u8::MAX).min(most);
    if thousandths(new) > thousandths(old) && wanted > vcpus(handle, &pod) {
        let got = u8::try_from(ask(handle, wanted).await?).unwrap_or(wanted);
        let change = PodResources { vcpus: Some(got.clamp(1, wanted)), ..Default::default() };
        handle.commit(vec![Change::Resized { change }]).await?;
    }
    Ok(())
}

/// CPU that a container may use, in thousandths; 0: no limit says.
fn thousandths(resources: &LinuxResources) -> u64 {
    let Some(cpu) = resources.cpu() else { return 0 };
    let quota = cpu.quota().and_then(|q| u64::try_from(q).ok()).unwrap_or(0);
    quota.saturating_mul(1000) / cpu.period().unwrap_or(DEFAULT_PERIOD).max(1)
}
