//! QEMU's command line for the outer machine.
//!
//! One CPU unless more are asked for: QEMU 10.0 with two CPU threads that both run SVM guests once
//! in some ten thousand #VMEXITs goes on with nested paging after it went back to the host's state.
//! The host's next instruction fetch then exits a second time (its log has two `vmexit` lines
//! without a `vmrun` between them, the second an NPF at the instruction after VMRUN), and the
//! host's registers are saved as the guest's. A guest lost so falls silent or ends with a triple
//! fault, whichever VMM runs it; some take the outer kernel along. Never seen with one CPU.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::image::Image;
use crate::run;

pub(super) struct Plan<'a> {
    pub(super) image: &'a Image,
    /// The tar that the machine unpacks.
    pub(super) files: &'a Path,
    /// Folder for this run's own files.
    pub(super) scratch: &'a Path,
    pub(super) memory_mib: u32,
    pub(super) cpus: u8,
    pub(super) shell: bool,
    pub(super) outputs: usize,
    pub(super) boot_limit: Duration,
    pub(super) run_limit: Option<Duration>,
}

/// Where the archive of the `index`th `--out` lands.
pub(super) fn output_file(scratch: &Path, index: usize) -> PathBuf {
    scratch.join(format!("out{index}.tar"))
}

pub(super) fn spawn(plan: &Plan<'_>) -> Result<Child> {
    let scratch = plan.scratch.display();
    let version = run::output(Command::new("qemu-system-x86_64").arg("--version"))?;
    // QEMU 7.2 virtualizes SVM without XSETBV, and loses SMP guests to stale code patches.
    let old = version.contains("version 7.");
    let (cpus, model) = match old {
        true => (1, "EPYC-Rome,+svm,+npt,-xsave"),
        false => (plan.cpus, "EPYC-Rome,+svm,+npt"),
    };

    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-M", "q35,hpet=on", "-accel", "tcg,thread=multi"]);
    command.args(["-cpu", model, "-nic", "none"]);
    command.args(["-smp", &cpus.to_string(), "-m", &format!("{}M", plan.memory_mib)]);
    command.arg("-kernel").arg(&plan.image.kernel).arg("-initrd").arg(&plan.image.initrd);
    let options = "console=ttyS0 quiet loglevel=5 tsc=reliable no_timer_check panic=-1 oops=panic \
                   unknown_nmi_panic nokaslr";
    command.arg("-append").arg(format!("{options} {}", plan.image.cmdline));
    for (file, options) in [
        (plan.image.root.as_path(), "snapshot=on,cache=unsafe"),
        (plan.files, "readonly=on"),
        (plan.image.scratch.as_path(), "snapshot=on,cache=unsafe,discard=unmap"),
    ] {
        command
            .args(["-drive", &format!("if=virtio,format=raw,{options},file={}", file.display())]);
    }
    command.args(["-chardev", &format!("file,id=console,path={scratch}/console")]);
    command.args(["-serial", "chardev:console", "-device", "virtio-rng-pci"]);
    let monitor = monitor(plan.scratch);
    command.args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())]);
    command.args(["-device", "virtio-serial-pci,max_ports=31"]);
    let mut port = |name: &str, path: &str| {
        command.args(["-chardev", &format!("file,id={name},path={path}")]);
        command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
    };
    port("status", &format!("{scratch}/status"));
    if !plan.shell {
        port("stdout", &format!("{scratch}/stdout"));
        port("stderr", &format!("{scratch}/stderr"));
    }
    for index in 0..plan.outputs {
        let file = output_file(plan.scratch, index);
        port(&format!("out{index}"), &file.display().to_string());
    }
    if plan.shell {
        command.args(["-chardev", "stdio,id=shell,signal=off"]);
        command.args(["-device", "virtconsole,chardev=shell"]);
    } else {
        command.stdin(Stdio::null());
    }
    let log = File::create(plan.scratch.join("qemu.log"))?;
    command.stderr(log);
    if !plan.shell {
        command.stdout(Stdio::null());
    }
    // QEMU puts its snapshots there.
    command.env("TMPDIR", plan.scratch);
    command.spawn().context("starting QEMU (is it installed? 'make deps')")
}

pub(super) fn monitor(scratch: &Path) -> PathBuf {
    scratch.join("monitor")
}
