//! The kernel command line: what this machine needs, then what the operator adds.

use vmm_api::VmConfig;

/// - `panic=-1 oops=panic`: a broken guest ends at once instead of limping on.
/// - `tsc=reliable`: KVM keeps the TSC in step; the clocksource watchdog has nothing to compare with.
/// - `no_timer_check`: there is no I/O APIC pin whose timer could be checked.
/// - `pci=noearly`: early quirks probe ports of host bridges that are not there.
/// - `i8042.noaux i8042.nokbd 8250.nr_uarts=...`: no keyboard controller to wait for.
/// - `random.trust_cpu=on`: do not wait for entropy with RDRAND at hand.
const BASE: &str = "panic=-1 oops=panic tsc=reliable no_timer_check pci=noearly \
                    i8042.noaux i8042.nokbd i8042.noprobe random.trust_cpu=on";
/// For VMs that can grow: plugged memory is for what can be moved, as far as the kernel can spare it
/// for that (three parts to one of what it may use for itself), or what it puts there of its own
/// could never be unplugged again.
const GROWING: &str = "memory_hotplug.online_policy=auto-movable";
/// Printing costs more than all the rest of a boot.
const QUIET: &str = "console=hvc0 quiet";
const SERIAL: &str = "earlyprintk=ttyS0 console=ttyS0";

/// Puts the command line of a VM together.
pub fn build(config: &VmConfig) -> String {
    let (console, vcpus) = (if config.serial_console { SERIAL } else { QUIET }, config.vcpus);
    let mut line = format!("{console} {BASE}");
    if config.vcpus < config.max_vcpus {
        line.push_str(&format!(" maxcpus={vcpus}"));
    }
    if config.memory_mib < config.max_memory_mib {
        line.push(' ');
        line.push_str(GROWING);
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
        }
    }

    #[test]
    fn a_vm_that_can_grow_keeps_its_kernel_off_plugged_memory_and_the_operator_speaks_last() {
        assert!(!build(&config(256, "")).contains(GROWING));
        let line = build(&config(512, " memory_hotplug.online_policy=contig-zones "));
        let last = line.rfind("memory_hotplug.online_policy=contig-zones").unwrap();
        assert!(line.find(GROWING).unwrap() < last && line.ends_with("zones"), "{line}");
    }
}
