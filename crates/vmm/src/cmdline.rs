//! The kernel command line: parameters of the VMM, then those of the configuration, which take
//! precedence.

use vmm_api::VmConfig;

/// - `panic=-1 oops=panic`: the guest resets at once after a panic or an oops.
/// - `tsc=reliable`: KVM keeps the TSCs synchronized; there is no other clocksource to compare
///   with.
/// - `no_timer_check`: there is no timer on an I/O APIC pin.
/// - `pci=noearly`: early quirks use the configuration ports, which do not exist.
/// - `i8042.noaux i8042.nokbd i8042.noprobe`: there is no keyboard controller.
/// - `random.trust_cpu=on`: RDRAND initializes the random number generator.
const BASE: &str = "panic=-1 oops=panic tsc=reliable no_timer_check pci=noearly \
                    i8042.noaux i8042.nokbd i8042.noprobe random.trust_cpu=on";
/// For VMs with a hotplug region: plugged memory goes to ZONE_MOVABLE, up to three times the size
/// of the kernel zones. Unmovable kernel allocations in it would make it impossible to unplug.
const HOTPLUG: &str = "memory_hotplug.online_policy=auto-movable";
/// Kernel messages on the console would take longer than the rest of the boot.
const QUIET: &str = "console=hvc0 quiet";
const SERIAL: &str = "earlyprintk=ttyS0 console=ttyS0";

/// Builds the kernel command line of a VM.
pub fn build(config: &VmConfig) -> String {
    let (console, vcpus) = (if config.serial_console { SERIAL } else { QUIET }, config.vcpus);
    let mut line = format!("{console} {BASE}");
    if config.vcpus < config.max_vcpus {
        line.push_str(&format!(" maxcpus={vcpus}"));
    }
    if config.memory_mib < config.max_memory_mib {
        line.push(' ');
        line.push_str(HOTPLUG);
    }
    let extra = config.cmdline.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

#[cfg(test)]
mod tests {
    use vmm_api::{Fd, VERSION};

    use super::*;

    fn config(max_memory_mib: u32, cmdline: &str) -> VmConfig {
        let none = Fd(-1);
        VmConfig {
            version: VERSION,
            name: String::new(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 256,
            max_memory_mib,
            free_page_reporting: true,
            kernel: none,
            initramfs: None,
            cmdline: cmdline.to_owned(),
            kvm: none,
            control: none,
            status: none,
            console: none,
            log: None,
            vsock: None,
            disks: Vec::new(),
            nets: Vec::new(),
            serial_console: false,
            jail: None,
            restore: None,
        }
    }

    #[test]
    fn a_vm_with_a_hotplug_region_onlines_it_movable_unless_the_configuration_overrides_it() {
        assert!(!build(&config(256, "")).contains(HOTPLUG));
        let line = build(&config(512, " memory_hotplug.online_policy=contig-zones "));
        let last = line.rfind("memory_hotplug.online_policy=contig-zones").unwrap();
        assert!(line.find(HOTPLUG).unwrap() < last && line.ends_with("zones"), "{line}");
    }
}
