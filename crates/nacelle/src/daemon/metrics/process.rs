//! The daemon's own process, under the names that all Prometheus clients use.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let Ok(read) = Read::now() else { return Ok(()) };
        let cpu = ConstCounter::new(read.cpu_seconds);
        let help = "CPU time of nacelled.";
        cpu.encode(encoder.encode_descriptor(
            "process_cpu_seconds",
            help,
            None,
            cpu.metric_type(),
        )?)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory of nacelled.", read.resident),
            ("process_virtual_memory_bytes", "Virtual memory of nacelled.", read.virtual_memory),
            ("process_threads", "Threads of nacelled.", read.threads),
            ("process_open_fds", "Open file descriptors of nacelled.", read.descriptors),
            (
                "process_max_fds",
                "Limit of open file descriptors of nacelled.",
                read.max_descriptors,
            ),
            ("process_start_time_seconds", "Start of nacelled since the epoch.", read.started),
        ] {
            let value = ConstGauge::new(value);
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)?;
        }
        Ok(())
    }
}

struct Read {
    cpu_seconds: f64,
    resident: f64,
    virtual_memory: f64,
    threads: f64,
    descriptors: f64,
    max_descriptors: f64,
    started: f64,
}

impl Read {
    fn now() -> procfs::ProcResult<Self> {
        let this = procfs::process::Process::myself()?;
        let stat = this.stat()?;
        let ticks = procfs::ticks_per_second() as f64;
        let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_err(std::io::Error::from)?;
        Ok(Self {
            cpu_seconds: (stat.utime + stat.stime) as f64 / ticks,
            resident: (stat.rss * procfs::page_size()) as f64,
            virtual_memory: stat.vsize as f64,
            threads: stat.num_threads as f64,
            descriptors: this.fd_count()? as f64,
            max_descriptors: soft as f64,
            started: procfs::boot_time_secs()? as f64 + stat.starttime as f64 / ticks,
        })
    }
}
