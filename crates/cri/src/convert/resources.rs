//! CRI's LinuxContainerResources to OCI's LinuxResources, and a pod's request to the size of its
//! VM.
//!
//! CPU and memory node sets name those of the host, as a kubelet's CPU manager means them: a VM is
//! kept on what its containers have together, which is the life cycle's to do. See
//! docs/resources.md for what becomes of every limit.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    LinuxCpu, LinuxCpuBuilder, LinuxHugepageLimitBuilder, LinuxMemory, LinuxResources,
    LinuxResourcesBuilder,
};

use sandbox::model::{CpuLimits, PodSizing};

use super::Refusal;
use crate::config::Config;
use crate::v1;

const MIB: i64 = 1 << 20;
/// cpu.max's default period, microseconds (cgroup-v2.rst).
const DEFAULT_PERIOD: i64 = 100_000;
/// cgroup v1's cpu.shares that a kubelet writes for a CPU.
const SHARES_OF_A_CPU: u64 = 1024;
/// The size of a guest's huge pages, as CRI and the hugetlb controller write it.
const HUGE_PAGE: &str = "2MB";
/// OOM scores the kernel knows (proc(5), oom_score_adj).
pub const OOM_SCORE: std::ops::RangeInclusive<i64> = -1000..=1000;

/// Zero and absent mean "not set" throughout the interface; -1 is "no limit" for a quota.
pub fn to_oci(request: &v1::LinuxContainerResources) -> Result<LinuxResources, Refusal> {
    check(request)?;
    let mut resources = LinuxResourcesBuilder::default().build().map_err(internal)?;
    resources.set_cpu(cpu(request)?);
    resources.set_memory(memory(request));
    if let Some(limit) = huge_bytes(request).and_then(|bytes| i64::try_from(bytes).ok()) {
        let limit = LinuxHugepageLimitBuilder::default().page_size(HUGE_PAGE).limit(limit);
        resources.set_hugepage_limits(Some(vec![limit.build().map_err(internal)?]));
    }
    if !request.unified.is_empty() {
        resources.set_unified(Some(request.unified.clone().into_iter().collect()));
    }
    Ok(resources)
}

fn cpu(request: &v1::LinuxContainerResources) -> Result<Option<LinuxCpu>, Refusal> {
    let mut cpu = LinuxCpuBuilder::default().build().map_err(internal)?;
    cpu.set_shares(positive(request.cpu_shares));
    cpu.set_quota(Some(request.cpu_quota).filter(|quota| *quota != 0));
    cpu.set_period(positive(request.cpu_period));
    cpu.set_cpus(Some(request.cpuset_cpus.clone()).filter(|set| !set.is_empty()));
    cpu.set_mems(Some(request.cpuset_mems.clone()).filter(|set| !set.is_empty()));
    let none = cpu.shares().is_none()
        && cpu.quota().is_none()
        && cpu.period().is_none()
        && cpu.cpus().is_none()
        && cpu.mems().is_none();
    Ok(Some(cpu).filter(|_| !none))
}

/// Who limits memory and says nothing of swap gets no swap. OCI counts both together.
fn memory(request: &v1::LinuxContainerResources) -> Option<LinuxMemory> {
    let limit = Some(request.memory_limit_in_bytes).filter(|limit| *limit != 0);
    let both = Some(request.memory_swap_limit_in_bytes).filter(|both| *both != 0).or(limit);
    both.map(|both| {
        let mut memory = LinuxMemory::default();
        memory.set_limit(limit);
        memory.set_swap(Some(both));
        memory
    })
}

fn check(request: &v1::LinuxContainerResources) -> Result<(), Refusal> {
    let at_least = |field: &str, value: i64, least: i64| {
        if value < least {
            return Err(Refusal::invalid(field, format!("{value} is no limit")));
        }
        Ok(())
    };
    at_least("cpu_period", request.cpu_period, 0)?;
    at_least("cpu_quota", request.cpu_quota, -1)?;
    at_least("cpu_shares", request.cpu_shares, 0)?;
    at_least("memory_limit_in_bytes", request.memory_limit_in_bytes, -1)?;
    at_least("memory_swap_limit_in_bytes", request.memory_swap_limit_in_bytes, -1)?;
    let (limit, both) = (request.memory_limit_in_bytes, request.memory_swap_limit_in_bytes);
    if both > 0 && limit > both {
        return Err(Refusal::invalid(
            "memory_swap_limit_in_bytes",
            format!("{both} is memory and swap together, and less than the {limit} of memory"),
        ));
    }
    if !OOM_SCORE.contains(&request.oom_score_adj) {
        return Err(Refusal::invalid(
            "oom_score_adj",
            format!("{} is outside of -1000..1000", request.oom_score_adj),
        ));
    }
    for (field, set) in
        [("cpuset_cpus", &request.cpuset_cpus), ("cpuset_mems", &request.cpuset_mems)]
    {
        if !set.bytes().all(|b| b.is_ascii_digit() || b == b',' || b == b'-') {
            return Err(Refusal::invalid(field, format!("{set:?} is not a list like 0-2,4")));
        }
    }
    // A kubelet sends a limit of 0 for every size of huge page that its node knows.
    let other = |limit: &&v1::HugepageLimit| limit.limit > 0 && limit.page_size != HUGE_PAGE;
    if let Some(huge) = request.hugepage_limits.iter().find(other) {
        return Err(Refusal::unsupported(
            "hugepage_limits",
            format!("{:?}: a pod's VM has huge pages of {HUGE_PAGE} alone", huge.page_size),
        ));
    }
    if huge_bytes(request).is_some_and(|bytes| i64::try_from(bytes).is_err()) {
        return Err(Refusal::invalid("hugepage_limits", "more than there can be"));
    }
    check_unified(&request.unified)
}

/// Keys are file names in the container's cgroup (cgroup-v2.rst), so nothing may lead elsewhere.
fn check_unified(unified: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let named = |key: &str| {
        key.contains('.')
            && !key.starts_with('.')
            && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    match unified.keys().find(|key| !named(key)) {
        Some(key) => Err(Refusal::invalid(
            "unified",
            format!("{key:?} is not the name of a cgroup v2 file, like memory.high"),
        )),
        None => Ok(()),
    }
}

/// The limit on pages of 2 MiB; the last one counts, as with a cgroup's file.
fn huge_bytes(request: &v1::LinuxContainerResources) -> Option<u64> {
    let mut limits = request.hugepage_limits.iter();
    limits.rfind(|limit| limit.page_size == HUGE_PAGE).map(|limit| limit.limit)
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn internal(error: oci_spec::OciSpecError) -> Refusal {
    Refusal::invalid("resources", error.to_string())
}

/// Limits in force, for a status.
pub fn from_oci(resources: &LinuxResources) -> v1::LinuxContainerResources {
    let cpu = resources.cpu().clone().unwrap_or_default();
    let signed = |value: Option<u64>| value.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX));
    v1::LinuxContainerResources {
        cpu_period: signed(cpu.period()),
        cpu_quota: cpu.quota().unwrap_or(0),
        cpu_shares: signed(cpu.shares()),
        cpuset_cpus: cpu.cpus().clone().unwrap_or_default(),
        cpuset_mems: cpu.mems().clone().unwrap_or_default(),
        memory_limit_in_bytes: resources.memory().and_then(|m| m.limit()).unwrap_or(0),
        memory_swap_limit_in_bytes: resources.memory().and_then(|m| m.swap()).unwrap_or(0),
        unified: resources.unified().clone().unwrap_or_default().into_iter().collect(),
        ..Default::default()
    }
}

/// What an update changes over what is in force; a limit that the update leaves at its zero stays.
pub fn overlay(current: &LinuxResources, update: &LinuxResources) -> LinuxResources {
    let mut merged = LinuxResources::default();
    let (old, new) = (current.cpu().clone(), update.cpu().clone());
    merged.set_cpu(match (old, new) {
        (Some(old), Some(new)) => {
            let mut cpu = old.clone();
            cpu.set_shares(new.shares().or(old.shares()));
            cpu.set_quota(new.quota().or(old.quota()));
            cpu.set_period(new.period().or(old.period()));
            cpu.set_cpus(new.cpus().clone().or_else(|| old.cpus().clone()));
            cpu.set_mems(new.mems().clone().or_else(|| old.mems().clone()));
            Some(cpu)
        }
        (old, new) => new.or(old),
    });
    merged.set_memory(match (*current.memory(), *update.memory()) {
        (Some(old), Some(new)) => {
            let mut memory = new;
            memory.set_limit(new.limit().or(old.limit()));
            Some(memory)
        }
        (old, new) => new.or(old),
    });
    let huge = update.hugepage_limits().clone();
    merged.set_hugepage_limits(huge.or_else(|| current.hugepage_limits().clone()));
    let mut unified = current.unified().clone().unwrap_or_default();
    unified.extend(update.unified().clone().unwrap_or_default());
    merged.set_unified(Some(unified).filter(|unified| !unified.is_empty()));
    // Device rules are not a limit and never change.
    merged.set_devices(None);
    merged
}

/// CPUs and memory of a pod's VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub vcpus: Option<u8>,
    pub memory_mib: Option<u32>,
}

/// The sum of the containers' limits (`resources`) and what the pod itself costs (`overhead`).
/// Without limits the configured default counts, for a pod without limits may use what is there.
pub fn vm_size(
    resources: Option<&v1::LinuxContainerResources>,
    overhead: Option<&v1::LinuxContainerResources>,
    host_cpus: usize,
    config: &Config,
) -> Result<Size, Refusal> {
    let none = v1::LinuxContainerResources::default();
    let resources_given = resources.unwrap_or(&none);
    let overhead_given = overhead.unwrap_or(&none);
    check(resources_given).map_err(|refusal| refusal.in_field("linux.resources"))?;
    check(overhead_given).map_err(|refusal| refusal.in_field("linux.overhead"))?;

    let cpus = |r: &v1::LinuxContainerResources| {
        let period = if r.cpu_period > 0 { r.cpu_period } else { DEFAULT_PERIOD };
        (r.cpu_quota > 0).then(|| r.cpu_quota as f64 / period as f64)
    };
    // More CPUs than the host has would only wait for each other.
    let most = u8::try_from(host_cpus).unwrap_or(u8::MAX).max(1);
    let vcpus = cpus(resources_given).map(|limit| {
        let sum = limit + cpus(overhead_given).unwrap_or(0.0);
        // A request of 1.0 CPU must not become 2 by a rounding error in the sum.
        (sum - 1e-6).ceil().clamp(1.0, f64::from(most)) as u8
    });

    let memory_mib = match resources_given.memory_limit_in_bytes {
        limit if limit > 0 => {
            let room = match overhead_given.memory_limit_in_bytes {
                stated if stated > 0 => stated,
                _ => i64::from(config.guest_overhead_mib) * MIB,
            };
            // Beside the memory that is limited: the memory controller does not count them.
            let huge = huge_bytes(resources_given).and_then(|bytes| i64::try_from(bytes).ok());
            let mib = limit
                .saturating_add(huge.unwrap_or(0))
                .saturating_add(room)
                .saturating_add(MIB - 1)
                / MIB;
            let mib = u32::try_from(mib).map_err(|_| {
                Refusal::invalid(
                    "linux.resources.memory_limit_in_bytes",
                    format!("{limit} is more than a VM can have"),
                )
            })?;
            Some(mib.max(config.min_memory_mib))
        }
        _ => None,
    };
    Ok(Size { vcpus, memory_mib })
}

/// What the VM may take of the host's CPUs: the containers' limits and what the pod itself costs.
pub fn cpu_limits(
    resources: Option<&v1::LinuxContainerResources>,
    overhead: Option<&v1::LinuxContainerResources>,
) -> CpuLimits {
    let none = v1::LinuxContainerResources::default();
    let (asked, overhead) = (resources.unwrap_or(&none), overhead.unwrap_or(&none));
    let period = if asked.cpu_period > 0 { asked.cpu_period } else { DEFAULT_PERIOD };
    let more = match (overhead.cpu_quota, overhead.cpu_period) {
        (..=0, _) => 0,
        (quota, ..=0) => quota.saturating_mul(period) / DEFAULT_PERIOD,
        (quota, of) => quota.saturating_mul(period) / of,
    };
    let shares = asked.cpu_shares.saturating_add(overhead.cpu_shares);
    CpuLimits {
        quota_us: positive(asked.cpu_quota).map(|quota| quota.saturating_add_signed(more)),
        period_us: positive(asked.cpu_quota).and(positive(period)),
        shares: positive(asked.cpu_shares).and(positive(shares)),
    }
}

/// Size and CPU limits of a pod in which some containers have no limits.
///
/// A kubelet adds up the limits that there are. Where some container has none, the sum is no limit of
/// the pod's, and the kubelet leaves the pod's cgroup, which it makes first, without one: such a pod
/// has what a pod without limits has beside the sum. A pod with CPUs of its own has no quota either,
/// but shares that say how many (1024 a CPU).
pub fn with_open_limits(
    mut size: Size,
    mut cpu: CpuLimits,
    sizing: PodSizing,
    host_cpus: usize,
) -> (Size, CpuLimits) {
    if sizing.cpu_unlimited && cpu.quota_us.is_some() {
        (cpu.quota_us, cpu.period_us) = (None, None);
        size.vcpus = size.vcpus.map(|sum| sum.max(sizing.vcpus));
    }
    if cpu.quota_us.is_none()
        && let Some(shares) = cpu.shares
    {
        let most = u8::try_from(host_cpus).unwrap_or(u8::MAX).max(1);
        let asked = u8::try_from(shares.div_ceil(SHARES_OF_A_CPU)).unwrap_or(u8::MAX).min(most);
        if asked > size.vcpus.unwrap_or(sizing.vcpus) {
            size.vcpus = Some(asked);
        }
    }
    if sizing.memory_unlimited {
        size.memory_mib = size.memory_mib.map(|sum| sum.saturating_add(sizing.memory_mib));
    }
    (size, cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_of_some_containers_limits_does_not_limit_the_pod() {
        let size = Size { vcpus: Some(1), memory_mib: Some(256) };
        let cpu =
            CpuLimits { quota_us: Some(10_000), period_us: Some(100_000), shares: Some(2150) };
        let closed =
            PodSizing { vcpus: 2, memory_mib: 2048, cpu_unlimited: false, memory_unlimited: false };
        assert_eq!(with_open_limits(size, cpu, closed, 8), (size, cpu));
        let open = PodSizing { cpu_unlimited: true, memory_unlimited: true, ..closed };
        let (wide, free) = with_open_limits(size, cpu, open, 8);
        assert_eq!(free, CpuLimits { quota_us: None, period_us: None, shares: Some(2150) });
        // Its containers ask for 2.1 CPUs.
        assert_eq!(wide, Size { vcpus: Some(3), memory_mib: Some(256 + 2048) });
        assert_eq!(with_open_limits(size, cpu, open, 2).0.vcpus, Some(2));
        let unlimited = with_open_limits(Size::default(), CpuLimits::default(), open, 8);
        assert_eq!(unlimited, (Size::default(), CpuLimits::default()));
    }

    #[test]
    fn a_pod_with_cpus_of_its_own_has_as_many() {
        let sizing = PodSizing { vcpus: 2, memory_mib: 2048, ..PodSizing::default() };
        let exclusive = |shares| CpuLimits { shares: Some(shares), ..CpuLimits::default() };
        let vcpus =
            |shares| with_open_limits(Size::default(), exclusive(shares), sizing, 16).0.vcpus;
        assert_eq!(vcpus(8192), Some(8));
        assert_eq!(vcpus(1 << 18), Some(16));
        // What the default covers is left to it.
        assert_eq!((vcpus(2), vcpus(2048), vcpus(2049)), (None, None, Some(3)));
    }

    fn request() -> v1::LinuxContainerResources {
        v1::LinuxContainerResources::default()
    }

    #[test]
    fn what_is_not_set_stays_not_set() {
        let oci = to_oci(&request()).unwrap();
        assert!(oci.cpu().is_none() && oci.memory().is_none() && oci.unified().is_none());
    }

    #[test]
    fn limits_arrive_in_their_places() {
        let oci = to_oci(&v1::LinuxContainerResources {
            cpu_period: 50_000,
            cpu_quota: 25_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            cpuset_cpus: "3,5".into(),
            cpuset_mems: "1".into(),
            unified: [("pids.max".to_string(), "10".to_string())].into(),
            ..request()
        })
        .unwrap();
        let cpu = oci.cpu().as_ref().unwrap();
        assert_eq!(
            (cpu.period(), cpu.quota(), cpu.shares()),
            (Some(50_000), Some(25_000), Some(512))
        );
        assert_eq!((cpu.cpus().as_deref(), cpu.mems().as_deref()), (Some("3,5"), Some("1")));
        let memory = oci.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(64 << 20)));
        assert_eq!(oci.unified().as_ref().unwrap()["pids.max"], "10");
        let back = from_oci(&oci);
        assert_eq!((back.cpu_quota, back.memory_limit_in_bytes), (25_000, 64 << 20));
        assert_eq!((back.cpuset_cpus.as_str(), back.cpuset_mems.as_str()), ("3,5", "1"));
    }

    #[test]
    fn default_requests_of_a_kubelet_are_accepted() {
        let page = |size: &str| v1::HugepageLimit { page_size: size.into(), limit: 0 };
        let usual = v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 998,
            hugepage_limits: vec![page("2MB"), page("1GB")],
            unified: [("memory.oom.group".to_string(), "1".to_string())].into(),
            ..request()
        };
        to_oci(&usual).unwrap();
        // With NodeSwap, LimitedSwap: memory and swap together.
        let swap = v1::LinuxContainerResources { memory_swap_limit_in_bytes: 96 << 20, ..usual };
        assert_eq!(to_oci(&swap).unwrap().memory().unwrap().swap(), Some(96 << 20));
    }

    #[test]
    fn huge_pages_are_a_limit_of_the_container_and_memory_of_the_vm() {
        let page = |size: &str, limit| v1::HugepageLimit { page_size: size.into(), limit };
        let wanted = v1::LinuxContainerResources {
            memory_limit_in_bytes: 512 << 20,
            hugepage_limits: vec![page("1GB", 0), page("2MB", 64 << 20)],
            ..request()
        };
        let oci = to_oci(&wanted).unwrap();
        let limits = oci.hugepage_limits().as_ref().unwrap();
        assert_eq!(limits.len(), 1);
        assert_eq!((limits[0].page_size().as_str(), limits[0].limit()), ("2MB", 64 << 20));
        // An update that says nothing of them leaves them.
        assert_eq!(
            overlay(&oci, &to_oci(&request()).unwrap()).hugepage_limits(),
            oci.hugepage_limits()
        );
        let config = Config::default();
        let size = |request| vm_size(Some(request), None, 4, &config).unwrap().memory_mib.unwrap();
        let without = v1::LinuxContainerResources { hugepage_limits: Vec::new(), ..wanted.clone() };
        assert_eq!(size(&wanted) - size(&without), 64);
        let wanted =
            v1::LinuxContainerResources { hugepage_limits: vec![page("2MB", u64::MAX)], ..wanted };
        assert!(to_oci(&wanted).unwrap_err().to_string().starts_with("hugepage_limits"));
    }

    #[test]
    fn swap_follows_a_memory_limit_that_changes_alone() {
        let limit = |limit, both| {
            to_oci(&v1::LinuxContainerResources {
                memory_limit_in_bytes: limit,
                memory_swap_limit_in_bytes: both,
                ..request()
            })
            .unwrap()
        };
        let of = |oci: &LinuxResources| {
            let limits = from_oci(oci);
            (limits.memory_limit_in_bytes, limits.memory_swap_limit_in_bytes)
        };
        assert_eq!(of(&overlay(&limit(64, 96), &limit(128, 0))), (128, 128));
        assert_eq!(of(&overlay(&limit(64, 0), &limit(0, 96))), (64, 96));
        assert_eq!(of(&overlay(&limit(64, 96), &to_oci(&request()).unwrap())), (64, 96));
    }

    #[test]
    fn invalid_and_unsupported_limits_are_rejected_with_the_field() {
        let table = [
            (v1::LinuxContainerResources { cpu_quota: -2, ..request() }, "cpu_quota"),
            (v1::LinuxContainerResources { cpu_period: -1, ..request() }, "cpu_period"),
            (v1::LinuxContainerResources { cpuset_cpus: "a".into(), ..request() }, "cpuset_cpus"),
            (v1::LinuxContainerResources { cpuset_mems: "all".into(), ..request() }, "cpuset_mems"),
            (
                v1::LinuxContainerResources {
                    memory_limit_in_bytes: 2,
                    memory_swap_limit_in_bytes: 1,
                    ..request()
                },
                "memory_swap_limit_in_bytes",
            ),
            (v1::LinuxContainerResources { oom_score_adj: 2000, ..request() }, "oom_score_adj"),
            (
                v1::LinuxContainerResources {
                    unified: [("../x.y".to_string(), String::new())].into(),
                    ..request()
                },
                "unified",
            ),
            (
                v1::LinuxContainerResources {
                    hugepage_limits: vec![v1::HugepageLimit { page_size: "1GB".into(), limit: 1 }],
                    ..request()
                },
                "hugepage_limits",
            ),
        ];
        for (request, field) in table {
            let refusal = to_oci(&request).unwrap_err().to_string();
            assert!(refusal.starts_with(field), "{refusal}");
        }
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let current = to_oci(&v1::LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 50_000,
            memory_limit_in_bytes: 64 << 20,
            ..request()
        })
        .unwrap();
        let update = to_oci(&v1::LinuxContainerResources { cpu_quota: -1, ..request() }).unwrap();
        let merged = from_oci(&overlay(&current, &update));
        assert_eq!((merged.cpu_shares, merged.cpu_quota), (512, -1));
        assert_eq!(merged.memory_limit_in_bytes, 64 << 20);
    }

    #[test]
    fn a_vm_is_sized_from_limits_and_overhead() {
        let config = Config::default();
        let limits = v1::LinuxContainerResources {
            cpu_quota: 150_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 512 << 20,
            ..request()
        };
        let size = vm_size(Some(&limits), None, 8, &config).unwrap();
        assert_eq!(
            size,
            Size { vcpus: Some(2), memory_mib: Some(512 + config.guest_overhead_mib) }
        );
        let overhead = v1::LinuxContainerResources {
            cpu_quota: 60_000,
            memory_limit_in_bytes: 100 << 20,
            ..request()
        };
        let size = vm_size(Some(&limits), Some(&overhead), 8, &config).unwrap();
        assert_eq!(size, Size { vcpus: Some(3), memory_mib: Some(612) });
        // No more CPUs than the host has.
        assert_eq!(vm_size(Some(&limits), None, 1, &config).unwrap().vcpus, Some(1));
    }

    #[test]
    fn a_vm_takes_of_the_hosts_cpus_what_its_pod_may_and_what_it_costs() {
        let limits = v1::LinuxContainerResources {
            cpu_quota: 25_000,
            cpu_period: 50_000,
            cpu_shares: 512,
            ..request()
        };
        let overhead = v1::LinuxContainerResources {
            cpu_quota: 25_000,
            cpu_period: 100_000,
            cpu_shares: 256,
            ..request()
        };
        let expected =
            CpuLimits { quota_us: Some(37_500), period_us: Some(50_000), shares: Some(768) };
        assert_eq!(cpu_limits(Some(&limits), Some(&overhead)), expected);
        // Overhead alone is no limit.
        assert_eq!(cpu_limits(None, Some(&overhead)), CpuLimits::default());
        assert_eq!(cpu_limits(None, None), CpuLimits::default());
    }

    #[test]
    fn without_limits_the_default_size_counts() {
        let config = Config::default();
        assert_eq!(vm_size(None, None, 8, &config).unwrap(), Size::default());
        let shares_only = v1::LinuxContainerResources { cpu_shares: 2, ..request() };
        assert_eq!(vm_size(Some(&shares_only), None, 8, &config).unwrap(), Size::default());
    }
}
