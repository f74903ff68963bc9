//! The lab: an outer virtual machine, emulated by QEMU with SVM and nested paging, in which
//! /dev/kvm is true whatever this host has. One command runs in it; its output, errors and exit
//! status come back as if it had run here.
//!
//! Inside: `/nacelle/bin` (our binaries), `/nacelle/guest` (kernels, initramfs), `/nacelle/images`
//! (OCI layouts, with `--images`), `/nacelle/here` (the working directory), 24 GiB of scratch
//! at `/var/lib/nacelle`. Nothing that a run writes survives it, except what `--out` names.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::kvm;

mod bundle;
mod host;
pub(crate) mod image;
mod machine;
mod qemu;
mod report;
mod status;

pub(crate) use status::{STATUS_LAB_FAILED, STATUS_TIMEOUT};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Memory of the outer machine in MiB; only touched pages cost anything
    #[arg(long, default_value_t = 6144)]
    mem: u32,
    /// CPUs of the outer machine; with more than one, guests that run at once get lost (machine.rs)
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Seconds that the command may take
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Seconds that the outer machine may take until the command starts
    #[arg(long, default_value_t = 180)]
    boot_timeout: u64,
    /// A file or folder to bring in, by default to /nacelle/here/NAME
    #[arg(long = "in", value_name = "PATH[:DEST]")]
    inputs: Vec<String>,
    /// A file or folder to bring out after the command: an archive of it is unpacked in HOST_DIR
    #[arg(long = "out", value_name = "PATH:HOST_DIR")]
    outputs: Vec<String>,
    /// A folder whose content becomes /nacelle/here
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// A variable for the command
    #[arg(long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Run on this host instead, where its KVM is good; says in one line which it is
    #[arg(long)]
    auto: bool,
    /// Bring in the images of `cargo xtask images` too
    #[arg(long)]
    images: bool,
    /// Leave the binaries and guest assets of the checkout out
    #[arg(long)]
    bare: bool,
    /// A bare Debian 12 with systemd as PID 1 and without scratch disk, for tests of packages
    #[arg(long, conflicts_with_all = ["auto", "release", "shell"])]
    systemd: bool,
    /// Debian release of the root file system, which decides the version of containerd in it
    #[arg(long, value_enum, default_value = "bookworm")]
    release: image::Release,
    /// An interactive shell instead of a command
    #[arg(long, conflicts_with = "command")]
    shell: bool,
    /// Prepare the outer machine's files and stop there
    #[arg(long)]
    prepare: bool,
    /// The command, run by bash; several words are joined by spaces
    #[arg(last = true)]
    command: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    if args.auto {
        let kvm = kvm::probe();
        if kvm.usable {
            eprintln!("KVM here {}: running on this host", kvm.why);
            return host::run(&args.command.join(" "), args.share.as_deref());
        }
        eprintln!("KVM here {}: running inside the lab", kvm.why);
    }
    let image = if args.systemd { image::ensure_systemd()? } else { image::ensure(args.release)? };
    if args.prepare {
        return Ok(0);
    }
    anyhow::ensure!(args.shell || !args.command.is_empty(), "no command: -- CMD, or --shell");
    let outputs = args.outputs.iter().map(|text| output(text)).collect::<Result<Vec<_>>>()?;

    let scratch = tempfile::Builder::new().prefix("nacelle-lab-").tempdir()?;
    let files = scratch.path().join("in.tar");
    let mut bundle = bundle::Bundle::create(&files)?;
    if !args.bare {
        bundle.add_checkout(scratch.path())?;
    }
    if args.images {
        bundle.add_images()?;
    }
    if let Some(dir) = &args.share {
        bundle.add(dir, "nacelle/here")?;
    }
    for input in &args.inputs {
        let (path, dest) = match input.split_once(':') {
            Some((path, dest)) => (PathBuf::from(path), dest.to_owned()),
            None => {
                let path = PathBuf::from(input);
                let name = path.file_name().context("--in needs a path that ends in a name")?;
                let dest = format!("nacelle/here/{}", name.to_string_lossy());
                (path, dest)
            }
        };
        bundle.add(&path, &dest)?;
    }
    let exports: String = args
        .environment
        .iter()
        .map(|text| {
            let (name, value) = text.split_once('=').context("--env takes NAME=VALUE")?;
            Ok(format!("export {name}='{}'\n", value.replace('\'', r"'\''")))
        })
        .collect::<Result<_>>()?;
    bundle.add_text("nacelle/lab/env", &exports)?;
    bundle.add_text("nacelle/lab/command", &(args.command.join(" ") + "\n"))?;
    if args.shell {
        bundle.add_text("nacelle/lab/shell", "")?;
    }
    let list: String = outputs.iter().map(|(path, _)| format!("{path}\n")).collect();
    bundle.add_text("nacelle/lab/outputs", &list)?;
    bundle.finish()?;

    let plan = qemu::Plan {
        image: &image,
        files: &files,
        scratch: scratch.path(),
        memory_mib: args.mem,
        cpus: args.cpus,
        shell: args.shell,
        outputs: outputs.len(),
        boot_limit: Duration::from_secs(args.boot_timeout),
        // A person at a shell is not hurried.
        run_limit: (!args.shell).then(|| Duration::from_secs(args.timeout)),
    };
    let status = machine::run(&plan)?;
    for (index, (_, host)) in outputs.iter().enumerate() {
        bundle::unpack_output(&qemu::output_file(scratch.path(), index), host)?;
    }
    Ok(status)
}

fn output(text: &str) -> Result<(String, PathBuf)> {
    let (path, host) = text.split_once(':').context("--out takes PATH_IN_LAB:HOST_DIR")?;
    fs::create_dir_all(host).with_context(|| format!("creating {host}"))?;
    Ok((path.to_owned(), PathBuf::from(host)))
}
