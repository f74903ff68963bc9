//! The guest's CPUID: everything KVM supports, with the topology of this VM (one package, one
//! thread per core), without nested virtualization and performance counters.
//!
//! Intel SDM volume 2A "CPUID"; AMD APM volume 3, appendix E.

use std::hash::{Hash, Hasher};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const VMX: u32 = 1 << 5;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
/// 0x8000_0001 ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const PERFCTR_LLC: u32 = 1 << 28;

#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    #[error("{got} CPUID entries are more than KVM_SET_CPUID2 accepts")]
    TooMany { got: usize },
}

/// The CPUID table of the vCPU with this APIC id in a VM with `vcpus` vCPUs. `host` is what KVM
/// supports.
pub fn table(host: &CpuId, apic_id: u8, vcpus: u8) -> Result<CpuId, CpuidError> {
    let mut entries: Vec<kvm_cpuid_entry2> = host.as_slice().to_vec();
    let id = u32::from(apic_id);
    let count = u32::from(vcpus);
    // APIC id bits that number the cores of the package.
    let core_bits = u32::from(vcpus).next_power_of_two().trailing_zeros();
    // Rebuilt below: leaf 0xb is the VMM's to fill, and 0x1f only adds dies.
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count << 16;
                entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
                // Nested virtualization would enlarge the attack surface of the host's kernel.
                entry.ecx &= !VMX;
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Cache parameters: the third level is shared by all cores, the others are per core.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax &= 0x3fff;
                entry.eax |= sharing << 14;
                if entry.function == 4 {
                    entry.eax |= ((1 << core_bits) - 1) << 26;
                }
            }
            // No performance counters: they are a side channel to other pods, and cost MSR exits.
            0xa | 0x8000_0022 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            0x8000_0001 => {
                entry.ecx &= !(SVM | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC);
                entry.ecx =
                    if count > 1 { entry.ecx | CMP_LEGACY } else { entry.ecx & !CMP_LEGACY };
            }
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            // SVM features, as SVM is hidden.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    let amd = entries.iter().any(|e| e.function == 0x8000_001e);
    if amd && let Some(e) = entries.iter_mut().find(|e| e.function == 0x8000_0001) {
        e.ecx |= TOPOLOGY_EXTENSIONS;
    }
    let levels = entries.iter().find(|e| e.function == 0).is_some_and(|e| e.eax >= 0xb);
    if levels {
        const THREADS: u32 = 1 << 8;
        const CORES: u32 = 2 << 8;
        let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx: id,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, THREADS));
        entries.push(level(1, core_bits, count, CORES | 1));
    }
    let got = entries.len();
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany { got })
}

/// Vendor and signature (family, model, stepping) of the processor, e.g. `AuthenticAMD 00830f10`, and
/// a hash of the whole `table`, which is that of vCPU 0: a kernel must not find other features after it
/// has chosen its code by them.
pub fn processor(table: &CpuId) -> String {
    let leaf = |function| table.as_slice().iter().find(|e| e.function == function);
    let vendor = leaf(0).map_or_else(Vec::new, |e| {
        [e.ebx, e.edx, e.ecx].into_iter().flat_map(u32::to_le_bytes).collect()
    });
    let signature = leaf(1).map_or(0, |e| e.eax);
    let mut hasher = std::hash::DefaultHasher::new();
    for e in table.as_slice() {
        (e.function, e.index, e.eax, e.ebx, e.ecx, e.edx).hash(&mut hasher);
    }
    let (vendor, hash) = (String::from_utf8_lossy(&vendor), hasher.finish());
    format!("{vendor} {signature:08x} {hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named_by_vendor_and_signature() {
        let mut leaves = host().as_slice().to_vec();
        let leaf = leaves.iter_mut().find(|e| e.function == 0).unwrap();
        let [ebx, edx, ecx] = [b"Auth", b"enti", b"cAMD"].map(|text| u32::from_le_bytes(*text));
        (leaf.ebx, leaf.edx, leaf.ecx) = (ebx, edx, ecx);
        leaves.iter_mut().find(|e| e.function == 1).unwrap().eax = 0x83_0f10;
        let host = CpuId::from_entries(&leaves).unwrap();
        let name = processor(&host);
        assert!(name.starts_with("AuthenticAMD 00830f10 "), "{name}");
        leaves.iter_mut().find(|e| e.function == 0xa).unwrap().ecx ^= 1;
        assert_ne!(processor(&CpuId::from_entries(&leaves).unwrap()), name);
    }

    fn host() -> CpuId {
        let entry = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0, 0x10, 0, 0, 0),
            entry(1, 0, 0xaa00_0800, VMX, 0),
            entry(4, 0xffff_c163, 0, 0, 0),
            entry(0xa, 1, 2, 3, 4),
            entry(0xb, 9, 9, 9, 9),
            entry(0x8000_0001, 0, 0, SVM | PERFCTR_CORE, 0),
            entry(0x8000_0008, 0x3028, 0, 0, 0),
            entry(0x8000_001e, 9, 9, 9, 0),
            entry(0x8000_0022, 1, 6, 0, 0),
        ])
        .unwrap()
    }

    fn leaf(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = table.as_slice().iter().find(|e| (e.function, e.index) == (function, index));
        *found.unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_the_package_size() {
        for (id, count, bits) in [(0u8, 1u8, 0u32), (3, 4, 2), (5, 6, 3), (63, 64, 6)] {
            let table = table(&host(), id, count).unwrap();
            let (id, count) = (u32::from(id), u32::from(count));
            assert_eq!(leaf(&table, 1, 0).ebx, id << 24 | count << 16 | 0x800);
            assert_eq!(leaf(&table, 1, 0).edx & HTT != 0, count > 1);
            assert_eq!(leaf(&table, 0xb, 0).edx, id);
            let cores = leaf(&table, 0xb, 1);
            assert_eq!((cores.eax, cores.ebx, cores.edx), (bits, count, id));
            assert_eq!(leaf(&table, 0x8000_001e, 0).eax, id);
            assert_eq!(leaf(&table, 0x8000_0008, 0).ecx, bits << 12 | (count - 1));
            assert_eq!(leaf(&table, 4, 0).eax >> 26, (1 << bits) - 1);
        }
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let table = table(&host(), 0, 2).unwrap();
        assert_eq!(leaf(&table, 1, 0).ecx & VMX, 0);
        assert_ne!(leaf(&table, 1, 0).ecx & HYPERVISOR, 0);
        assert_eq!(leaf(&table, 0x8000_0001, 0).ecx & (SVM | PERFCTR_CORE), 0);
        assert_eq!((leaf(&table, 0xa, 0).eax, leaf(&table, 0x8000_0022, 0).ebx), (0, 0));
    }
}
