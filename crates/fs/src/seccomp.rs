//! Seccomp filters: the system calls that each of the two processes may make; any other kills it.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Mounter,
    /// All threads of the server.
    Server,
}

#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("seccomp filter of the {role:?}")]
    Build { role: Role, source: BackendError },
    #[error("the kernel rejects the seccomp filter of the {role:?}")]
    Apply { role: Role, source: seccompiler::Error },
}

/// Condition on an argument of the call.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// Argument 0 equals this (option of prctl).
    Option(u32),
    /// Argument 1 equals this (command of fcntl).
    Request(u32),
    /// Argument 2 has none of these bits (prot of mmap and mprotect).
    Without(u32),
}

use When::{Always, Option, Request, Without};

type Call = (i64, When, &'static str);

const COMMON: &[Call] = &[
    (libc::SYS_brk, Always, "allocator"),
    (libc::SYS_mmap, Without(libc::PROT_EXEC as u32), "allocator; the guest's memory"),
    (libc::SYS_mprotect, Without(libc::PROT_EXEC as u32), "allocator"),
    (libc::SYS_munmap, Always, "allocator; the guest's memory"),
    (libc::SYS_mremap, Always, "allocator"),
    (libc::SYS_madvise, Always, "allocator, stack of a thread that exits"),
    (libc::SYS_futex, Always, "locks"),
    (libc::SYS_sched_yield, Always, "contended locks"),
    (libc::SYS_read, Always, "eventfds"),
    (libc::SYS_write, Always, "eventfds, log lines"),
    (libc::SYS_close, Always, "files, clients"),
    (libc::SYS_fcntl, Request(libc::F_GETFD as u32), "debug builds, before every close"),
    (libc::SYS_fstat, Always, "file type of a descriptor"),
    (libc::SYS_newfstatat, Always, "fstat of newer C libraries"),
    (libc::SYS_recvmsg, Always, "requests and messages"),
    (libc::SYS_sendmsg, Always, "replies"),
    (libc::SYS_clock_gettime, Always, "hosts whose clock is not in the vDSO"),
    (libc::SYS_getrandom, Always, "seeds of hash tables"),
    (libc::SYS_rt_sigprocmask, Always, "exit of a thread, abort"),
    (libc::SYS_rt_sigaction, Always, "abort"),
    (libc::SYS_rt_sigreturn, Always, "end of a signal handler"),
    (libc::SYS_sigaltstack, Always, "exit of a thread"),
    (libc::SYS_gettid, Always, "abort"),
    (libc::SYS_getpid, Always, "abort"),
    (libc::SYS_tgkill, Always, "abort"),
    (libc::SYS_restart_syscall, Always, "waits interrupted by stop and continue"),
    (libc::SYS_exit, Always, "exit of a thread"),
    (libc::SYS_exit_group, Always, "exit of the process"),
];

const MOUNTER: &[Call] = &[
    (libc::SYS_poll, Always, "waiting for clients and for the server's exit"),
    (libc::SYS_ppoll, Always, "as above"),
    (libc::SYS_accept4, Always, "clients of the control socket"),
    (libc::SYS_mkdirat, Always, "mount point of a directory"),
    (libc::SYS_mknodat, Always, "mount point of a file"),
    (libc::SYS_unlinkat, Always, "a mount point is removed"),
    (libc::SYS_move_mount, Always, "a share is mounted"),
    (libc::SYS_umount2, Always, "a share is unmounted"),
    (libc::SYS_pread64, Always, "the mount table"),
    (libc::SYS_openat2, Always, "mount points below a share"),
    (libc::SYS_statx, Always, "mount id of a mount point"),
    (libc::SYS_open_tree, Always, "a copy of a mount"),
    (libc::SYS_mount_setattr, Always, "propagation and read-only flag of a mount"),
    (libc::SYS_fchdir, Always, "umount2 of a mount known by its descriptor, as `.`"),
    (libc::SYS_chdir, Always, "back to / after that"),
    (libc::SYS_fcntl, Request(libc::F_DUPFD_CLOEXEC as u32), "descriptors of shares"),
    (libc::SYS_waitid, Always, "the server's exit status"),
];

const SERVER: &[Call] = &[
    (libc::SYS_epoll_wait, Always, "rings"),
    (libc::SYS_epoll_pwait, Always, "rings"),
    (libc::SYS_epoll_ctl, Always, "rings start and stop"),
    (libc::SYS_openat, Always, "open, create, opendir, lookup of directories"),
    (libc::SYS_statx, Always, "lookup, getattr"),
    (libc::SYS_fstatfs, Always, "statfs; whether a mount is read-only"),
    (libc::SYS_readlinkat, Always, "readlink"),
    (libc::SYS_getdents64, Always, "readdir"),
    (libc::SYS_lseek, Always, "readdir, holes of sparse files"),
    (libc::SYS_preadv2, Always, "read"),
    (libc::SYS_pwritev2, Always, "write"),
    (libc::SYS_copy_file_range, Always, "copy_file_range"),
    (libc::SYS_fallocate, Always, "fallocate"),
    (libc::SYS_ftruncate, Always, "truncate"),
    (libc::SYS_fsync, Always, "fsync"),
    (libc::SYS_fdatasync, Always, "fdatasync"),
    (libc::SYS_syncfs, Always, "syncfs"),
    (libc::SYS_mkdirat, Always, "mkdir"),
    (libc::SYS_mknodat, Always, "mknod"),
    (libc::SYS_symlinkat, Always, "symlink"),
    (libc::SYS_linkat, Always, "link"),
    (libc::SYS_unlinkat, Always, "unlink, rmdir"),
    (libc::SYS_renameat, Always, "rename, which the C library takes without flags"),
    (libc::SYS_renameat2, Always, "rename"),
    (libc::SYS_fchmodat, Always, "chmod"),
    (libc::SYS_fchownat, Always, "chown"),
    (libc::SYS_utimensat, Always, "utimes"),
    (libc::SYS_getxattr, Always, "getxattr, through /proc/self/fd"),
    (libc::SYS_setxattr, Always, "setxattr, as above"),
    (libc::SYS_listxattr, Always, "listxattr, as above"),
    (libc::SYS_removexattr, Always, "removexattr, as above"),
    (libc::SYS_setresuid, Always, "a file is created as the guest's user"),
    (libc::SYS_setresgid, Always, "as above"),
    (libc::SYS_setgroups, Always, "as above, with supplementary groups"),
    (libc::SYS_capset, Always, "CAP_FSETID is dropped for changes that clear setuid bits"),
    (libc::SYS_prctl, Option(libc::PR_SET_NAME as u32), "start of a thread"),
    (libc::SYS_rseq, Always, "start of a thread"),
    (libc::SYS_set_robust_list, Always, "start of a thread"),
    (libc::SYS_sched_getaffinity, Always, "start of a thread"),
    (libc::SYS_eventfd2, Always, "events of the rings"),
    (libc::SYS_fcntl, Request(libc::F_DUPFD_CLOEXEC as u32), "duplicates of descriptors"),
];

fn calls(role: Role) -> impl Iterator<Item = &'static Call> {
    let own = match role {
        Role::Mounter => MOUNTER,
        Role::Server => SERVER,
    };
    COMMON.iter().chain(own)
}

/// Installs the filter on all threads of the process.
pub fn apply(role: Role) -> Result<(), FilterError> {
    let program = compile(role).map_err(|source| FilterError::Build { role, source })?;
    seccompiler::apply_filter_all_threads(&program)
        .map_err(|source| FilterError::Apply { role, source })
}

fn compile(role: Role) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, when, _) in calls(role) {
        let conditions = rules.entry(*call).or_default();
        let word = SeccompCmpArgLen::Dword;
        let condition = match when {
            Always => continue,
            Option(option) => SeccompCondition::new(0, word, SeccompCmpOp::Eq, u64::from(*option))?,
            Request(request) => {
                SeccompCondition::new(1, word, SeccompCmpOp::Eq, u64::from(*request))?
            }
            Without(bits) => {
                SeccompCondition::new(2, word, SeccompCmpOp::MaskedEq(u64::from(*bits)), 0)?
            }
        };
        conditions.push(SeccompRule::new(vec![condition])?);
    }
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(rules, kill, allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_roles_compile_and_no_call_is_listed_both_with_and_without_a_condition() {
        for role in [Role::Mounter, Role::Server] {
            compile(role).unwrap();
            let always: Vec<i64> = calls(role)
                .filter(|(_, when, _)| matches!(when, Always))
                .map(|(call, ..)| *call)
                .collect();
            for (call, when, why) in calls(role) {
                let free = matches!(when, Always);
                assert!(free || !always.contains(call), "{role:?}: {why}: condition is void");
            }
        }
    }

    #[test]
    fn neither_role_starts_programs_and_the_server_cannot_mount() {
        let neither = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_open_by_handle_at,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
        ];
        let server = [
            libc::SYS_move_mount,
            libc::SYS_umount2,
            libc::SYS_open_tree,
            libc::SYS_mount_setattr,
            libc::SYS_accept4,
        ];
        for role in [Role::Mounter, Role::Server] {
            for (call, _, why) in calls(role) {
                assert!(!neither.contains(call), "{role:?}: {why}");
                assert!(role == Role::Mounter || !server.contains(call), "{why}");
            }
        }
    }
}
