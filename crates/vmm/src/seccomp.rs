//! System calls each kind of thread may make; any other kills the process.
//!
//! A filter is installed by the thread itself, as the first thing it does; the main thread's comes
//! last, when everything has been started.

use std::collections::BTreeMap;
use std::sync::Arc;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Control socket, signals, the end.
    Main,
    /// Plugs and pulls devices.
    Orders,
    Vcpu,
    /// Runs device engines.
    Worker,
}

/// What happens on a call that is not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The process is killed with SIGSYS.
    Kill,
    /// The kernel logs it and goes on: for finding out what a change needs.
    Log,
    /// No filter.
    Off,
}

#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("seccomp filter of {role:?} threads")]
    Build { role: Role, source: BackendError },
    #[error("kernel refuses the seccomp filter of a {role:?} thread")]
    Apply { role: Role, source: seccompiler::Error },
}

/// Condition on an argument beyond the call's number.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// Argument 1 is this (requests of ioctl and fcntl).
    Request(u32),
    /// Argument 2 has none of these bits (protection flags).
    Without(u32),
}

type Call = (i64, When, &'static str);

/// Every thread: allocator, locks, logging, its own end.
const COMMON: &[Call] = &[
    (libc::SYS_brk, When::Always, "allocator"),
    (libc::SYS_mmap, When::Without(libc::PROT_EXEC as u32), "allocator, io_uring rings"),
    (libc::SYS_mprotect, When::Without(libc::PROT_EXEC as u32), "allocator"),
    (libc::SYS_munmap, When::Always, "allocator"),
    (libc::SYS_mremap, When::Always, "allocator"),
    (libc::SYS_madvise, When::Always, "allocator, a thread's stack at its end"),
    (libc::SYS_futex, When::Always, "locks, channels"),
    (libc::SYS_sched_yield, When::Always, "contended locks"),
    (libc::SYS_read, When::Always, "eventfds"),
    (libc::SYS_write, When::Always, "eventfds, log lines"),
    (libc::SYS_close, When::Always, "devices that go, descriptors of clients"),
    (libc::SYS_fcntl, When::Request(libc::F_GETFD as u32), "debug builds, before every close"),
    (libc::SYS_clock_gettime, When::Always, "hosts whose clock is not in the vDSO"),
    (libc::SYS_getrandom, When::Always, "seeds of hash tables; the guest's entropy"),
    (libc::SYS_rt_sigprocmask, When::Always, "a thread's end, abort"),
    (libc::SYS_rt_sigaction, When::Always, "abort"),
    (libc::SYS_rt_sigreturn, When::Always, "end of a signal handler"),
    (libc::SYS_sigaltstack, When::Always, "a thread's end"),
    (libc::SYS_gettid, When::Always, "abort, kicks"),
    (libc::SYS_getpid, When::Always, "abort, kicks, status"),
    (libc::SYS_tgkill, When::Always, "kicks to vCPU threads, abort"),
    (libc::SYS_restart_syscall, When::Always, "waits interrupted by stop and continue"),
    (libc::SYS_exit, When::Always, "a thread's end"),
    (libc::SYS_exit_group, When::Always, "the end"),
];

/// Making, starting and dropping a device's parts: vCPU threads activate devices, the orders thread
/// makes them, workers and whoever holds the last reference drop them.
const DEVICES: &[Call] = &[
    (libc::SYS_eventfd2, When::Always, "doorbells and vectors"),
    (libc::SYS_fcntl, When::Request(F_DUPFD_CLOEXEC), "duplicates of doorbells for an engine"),
    (libc::SYS_fcntl, When::Request(libc::F_GETFL as u32), "a disk's access mode"),
    (libc::SYS_fcntl, When::Request(libc::F_SETFL as u32), "non-blocking descriptors"),
    (libc::SYS_dup, When::Always, "duplicates of doorbells for an engine"),
    (libc::SYS_fstat, When::Always, "a disk's size"),
    (libc::SYS_statx, When::Always, "a disk's size"),
    (libc::SYS_lseek, When::Always, "a disk's size"),
    (libc::SYS_newfstatat, When::Always, "fstat of newer C libraries"),
    (libc::SYS_getsockopt, When::Always, "what kind of socket a descriptor is"),
    (libc::SYS_ioctl, When::Request(KVM_SET_GSI_ROUTING), "a vector gets its message"),
    (libc::SYS_ioctl, When::Request(KVM_IRQFD), "a vector is masked or unmasked"),
    (libc::SYS_ioctl, When::Request(KVM_IOEVENTFD), "doorbells move with their BAR"),
    (libc::SYS_ioctl, When::Request(TUNGETIFF), "what a tap is"),
    (libc::SYS_ioctl, When::Request(TUNSETOFFLOAD), "offloads the guest's driver takes"),
    (libc::SYS_ioctl, When::Request(TUNSETVNETHDRSZ), "header size the guest's driver takes"),
    (libc::SYS_ioctl, When::Request(BLKGETSIZE64), "a block device's size"),
    (libc::SYS_ioctl, When::Request(BLKSSZGET), "a block device's sector size"),
    (libc::SYS_ioctl, When::Request(FIONBIO), "non-blocking descriptors"),
];

const MAIN: &[Call] = &[
    (libc::SYS_epoll_wait, When::Always, "waiting"),
    (libc::SYS_epoll_pwait, When::Always, "waiting"),
    (libc::SYS_epoll_ctl, When::Always, "clients come and go"),
    (libc::SYS_accept4, When::Always, "clients of the control socket"),
    (libc::SYS_recvmsg, When::Always, "requests"),
    (libc::SYS_sendmsg, When::Always, "replies"),
    (libc::SYS_pwrite64, When::Always, "console ring"),
    (libc::SYS_pread64, When::Always, "the console's last lines"),
    (libc::SYS_lseek, When::Always, "status file"),
    (libc::SYS_ftruncate, When::Always, "status file"),
    (libc::SYS_fsync, When::Always, "status file"),
    (libc::SYS_clock_nanosleep, When::Always, "`boot`: waiting for the output's follower"),
];

/// Rings are made here and, before its filter, by the main thread; the threads that work for the
/// guest can make none.
const ORDERS: &[Call] = &[
    (libc::SYS_io_uring_setup, When::Always, "a new disk's ring"),
    (libc::SYS_io_uring_register, When::Always, "a new disk's ring"),
    (libc::SYS_clock_nanosleep, When::Always, "waiting for an engine to go"),
    (libc::SYS_ioctl, When::Request(KVM_SET_USER_MEMORY_REGION), "memory that the VM grows by"),
];

const VCPU: &[Call] = &[
    (libc::SYS_ioctl, When::Request(KVM_RUN), "the guest"),
    (libc::SYS_ioctl, When::Request(KVM_GET_REGS), "where an emulation failure happened"),
    (libc::SYS_ioctl, When::Request(KVM_KVMCLOCK_CTRL), "a guest that was paused is told so"),
    (libc::SYS_pwrite64, When::Always, "console ring, from the serial port"),
];

const WORKER: &[Call] = &[
    (libc::SYS_epoll_wait, When::Always, "waiting"),
    (libc::SYS_epoll_pwait, When::Always, "waiting"),
    (libc::SYS_epoll_ctl, When::Always, "engines and connections come and go"),
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
        "free and unplugged memory; disk without io_uring: discard",
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
    (libc::SYS_clock_nanosleep, When::Always, "draining at the end"),
];

// Request numbers, <linux/kvm.h>, <linux/if_tun.h>, <linux/fs.h>.
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
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
        Role::Orders => (ORDERS, DEVICES),
        Role::Vcpu => (VCPU, DEVICES),
        Role::Worker => (WORKER, DEVICES),
    };
    COMMON.iter().chain(devices).chain(own)
}

/// Compiled filters of all roles, to be handed to threads.
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
        for role in [Role::Main, Role::Orders, Role::Vcpu, Role::Worker] {
            let program = compile(role, mismatch.clone())
                .map_err(|source| FilterError::Build { role, source })?;
            programs.insert(role, program);
        }
        Ok(Self { programs: Arc::new(programs) })
    }

    /// Binds the calling thread.
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
    fn every_role_compiles_and_no_call_is_listed_both_with_and_without_a_condition() {
        Filters::new(Policy::Kill).unwrap();
        for role in [Role::Main, Role::Orders, Role::Vcpu, Role::Worker] {
            let always: Vec<i64> = calls(role)
                .filter(|(_, when, _)| matches!(when, When::Always))
                .map(|(call, ..)| *call)
                .collect();
            for (call, when, why) in calls(role) {
                let free = matches!(when, When::Always);
                assert!(free || !always.contains(call), "{role:?}: {why}: condition is void");
            }
        }
    }

    #[test]
    fn no_role_may_open_files_start_programs_or_make_memory_executable() {
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
        for role in [Role::Main, Role::Orders, Role::Vcpu, Role::Worker] {
            for (call, when, why) in calls(role) {
                assert!(!forbidden.contains(call), "{role:?}: {why}");
                let memory = matches!(*call, libc::SYS_mmap | libc::SYS_mprotect);
                assert!(!memory || matches!(when, When::Without(_)), "{role:?}: {why}");
            }
        }
    }

    #[test]
    fn rings_are_made_by_the_orders_thread_alone() {
        for role in [Role::Main, Role::Orders, Role::Vcpu, Role::Worker] {
            let makes = calls(role).any(|(call, ..)| {
                matches!(*call, libc::SYS_io_uring_setup | libc::SYS_io_uring_register)
            });
            assert_eq!(makes, role == Role::Orders, "{role:?}");
        }
    }

    #[test]
    fn a_thread_under_a_filter_can_still_allocate_lock_and_end() {
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
