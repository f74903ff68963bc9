//! Facts about the host, a process and a VM.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

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

/// Ids of all threads of the processes with these names.
pub fn threads(names: &[&str]) -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        let Ok(name) = fs::read_to_string(process.join("comm")) else { continue };
        if !names.contains(&name.trim_end()) {
            continue;
        }
        // One that has ended meanwhile has no threads.
        for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
            found.extend(task.file_name().to_string_lossy().parse::<u32>());
        }
    }
    Ok(found)
}

/// System calls of all threads of this host while it exists, counted by the kernel.
pub struct SystemCalls(());

const TRACING: &str = "/sys/kernel/tracing";
const SYSTEM_CALLS: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter";
const HISTOGRAM: &str = "hist:keys=common_pid,id.syscall:size=16384";

impl SystemCalls {
    pub fn count() -> Result<Self> {
        if !Path::new(SYSTEM_CALLS).exists() {
            let none = MsFlags::empty();
            mount(Some("t"), TRACING, Some("tracefs"), none, None::<&str>).context("tracefs")?;
        }
        fs::write(format!("{SYSTEM_CALLS}/trigger"), HISTOGRAM).context(HISTOGRAM)?;
        Ok(Self(()))
    }

    /// Those of the given threads so far, by name.
    pub fn of(&self, threads: &BTreeSet<u32>) -> Result<BTreeMap<String, u64>> {
        Ok(histogram(&fs::read_to_string(format!("{SYSTEM_CALLS}/hist"))?, threads))
    }
}

impl Drop for SystemCalls {
    fn drop(&mut self) {
        // It fails only if the trigger is gone.
        let _ = fs::write(format!("{SYSTEM_CALLS}/trigger"), format!("!{HISTOGRAM}"));
    }
}

/// Lines `{ common_pid: PID, id: sys_NAME [NUMBER] } hitcount: COUNT` of these threads.
fn histogram(text: &str, threads: &BTreeSet<u32>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().skip_while(|word| *word != "common_pid:").skip(1);
        let pid = words.next().and_then(|word| word.trim_end_matches(',').parse().ok());
        let mut words = words.skip_while(|word| *word != "id:").skip(1);
        let name = words.next();
        let count = words.skip_while(|word| *word != "hitcount:").nth(1);
        let count = count.and_then(|word| word.parse::<u64>().ok());
        if let (Some(pid), Some(name), Some(count)) = (pid, name, count)
            && threads.contains(&pid)
        {
            let name = name.trim_start_matches("sys_").to_owned();
            *counts.entry(name).or_default() += count;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_summed_over_the_given_threads() {
        let text = "# event histogram\n\
            { common_pid:        812, id: sys_statx                     [332] } hitcount:         40\n\
            { common_pid:        813, id: sys_statx                     [332] } hitcount:          2\n\
            { common_pid:        812, id: sys_read                      [  0] } hitcount:          7\n\
            { common_pid:          1, id: sys_read                      [  0] } hitcount:        999\n\
            \nTotals:\n    Hits: 1048\n    Entries: 4\n    Dropped: 0\n";
        let of = |threads: &[u32]| histogram(text, &threads.iter().copied().collect());
        let expected = [("statx".to_owned(), 42), ("read".to_owned(), 7)];
        assert_eq!(of(&[812, 813]), BTreeMap::from(expected));
        assert_eq!(of(&[5]), BTreeMap::new());
    }
}
