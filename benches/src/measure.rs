//! Facts about the host, a process and a VM.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The conditions of a run, before its tables.
pub fn print_conditions() -> Result<()> {
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name))
        .unwrap_or("unknown CPU");
    let cpus = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let nested = cpu.lines().any(|l| l.starts_with("flags") && l.contains(" hypervisor "));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!(
        "conditions: {cpus} x {model}, host kernel {}, {} MiB free{}",
        release.trim(),
        available_kib()? / 1024,
        if nested { "; the host is itself a VM: compare ratios, not times" } else { "" },
    );
    Ok(())
}

/// `MemAvailable`, KiB.
pub fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    field(&text, "MemAvailable:").context("no MemAvailable in /proc/meminfo")
}

fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Proportional set size of a process in KiB: (all, guest memory). Guest memory is every mapping
/// of at least `guest_mib` in one piece, or backed by a memfd.
pub fn pss_kib(pid: u32, guest_mib: u32) -> Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("process {pid} is gone"))?;
    let (mut all, mut guest, mut is_guest) = (0, 0, false);
    for line in text.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            if let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
            {
                is_guest = to - from >= u64::from(guest_mib) << 20 || line.contains("memfd:");
            }
        } else if let Some(pss) = field(line, "Pss:") {
            all += pss;
            if is_guest {
                guest += pss;
            }
        }
    }
    Ok((all, guest))
}

/// KVM's own count of a VM's exits (debugfs), whatever the VMM.
pub fn exits(pid: u32) -> Result<u64> {
    count(pid, "exits")
}

/// One of KVM's own counts of a VM (debugfs).
pub fn count(pid: u32, name: &str) -> Result<u64> {
    let top = Path::new("/sys/kernel/debug/kvm");
    for entry in fs::read_dir(top).context("mount debugfs: KVM's counts are there")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&format!("{pid}-")) {
            return Ok(fs::read_to_string(entry.path().join(name))?.trim().parse()?);
        }
    }
    anyhow::bail!("KVM knows no VM of process {pid}")
}

/// How many VMs KVM knows, and their exits together, without those of the process `but`.
pub fn vms(but: Option<u32>) -> Result<(usize, u64)> {
    let but = but.map(|pid| format!("{pid}-"));
    let (mut count, mut exits) = (0, 0);
    let top = Path::new("/sys/kernel/debug/kvm");
    for entry in fs::read_dir(top).context("mount debugfs: KVM's counts are there")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let own = name.split_once('-').is_some_and(|(pid, _)| pid.parse::<u32>().is_ok());
        if own && !but.as_ref().is_some_and(|but| name.starts_with(but)) {
            count += 1;
            exits += fs::read_to_string(entry.path().join("exits"))?.trim().parse::<u64>()?;
        }
    }
    Ok((count, exits))
}
