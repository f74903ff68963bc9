//! Executes the program of a container or an exec, as the last step of its process in the
//! container. Failures are worded as runc words them, and are sent to the agent through the start
//! pipe.

#![allow(unsafe_code)] // sigaction

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{AccessFlags, access, execve};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use super::seccomp::Filter;

/// Exit code if the program was not found, as in POSIX shells.
const STATUS_MISSING: i32 = 127;
/// Exit code if the program could not be executed.
const STATUS_FAILED: i32 = 126;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) missing: bool,
    pub(super) message: String,
}

fn failure(name: &str, errno: Errno, what: &str) -> Failure {
    let reason = match errno {
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        Errno::ENOEXEC => "exec format error",
        Errno::ENOTDIR => "not a directory",
        Errno::EISDIR => "is a directory",
        other => other.desc(),
    };
    Failure {
        missing: matches!(errno, Errno::ENOENT | Errno::ENOTDIR),
        message: format!("exec: {name:?}: {what}{reason}"),
    }
}

fn executable(path: &Path) -> Result<(), Errno> {
    let meta = std::fs::metadata(path)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if meta.is_dir() {
        return Err(Errno::EISDIR);
    }
    // access(2) returns success for root even if no x bit is set.
    if meta.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    access(path, AccessFlags::X_OK)
}

/// Finds the program like execvp(3), in the PATH of the container.
fn find(name: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        let path = Path::new(name);
        return match executable(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(errno) => Err(failure(name, errno, &format!("stat {name}: "))),
        };
    }
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
    let mut denied = false;
    for dir in path.unwrap_or_default().split(':').filter(|dir| !dir.is_empty()) {
        let candidate = Path::new(dir).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(failure(name, Errno::EACCES, ""));
    }
    Err(Failure {
        missing: true,
        message: format!("exec: {name:?}: executable file not found in $PATH"),
    })
}

fn strings(list: &[String]) -> Vec<CString> {
    // `complete_process` has refused NUL bytes.
    list.iter().filter_map(|text| CString::new(text.as_bytes()).ok()).collect()
}

fn run(process: &Process, filter: Option<&Filter>) -> Failure {
    let args = process.args().as_deref().unwrap_or_default();
    let env = process.env().as_deref().unwrap_or_default();
    let Some(name) = args.first() else {
        return Failure { missing: true, message: "no command given".to_owned() };
    };
    let path = match find(name, env) {
        Ok(path) => path,
        Err(failure) => return failure,
    };
    let text = path.display().to_string();
    let Ok(path) = CString::new(text.as_bytes()) else {
        return Failure { missing: true, message: format!("exec: {name:?}: contains a NUL byte") };
    };
    let (args, env) = (strings(args), strings(env));
    default_signals();
    if let Some(filter) = filter
        && let Err(error) = filter.load()
    {
        return Failure { missing: false, message: format!("exec: seccomp filter: {error}") };
    }
    // Directly after the filter: it need not allow any other system call.
    let Err(errno) = execve(&path, &args, &env);
    failure(name, errno, &format!("exec {text}: "))
}

/// Resets signal dispositions and the mask, which execve(2) keeps. Rust's runtime ignores SIGPIPE.
fn default_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator() {
        // SAFETY: the default disposition installs no handler.
        let _ = unsafe { sigaction(signal, &default) };
    }
    let _ = SigSet::empty().thread_set_mask();
}

/// Executes the program, or reports the failure and exits. On success the kernel closes the start
/// pipe. `filter` is loaded last, which needs no_new_privs.
pub(super) fn execute(process: &Process, filter: Option<&Filter>, start: &OwnedFd) -> ! {
    let failure = run(process, filter);
    fail(start, &failure)
}

/// Reports the failure and exits.
pub(super) fn fail(start: &OwnedFd, failure: &Failure) -> ! {
    let text = serde_json::to_vec(failure).unwrap_or_default();
    let _ = nix::unistd::write(start, &text);
    std::process::exit(if failure.missing { STATUS_MISSING } else { STATUS_FAILED })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_the_containers_path_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        std::fs::write(&path, "x").unwrap();
        let env = vec![format!("PATH=/nonexistent:{}", dir.path().display())];
        let denied = find("tool", &env).unwrap_err();
        assert_eq!(denied.message, "exec: \"tool\": permission denied");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(find("tool", &env).unwrap(), path);
        let missing = find("sh", &env).unwrap_err();
        assert_eq!(missing.message, "exec: \"sh\": executable file not found in $PATH");
        assert!(missing.missing);
    }

    #[test]
    fn failures_of_a_path_contain_the_path() {
        let missing = find("/no/such", &[]).unwrap_err();
        assert_eq!(missing.message, "exec: \"/no/such\": stat /no/such: no such file or directory");
        assert!(!find("/etc", &[]).unwrap_err().missing);
    }
}
