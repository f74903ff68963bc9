//! UpdatePod: plugs and unplugs memory, brings CPUs online or offline, sets the CPU limits of the
//! pod's cgroup on the host.
//!
//! Growing starts on the host, shrinking in the guest, so that the guest does not have CPUs that it
//! may not use longer than necessary. Memory is grown first, as that may be refused, and shrunk
//! last, as that may succeed only partially.

use std::path::PathBuf;
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::LinuxResources;

use super::handle::Handle;
use super::memory::{self, ShrinkResult};
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
        // It has no size: only its containers' limits.
        handle.ready_pod()?;
        return Ok(());
    }
    let _one_at_a_time = handle.resize_lock.lock().await;
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
        set_cpu_limits(handle, &pod, limits).await;
    }
    let resized = match change.vcpus.filter(|new| *new != vcpus(handle, &pod)) {
        Some(wanted) => resize(handle, &pod, wanted).await,
        None => Ok(()),
    };
    if let Err(error) = resized {
        if raised.is_some() {
            set_cpu_limits(handle, &pod, pod.spec.cpu).await;
        }
        if let Some(before) = before {
            memory::revert_growth(handle, before).await;
        }
        return Err(error);
    }
    if let (Some(limits), None) = (cap, raised) {
        set_cpu_limits(handle, &pod, limits).await;
    }
    let kept = match change.memory_mib {
        Some(wanted) => match memory::shrink(handle, wanted).await? {
            ShrinkResult::Done => None,
            ShrinkResult::Kept(kept) => Some((change.memory_mib.replace(kept), kept)),
        },
        None => None,
    };
    handle.commit(vec![Change::Resized { change }]).await?;
    let Some((wanted, kept)) = kept else { return Ok(()) };
    Err(Error::precondition(format!(
        "the guest uses too much memory to shrink to {} MiB; it now has {kept} MiB",
        wanted.unwrap_or_default()
    )))
}

/// Online vCPUs of the guest.
fn vcpus(handle: &Handle, pod: &Pod) -> u8 {
    pod.spec.vcpus.unwrap_or(handle.node.config.default_vcpus)
}

/// CPU limit in thousandths of a CPU.
fn share(limits: CpuLimits) -> u64 {
    let period = limits.period_us.unwrap_or(DEFAULT_PERIOD).max(1);
    limits.quota_us.map_or(u64::MAX, |quota| quota.saturating_mul(1000) / period)
}

async fn set_cpu_limits(handle: &Handle, pod: &Pod, limits: CpuLimits) {
    let leaf: Option<&PathBuf> = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf),
        _ => None,
    });
    if let Some(leaf) = leaf {
        limit_cpu(leaf, &handle.node.cgroup_root, limits).await;
    }
}

async fn set_guest_cpus(handle: &Handle, cpus: u8) -> Result<u32, Error> {
    let request = v1::ResizePodRequest { cpus: cpus.into() };
    let call =
        handle.guest.call("resize the pod", |mut c| async move { c.resize_pod(request).await });
    Ok(call.await?.cpus)
}

async fn resize(handle: &Handle, pod: &Pod, wanted: u8) -> Result<(), Error> {
    let got = set_guest_cpus(handle, wanted).await?;
    if got >= wanted.into() {
        return Ok(());
    }
    if let Err(error) = set_guest_cpus(handle, vcpus(handle, pod)).await {
        tracing::warn!(pod = handle.id, %error, "cannot take CPUs offline in the guest");
    }
    Err(Error::OutOfRange {
        message: format!(
            "{wanted} vCPUs requested, the pod's VM can run {got}: recreate the pod with a \
             higher max_vcpus"
        ),
    })
}

/// Grows the VM before limits of a container are raised: plugs memory if it has too little, brings
/// CPUs online as far as available.
pub(super) async fn grow_for_container(
    handle: &Arc<Handle>,
    id: &str,
    old: &LinuxResources,
    new: &LinuxResources,
) -> Result<(), Error> {
    if handle.machine.host().is_some() {
        return Ok(());
    }
    let _one_at_a_time = handle.resize_lock.lock().await;
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
    let wanted: u64 = others.map(|c| milli_cpus(&c.resources)).sum::<u64>() + milli_cpus(new);
    let most = handle.node.config.max_vcpus_of(1);
    let wanted = u8::try_from(wanted.div_ceil(1000)).unwrap_or(u8::MAX).min(most);
    if milli_cpus(new) > milli_cpus(old) && wanted > vcpus(handle, &pod) {
        let got = u8::try_from(set_guest_cpus(handle, wanted).await?).unwrap_or(wanted);
        let change = PodResources { vcpus: Some(got.clamp(1, wanted)), ..Default::default() };
        handle.commit(vec![Change::Resized { change }]).await?;
    }
    Ok(())
}

/// CPU limit of a container in thousandths; 0: no limit.
fn milli_cpus(resources: &LinuxResources) -> u64 {
    let Some(cpu) = resources.cpu() else { return 0 };
    let quota = cpu.quota().and_then(|q| u64::try_from(q).ok()).unwrap_or(0);
    quota.saturating_mul(1000) / cpu.period().unwrap_or(DEFAULT_PERIOD).max(1)
}
