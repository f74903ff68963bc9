//! UpdatePod: CPUs brought online or parked, caps of the pod's cgroup on the host. Memory stays what
//! the VM was started with.
//!
//! Growing begins on the host, shrinking in the guest, so that the guest never has CPUs that the
//! host keeps it from using longer than it must.

use std::path::PathBuf;
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::LinuxResources;

use super::handle::Handle;
use super::run_pod::limit_cpu;
use crate::error::Error;
use crate::model::{CpuLimits, PodResources};
use crate::policy::{Change, Effect, Pod};

/// cpu.max's default period, microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

pub(super) async fn update_pod(handle: &Arc<Handle>, change: PodResources) -> Result<(), Error> {
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
    if let Some(wanted) = change.memory_mib {
        check_memory(handle, u64::from(wanted) << 20).await?;
    }
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
        return Err(error);
    }
    if let (Some(limits), None) = (cap, raised) {
        set_cap(handle, &pod, limits).await;
    }
    handle.commit(vec![Change::Resized { change }]).await
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

/// A VM's memory cannot grow.
pub(super) async fn check_memory(handle: &Handle, wanted: u64) -> Result<(), Error> {
    let has = handle.vmm.status().await?.memory_mib;
    if wanted > u64::from(has) << 20 {
        return Err(Error::OutOfRange {
            message: format!(
                "{} MiB of memory are wanted, the pod's VM was started with {has} MiB and cannot \
                 be given more: the pod has to be made anew",
                wanted.div_ceil(1 << 20)
            ),
        });
    }
    Ok(())
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
/// checked, CPUs are brought online as far as there are more.
pub(super) async fn make_room(
    handle: &Arc<Handle>,
    id: &str,
    old: &LinuxResources,
    new: &LinuxResources,
) -> Result<(), Error> {
    if handle.machine.host().is_some() {
        return Ok(());
    }
    let memory = |r: &LinuxResources| r.memory().and_then(|m| m.limit()).filter(|l| *l > 0);
    if let Some(wanted) = memory(new)
        && memory(old).is_some_and(|has| wanted > has)
    {
        check_memory(handle, u64::try_from(wanted).unwrap_or(u64::MAX)).await?;
    }
    let _one_at_a_time = handle.resizing.lock().await;
    let pod = handle.ready_pod()?;
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
