//! The agent of a pod without a VM runs from a sealed copy of its program in memory. Its helpers
//! run from the same file (`oci::helper`) and become processes of containers, whose
//! `/proc/<pid>/exe` leads to it for a moment: a container that sees the host's processes could
//! open the host's file there and write to it (CVE-2019-5736).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::fexecve;

use crate::error::{Doing, Result};

const PROGRAM: &str = "/proc/self/exe";
const NAME: &CStr = c"nacelle-agent";
/// Asks for a file that may be run, whatever `vm.memfd_noexec` says; Linux 6.3.
const MFD_EXEC: u32 = 0x10;

/// Starts the program again from a sealed copy, with the same arguments, variables and descriptors.
/// Returns where it runs from one already. Wants a process with one thread.
pub fn run_from_copy() -> Result<()> {
    let program = File::open(PROGRAM).doing(|| format!("open {PROGRAM}"))?;
    if is_sealed(&program) {
        // Without a path the kernel has called it by the number of a descriptor.
        return nix::sys::prctl::set_name(NAME).doing(|| "name the agent".to_owned());
    }
    let copy = copy(&program)?;
    let args: Vec<CString> =
        std::env::args_os().filter_map(|arg| CString::new(arg.into_vec()).ok()).collect();
    let variables = std::env::vars_os().filter_map(|(mut variable, value)| {
        variable.push("=");
        variable.push(value);
        CString::new(variable.into_vec()).ok()
    });
    let variables: Vec<CString> = variables.collect();
    let Err(errno) = fexecve(&copy, &args, &variables);
    Err(errno).doing(|| "run the agent from a copy in memory".to_owned())
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// Files of most file systems have no seals, and say so by an error.
fn is_sealed(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GET_SEALS)
        .is_ok_and(|found| SealFlag::from_bits_truncate(found).contains(seals()))
}

/// A sealed copy. It is closed by execve(2), which has opened it for itself by then.
fn copy(mut program: &File) -> Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let made = match memfd_create(NAME, flags | MFdFlags::from_bits_retain(MFD_EXEC)) {
        // An older kernel: any may be run.
        Err(Errno::EINVAL) => memfd_create(NAME, flags),
        made => made,
    };
    let mut copy = File::from(made.doing(|| "make a file in memory for the agent".to_owned())?);
    io::copy(&mut program, &mut copy).doing(|| "copy the agent to memory".to_owned())?;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals()))
        .doing(|| "seal the agent's copy in memory".to_owned())?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_copy_cannot_be_changed() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"no program").unwrap();
        assert!(!is_sealed(&file));
        let mut copy = copy(&File::open("/bin/sh").unwrap()).unwrap();
        assert!(is_sealed(&copy));
        assert!(copy.write_all(b"x").is_err() && copy.write_at(b"x", 0).is_err());
        assert!(copy.set_len(0).is_err());
    }

    #[test]
    fn a_copy_holds_what_is_needed_to_run() {
        let program = File::open("/bin/sh").unwrap();
        let copy = copy(&program).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), copy.as_raw_fd());
        let output = Command::new(path).args(["-c", "echo runs"]).output().unwrap();
        assert_eq!(output.stdout, b"runs\n");
    }
}
