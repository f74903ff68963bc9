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
    let extra = config.cmdline.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}
