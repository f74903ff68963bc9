//! Benchmarks: tables with their conditions, nacelle and a peer in the same run.
//!
//! `nacelle-bench boot` compares VMMs on the same kernel and initramfs; `nacelle-bench many` counts
//! how many of many boots come up; `nacelle-bench pods` breaks a pod's cold start into its phases and
//! weighs idle pods; `nacelle-bench create` times the calls of a container's life, of several runtimes
//! in turns; `nacelle-bench net` moves bytes between the host and a guest and counts what that takes;
//! `nacelle-bench share` does the same work on one folder of the host from several sides;
//! `nacelle-bench list` makes a kubelet's calls on a node with many pods. Nothing here asserts
//! anything: see `docs/benchmarks.md` for how to read the numbers.

mod boot;
mod create;
mod list;
mod measure;
mod net;
mod pods;
mod share;
mod table;

use std::path::PathBuf;

use anyhow::Result;
use boot::Shape;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "nacelle-bench", about = "Prints tables; states its conditions")]
struct Arguments {
    /// Folder with nacelle's binaries.
    #[arg(long, default_value = "/nacelle/bin")]
    bin: PathBuf,
    /// Folder with `vmlinux` and `initramfs.cpio`.
    #[arg(long, default_value = "/nacelle/guest")]
    guest: PathBuf,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Cold boot to a listening agent: nacelle-vmm beside QEMU's microvm.
    Boot {
        #[arg(long, default_value_t = 5)]
        runs: usize,
        #[arg(long, default_value_t = 1)]
        vcpus: u8,
        /// MiB.
        #[arg(long, default_value_t = 256)]
        memory: u32,
    },
    /// How many of many boots come up: nacelle-vmm, then QEMU's microvm.
    Many {
        #[arg(long, default_value_t = 60)]
        boots: usize,
        /// VMs side by side.
        #[arg(long, default_value_t = 3)]
        at_once: usize,
        #[arg(long, default_value_t = 2)]
        vcpus: u8,
        /// MiB.
        #[arg(long, default_value_t = 512)]
        memory: u32,
    },
    /// Calls of a container's life through CRI sockets, of several runtimes in turns.
    Create {
        /// NAME=SOCKET of a runtime that serves CRI; may be given several times.
        #[arg(long, default_value = "nacelle=/run/nacelle/nacelled.sock")]
        runtime: Vec<create::Peer>,
        /// With `sleep` and `echo`; each runtime pulls it.
        #[arg(long)]
        image: String,
        #[arg(long, default_value_t = 10)]
        rounds: usize,
        /// Folder for the containers' logs.
        #[arg(long, default_value = "/tmp/nacelle-bench-logs")]
        logs: PathBuf,
    },
    /// Work on one folder of the host: by the host itself, in a container of each runtime, and under
    /// QEMU with virtiofsd.
    Share {
        /// NAME=SOCKET of a runtime that serves CRI; may be given several times.
        #[arg(long, default_value = "nacelle=/run/nacelle/nacelled.sock")]
        runtime: Vec<create::Peer>,
        /// With `sleep`; each runtime pulls it.
        #[arg(long)]
        image: String,
        /// Upstream's file server, beside which QEMU is started.
        #[arg(long)]
        virtiofsd: Option<PathBuf>,
        /// Folder that is shared; its files are overwritten.
        #[arg(long, default_value = "/var/lib/nacelle/bench-share")]
        folder: PathBuf,
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        #[command(flatten)]
        amount: share::Amount,
    },
    /// TCP between the host and a guest, in both directions: VMMs beside each other, with their KVM
    /// exits and interrupts.
    Net {
        /// Another nacelle-vmm to compare with; may be given several times.
        #[arg(long)]
        vmm: Vec<PathBuf>,
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// vCPUs of the guests; may be given several times.
        #[arg(long, default_values_t = [1, 2])]
        vcpus: Vec<u8>,
        /// Moved in each direction, MiB.
        #[arg(long, default_value_t = 128)]
        amount: u64,
        /// Round trips of one byte.
        #[arg(long, default_value_t = 500)]
        trips: u64,
        /// Without QEMU's microvm.
        #[arg(long)]
        no_qemu: bool,
    },
    /// Listings of a node full of pods, through a real socket. Needs no KVM.
    List {
        #[arg(long, default_value_t = 500)]
        pods: usize,
        #[arg(long, default_value_t = 50)]
        runs: usize,
    },
    /// A pod's cold start by phase, and host memory a further idle pod.
    Pods {
        #[arg(long, default_value_t = 20)]
        pods: usize,
        /// Socket of a running nacelled.
        #[arg(long, default_value = "/run/nacelle/nacelled.sock")]
        socket: PathBuf,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    measure::print_conditions()?;
    match arguments.bench {
        Bench::Boot { runs, vcpus, memory } => {
            boot::run(&arguments.bin, &arguments.guest, runs, Shape { vcpus, memory })
        }
        Bench::Many { boots, at_once, vcpus, memory } => {
            let shape = Shape { vcpus, memory };
            boot::many(&arguments.bin, &arguments.guest, boots, at_once, shape)
        }
        Bench::Create { runtime, image, rounds, logs } => {
            create::run(&runtime, &image, rounds, &logs)
        }
        Bench::Share { runtime, image, virtiofsd, folder, rounds, amount } => {
            share::run(&share::Plan {
                bin: &arguments.bin,
                guest: &arguments.guest,
                folder: &folder,
                runtimes: &runtime,
                image: &image,
                virtiofsd: virtiofsd.as_deref(),
                rounds,
                amount,
            })
        }
        Bench::Net { vmm, rounds, vcpus, amount, trips, no_qemu } => net::run(&net::Plan {
            bin: &arguments.bin,
            guest: &arguments.guest,
            others: &vmm,
            qemu: !no_qemu,
            rounds,
            vcpus: &vcpus,
            amount,
            trips,
        }),
        Bench::List { pods, runs } => list::run(pods, runs),
        Bench::Pods { pods, socket } => pods::run(&arguments.bin, &socket, pods),
    }
}
