//! The agent of a pod without a VM runs from a sealed memfd copy of its binary, as runc does.
//! Helpers (`oci::helper`) are started from the same file and become processes of containers, whose
//! `/proc/<pid>/exe` refers to it until execve: a container in the host's PID namespace could
//! otherwise open the host's binary there and write to it (CVE-2019-5736).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::fexecve;

use crate::error::{Context, Result};

const PROGRAM: &str = "/proc/self/exe";
const NAME: &CStr = c"nacelle-agent";
/// Creates an executable memfd whatever `vm.memfd_noexec` is; Linux 6.3.
const MFD_EXEC: u32 = 0x10;

/// Re-executes the program from a sealed copy, with the same arguments, environment and
/// descriptors. Returns `Ok` if it already runs from one. Needs a single-threaded process.
pub fn run_from_copy() -> Result<()> {
    let program = File::open(PROGRAM).context(|| format!("open {PROGRAM}"))?;
    if is_sealed(&program) {
        // fexecve(3) sets comm to the number of the descriptor.
        return nix::sys::prctl::set_name(NAME).context(|| "set the process name".to_owned());
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
    Err(errno).context(|| "execute the sealed copy of the agent".to_owned())
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// Most file systems do not support seals: F_GET_SEALS fails with EINVAL.
fn is_sealed(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GET_SEALS)
        .is_ok_and(|found| SealFlag::from_bits_truncate(found).contains(seals()))
}

/// Returns a sealed copy with close-on-exec; execve(2) has opened it before it is closed.
fn copy(mut program: &File) -> Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let made = match memfd_create(NAME, flags | MFdFlags::from_bits_retain(MFD_EXEC)) {
        // Before Linux 6.3 every memfd is executable.
        Err(Errno::EINVAL) => memfd_create(NAME, flags),
        made => made,
    };
    let mut copy = File::from(made.context(|| "create a memfd for the agent".to_owned())?);
    io::copy(&mut program, &mut copy).context(|| "copy the agent to a memfd".to_owned())?;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals()))
        .context(|| "seal the memfd of the agent".to_owned())?;
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
    fn a_sealed_copy_cannot_be_changed() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"no program").unwrap();
        assert!(!is_sealed(&file));
        let mut copy = copy(&File::open("/bin/sh").unwrap()).unwrap();
        assert!(is_sealed(&copy));
        assert!(copy.write_all(b"x").is_err() && copy.write_at(b"x", 0).is_err());
        assert!(copy.set_len(0).is_err());
    }

    #[test]
    fn a_sealed_copy_can_be_executed() {
        let program = File::open("/bin/sh").unwrap();
        let copy = copy(&program).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), copy.as_raw_fd());
        let output = Command::new(path).args(["-c", "echo runs"]).output().unwrap();
        assert_eq!(output.stdout, b"runs\n");
    }
}
