//! Seccomp filters: the system calls that each kind of thread may make; any other kills the
//! process.
//!
//! Each thread installs its filter itself before any other work; the main thread does so last, when
//! all threads were started.

use std::collections::BTreeMap;
use std::sync::Arc;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Control socket, signals, exit of the VM.
    Main,
    /// Plugs and unplugs devices, pauses, resizes.
    Control,
    Vcpu,
    /// Runs device engines.
    Worker,
}

/// Action for a system call that is not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The process is killed with SIGSYS.
    Kill,
    /// The call is logged and allowed, to find out which calls a change needs.
    Log,
    /// No filter.
    Off,
}

#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("cannot compile the seccomp filter of {role:?} threads")]
    Build { role: Role, source: BackendError },
    #[error("cannot install the seccomp filter of a {role:?} thread")]
    Apply { role: Role, source: seccompiler::Error },
}

/// Condition on an argument of the call.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// Argument 1 equals this (request of ioctl, command of fcntl).
    Request(u32),
    /// Argument 2 has none of these bits (prot of mmap and mprotect).
    Without(u32),
}

type Call = (i64, When, &'static str);

/// Calls of every thread: allocator, locks, logging, exit.
const COMMON: &[Call] = &[
    (libc::SYS_brk, When::Always, "allocator"),
    (libc::SYS_mmap, When::Without(libc::PROT_EXEC as u32), "allocator, io_uring rings"),
    (libc::SYS_mprotect, When::Without(libc::PROT_EXEC as u32), "allocator"),
    (libc::SYS_munmap, When::Always, "allocator"),
    (libc::SYS_mremap, When::Always, "allocator"),
    (libc::SYS_madvise, When::Always, "allocator, stack of an exiting thread"),
    (libc::SYS_futex, When::Always, "locks, channels"),
    (libc::SYS_sched_yield, When::Always, "contended locks"),
    (libc::SYS_read, When::Always, "eventfds"),
    (libc::SYS_write, When::Always, "eventfds, log lines"),
    (libc::SYS_close, When::Always, "unplugged devices, file descriptors of clients"),
    (libc::SYS_fcntl, When::Request(libc::F_GETFD as u32), "debug builds, before every close"),
    (libc::SYS_clock_gettime, When::Always, "hosts without a vDSO clock"),
    (libc::SYS_getrandom, When::Always, "seeds of hash tables; the guest's entropy"),
    (libc::SYS_rt_sigprocmask, When::Always, "thread exit, abort"),
    (libc::SYS_rt_sigaction, When::Always, "abort"),
    (libc::SYS_rt_sigreturn, When::Always, "return from a signal handler"),
    (libc::SYS_sigaltstack, When::Always, "thread exit"),
    (libc::SYS_gettid, When::Always, "abort, kicks"),
    (libc::SYS_getpid, When::Always, "abort, kicks, status"),
    (libc::SYS_tgkill, When::Always, "kicks to vCPU threads, abort"),
    (libc::SYS_restart_syscall, When::Always, "waits interrupted by SIGSTOP and SIGCONT"),
    (libc::SYS_exit, When::Always, "thread exit"),
    (libc::SYS_exit_group, When::Always, "process exit"),
];

/// Calls to create, activate and drop devices: the control thread creates them, vCPU threads
/// activate them, workers and the holder of the last reference drop them.
const DEVICES: &[Call] = &[
    (libc::SYS_eventfd2, When::Always, "doorbells and vectors"),
    (libc::SYS_fcntl, When::Request(F_DUPFD_CLOEXEC), "duplicates of doorbells for an engine"),
    (libc::SYS_fcntl, When::Request(libc::F_GETFL as u32), "access mode of a disk"),
    (libc::SYS_fcntl, When::Request(libc::F_SETFL as u32), "non-blocking descriptors"),
    (libc::SYS_dup, When::Always, "duplicates of doorbells for an engine"),
    (libc::SYS_fstat, When::Always, "a disk's size"),
    (libc::SYS_statx, When::Always, "a disk's size"),
    (libc::SYS_lseek, When::Always, "a disk's size"),
    (libc::SYS_newfstatat, When::Always, "fstat of newer C libraries"),
    (libc::SYS_getsockopt, When::Always, "type of a socket"),
    (libc::SYS_ioctl, When::Request(KVM_SET_GSI_ROUTING), "message of a vector"),
    (libc::SYS_ioctl, When::Request(KVM_IRQFD), "mask and unmask a vector"),
    (libc::SYS_ioctl, When::Request(KVM_IOEVENTFD), "doorbells, when a BAR moves"),
    (libc::SYS_ioctl, When::Request(TUNGETIFF), "flags of a tap"),
    (libc::SYS_ioctl, When::Request(TUNSETOFFLOAD), "negotiated offloads"),
    (libc::SYS_ioctl, When::Request(TUNSETVNETHDRSZ), "negotiated header size"),
    (libc::SYS_ioctl, When::Request(BLKGETSIZE64), "a block device's size"),
    (libc::SYS_ioctl, When::Request(BLKSSZGET), "a block device's sector size"),
    (libc::SYS_ioctl, When::Request(FIONBIO), "non-blocking descriptors"),
];

const MAIN: &[Call] = &[
    (libc::SYS_epoll_wait, When::Always, "waiting"),
    (libc::SYS_epoll_pwait, When::Always, "waiting"),
    (libc::SYS_epoll_ctl, When::Always, "clients of the control socket"),
    (libc::SYS_accept4, When::Always, "clients of the control socket"),
    (libc::SYS_recvmsg, When::Always, "requests"),
    (libc::SYS_sendmsg, When::Always, "replies"),
    (libc::SYS_pwrite64, When::Always, "console ring"),
    (libc::SYS_pread64, When::Always, "console tail of the exit report"),
    (libc::SYS_lseek, When::Always, "status file"),
    (libc::SYS_ftruncate, When::Always, "status file"),
    (libc::SYS_fsync, When::Always, "status file"),
    (libc::SYS_clock_nanosleep, When::Always, "`boot`: waiting for the console follower"),
];

/// io_uring instances are created on this thread and, before it has its filter, on the main thread;
/// threads that process guest input cannot create any.
const CONTROL: &[Call] = &[
    (libc::SYS_io_uring_setup, When::Always, "io_uring of a new disk"),
    (libc::SYS_io_uring_register, When::Always, "io_uring of a new disk"),
    (libc::SYS_clock_nanosleep, When::Always, "waiting for an engine to drain"),
    (libc::SYS_ioctl, When::Request(KVM_SET_USER_MEMORY_REGION), "memory hotplug"),
    (libc::SYS_ioctl, When::Request(KVM_GET_CLOCK), "snapshot"),
    (libc::SYS_ftruncate, When::Always, "snapshot: state file"),
];

const VCPU: &[Call] = &[
    (libc::SYS_ioctl, When::Request(KVM_RUN), "running the guest"),
    (libc::SYS_ioctl, When::Request(KVM_GET_REGS), "RIP of an emulation failure"),
    (libc::SYS_ioctl, When::Request(KVM_KVMCLOCK_CTRL), "tells the guest that it was paused"),
    (libc::SYS_ioctl, When::Request(KVM_GET_MP_STATE), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_SREGS), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_XSAVE), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_XCRS), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_DEBUGREGS), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_LAPIC), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_TSC_KHZ), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_MSRS), "snapshot"),
    (libc::SYS_ioctl, When::Request(KVM_GET_VCPU_EVENTS), "snapshot"),
    (libc::SYS_pwrite64, When::Always, "console ring, from the serial port"),
];

const WORKER: &[Call] = &[
    (libc::SYS_epoll_wait, When::Always, "waiting"),
    (libc::SYS_epoll_pwait, When::Always, "waiting"),
    (libc::SYS_epoll_ctl, When::Always, "engines and connections"),
    (libc::SYS_io_uring_enter, When::Always, "disk requests"),
    (libc::SYS_readv, When::Always, "packets from a tap into guest memory"),
    (libc::SYS_writev, When::Always, "packets to a tap"),
    (libc::SYS_pread64, When::Always, "disk without io_uring"),
    (libc::SYS_pwrite64, When::Always, "console ring; disk without io_uring"),
    (libc::SYS_preadv, When::Always, "disk without io_uring"),
    (libc::SYS_pwritev, When::Always, "disk without io_uring"),
    (libc::SYS_fdatasync, When::Always, "disk without io_uring: flush"),
    (
        libc::SYS_fallocate,
        When::Always,
        "freed and unplugged memory; disk without io_uring: discard",
    ),
    (libc::SYS_fadvise64, When::Always, "disk without io_uring: drop the host's page cache"),
    (libc::SYS_ioctl, When::Request(BLKDISCARD), "block device: discard"),
    (libc::SYS_ioctl, When::Request(BLKZEROOUT), "block device: write zeroes"),
    (libc::SYS_accept4, When::Always, "vsock connections from the host"),
    (libc::SYS_recvfrom, When::Always, "vsock streams"),
    (libc::SYS_sendto, When::Always, "vsock streams"),
    (libc::SYS_recvmsg, When::Always, "vsock streams"),
    (libc::SYS_sendmsg, When::Always, "vsock streams"),
    (libc::SYS_shutdown, When::Always, "vsock half-close"),
    (libc::SYS_clock_nanosleep, When::Always, "draining at exit"),
];

// Request numbers, <linux/kvm.h>, <linux/if_tun.h>, <linux/fs.h>.
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const BLKGETSIZE64: u32 = 0x8008_1272;
const BLKSSZGET: u32 = 0x1268;
const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;
const FIONBIO: u32 = 0x5421;
const F_DUPFD_CLOEXEC: u32 = libc::F_DUPFD_CLOEXEC as u32;

fn calls(role: Role) -> impl Iterator<Item = &'static Call> {
    let (own, devices) = match role {
        Role::Main => (MAIN, &[][..]),
        Role::Control => (CONTROL, DEVICES),
        Role::Vcpu => (VCPU, DEVICES),
        Role::Worker => (WORKER, DEVICES),
    };
    COMMON.iter().chain(devices).chain(own)
}

/// The compiled filters of all roles.
#[derive(Debug, Clone)]
pub struct Filters {
    programs: Arc<BTreeMap<Role, BpfProgram>>,
}

impl Filters {
    pub fn new(policy: Policy) -> Result<Self, FilterError> {
        let mut programs = BTreeMap::new();
        let mismatch = match policy {
            Policy::Kill => SeccompAction::KillProcess,
            Policy::Log => SeccompAction::Log,
            Policy::Off => return Ok(Self { programs: Arc::new(programs) }),
        };
        for role in [Role::Main, Role::Control, Role::Vcpu, Role::Worker] {
            let program = compile(role, mismatch.clone())
                .map_err(|source| FilterError::Build { role, source })?;
            programs.insert(role, program);
        }
        Ok(Self { programs: Arc::new(programs) })
    }

    /// Installs the filter of `role` on the calling thread.
    pub fn apply(&self, role: Role) -> Result<(), FilterError> {
        match self.programs.get(&role) {
            Some(program) => {
                apply_filter(program).map_err(|source| FilterError::Apply { role, source })
            }
            None => Ok(()),
        }
    }
}

fn compile(role: Role, mismatch: SeccompAction) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, when, _) in calls(role) {
        let conditions = rules.entry(*call).or_default();
        let word = SeccompCmpArgLen::Dword;
        let condition = match when {
            When::Always => continue,
            When::Request(request) => {
                SeccompCondition::new(1, word, SeccompCmpOp::Eq, u64::from(*request))?
            }
            When::Without(bits) => {
                SeccompCondition::new(2, word, SeccompCmpOp::MaskedEq(u64::from(*bits)), 0)?
            }
        };
        conditions.push(SeccompRule::new(vec![condition])?);
    }
    SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_no_call_is_listed_with_and_without_a_condition() {
        Filters::new(Policy::Kill).unwrap();
        for role in [Role::Main, Role::Control, Role::Vcpu, Role::Worker] {
            let always: Vec<i64> = calls(role)
                .filter(|(_, when, _)| matches!(when, When::Always))
                .map(|(call, ..)| *call)
                .collect();
            for (call, when, why) in calls(role) {
                let free = matches!(when, When::Always);
                assert!(free || !always.contains(call), "{role:?}: {why}: condition has no effect");
            }
        }
    }

    #[test]
    fn no_role_may_open_files_execute_programs_or_map_executable_memory() {
        let forbidden = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_execve,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_bpf,
        ];
        for role in [Role::Main, Role::Control, Role::Vcpu, Role::Worker] {
            for (call, when, why) in calls(role) {
                assert!(!forbidden.contains(call), "{role:?}: {why}");
                let memory = matches!(*call, libc::SYS_mmap | libc::SYS_mprotect);
                assert!(!memory || matches!(when, When::Without(_)), "{role:?}: {why}");
            }
        }
    }

    #[test]
    fn only_the_control_thread_may_create_io_uring_instances() {
        for role in [Role::Main, Role::Control, Role::Vcpu, Role::Worker] {
            let may_create = calls(role).any(|(call, ..)| {
                matches!(*call, libc::SYS_io_uring_setup | libc::SYS_io_uring_register)
            });
            assert_eq!(may_create, role == Role::Control, "{role:?}");
        }
    }

    #[test]
    fn a_thread_with_a_filter_can_allocate_lock_and_exit() {
        let filters = Filters::new(Policy::Kill).unwrap();
        let outcome = std::thread::spawn(move || {
            filters.apply(Role::Worker).unwrap();
            let lock = std::sync::Mutex::new(vec![0u8; 1 << 20]);
            lock.lock().unwrap().push(1);
            lock.into_inner().unwrap().len()
        });
        assert_eq!(outcome.join().unwrap(), (1 << 20) + 1);
    }
}
