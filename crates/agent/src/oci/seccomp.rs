//! Seccomp filter of a container (runtime-spec config-linux.md, "Seccomp"): compiled by libseccomp,
//! with a prologue that returns ENOSYS for system calls newer than the profile.
//!
//! A profile lists the calls that its author knew; its default action, usually EPERM, is meant for
//! known calls that are denied. C libraries fall back from a newer call only on ENOSYS. So, as in
//! runc, a call number above the highest one that the profile names for the architecture returns
//! ENOSYS, unless the default action allows calls or already returns ENOSYS.
//!
//! ```text
//! ld arch;  x86-64: jump A;  i386: jump B;  else jump filter
//! A: ld nr;  x32: jump C;  nr > last of x86-64: jump ENOSYS;  jump filter
//! B: ld nr;  nr > last of i386: jump ENOSYS;  jump filter
//! C: nr > last of x32: jump ENOSYS;  jump filter
//! ENOSYS: ret ERRNO | ENOSYS
//! filter: output of libseccomp
//! ```
//! Not libcontainer's loader: it has no prologue, and it keeps the calls in a linear list. When a
//! filter is loaded, the kernel runs it for each of some 900 call numbers (bitmap of always allowed
//! calls); with a binary tree that is about twenty times faster.
#![allow(unsafe_code)] // seccomp(2) has no safe wrapper

use std::collections::VecDeque;
use std::io::{Read, Seek};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::errno::Errno;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, String>;

/// linux/audit.h
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Set in the numbers of x32 calls (asm/unistd.h).
const X32_BIT: u32 = 0x4000_0000;
/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const RET_ERRNO: u32 = 0x0005_0000;
/// Maximum instructions of a program (BPF_MAXINSNS).
const MAX_PROGRAM: usize = 4096;

// linux/bpf_common.h
const LD_W_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGT_K: u16 = 0x25;
const JMP_JSET_K: u16 = 0x45;
const RET_K: u16 = 0x06;

/// Compiled filters that are kept: containers and execs of a pod use few different profiles.
const KEPT: usize = 8;

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    flags: libc::c_ulong,
    /// Each instruction as a number: code, jt, jf, k from the lowest bit on.
    program: Vec<u64>,
}

impl Filter {
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let mut flags = 0;
        for flag in profile.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // The process has one thread.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
                // For SCMP_ACT_NOTIFY, which is refused.
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            };
        }
        let pack = |op: libc::sock_filter| {
            let [code, jt, jf, k]: [u64; 4] =
                [op.code.into(), op.jt.into(), op.jf.into(), op.k.into()];
            code | jt << 16 | jf << 24 | k << 32
        };
        Ok(Self { flags, program: compile(profile)?.into_iter().map(pack).collect() })
    }

    fn instructions(&self) -> Vec<libc::sock_filter> {
        let unpack = |all: &u64| {
            op(*all as u16, (*all >> 16) as u8, (*all >> 24) as u8, (*all >> 32) as u32)
        };
        self.program.iter().map(unpack).collect()
    }

    /// Loads the filter into the calling thread, which needs CAP_SYS_ADMIN or no_new_privs.
    pub fn load(&self) -> Result<()> {
        let mut program = self.instructions();
        let len = u16::try_from(program.len()).map_err(|_| "the filter is too long".to_owned())?;
        let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
        // SAFETY: the kernel reads `len` instructions, which the vector behind `program` holds until
        // the call returns.
        let done = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        Errno::result(done).map(drop).map_err(|error| format!("load the filter: {}", error.desc()))
    }
}

/// Filters of the pod's profiles. libseccomp takes 20 to 50 ms for the default profile of containerd,
/// which each container and each exec would wait for.
#[derive(Debug, Default)]
pub struct Filters(Mutex<VecDeque<(LinuxSeccomp, Filter)>>);

impl Filters {
    /// The filter of a profile, compiled at its first use. Blocks the thread for that time.
    pub fn get(&self, profile: &LinuxSeccomp) -> Result<Filter> {
        let find = |all: &VecDeque<(LinuxSeccomp, Filter)>| {
            all.iter().find(|(known, _)| known == profile).map(|(_, filter)| filter.clone())
        };
        if let Some(filter) = find(&self.lock()) {
            return Ok(filter);
        }
        let filter = Filter::compile(profile)?;
        let mut all = self.lock();
        if find(&all).is_none() {
            all.truncate(KEPT - 1);
            all.push_front((profile.clone(), filter.clone()));
        }
        Ok(filter)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(LinuxSeccomp, Filter)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn compile(profile: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>> {
    let mut program = prologue(profile);
    program.extend(filter(profile)?);
    if program.len() > MAX_PROGRAM {
        return Err(format!(
            "the filter has {} instructions, the maximum is {MAX_PROGRAM}",
            program.len()
        ));
    }
    Ok(program)
}

fn op(code: u16, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: jump_true, jf: jump_false, k }
}

/// The prologue (see the module header); empty if no call gets ENOSYS.
fn prologue(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    let passes = matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            // The tracer handles unknown calls.
            | LinuxSeccompAction::ScmpActTrace
    );
    let default_is_enosys = profile.default_errno_ret() == Some(libc::ENOSYS as u32);
    if passes || default_is_enosys {
        return Vec::new();
    }
    let last = |arch: ScmpArch, wanted: Arch| {
        let listed = profile.architectures().iter().flatten().any(|arch| *arch == wanted);
        // libseccomp always adds the native architecture.
        (listed || arch == ScmpArch::X8664).then(|| last_call(profile, arch)).flatten()
    };
    let native = last(ScmpArch::X8664, Arch::ScmpArchX86_64);
    let x32 = last(ScmpArch::X32, Arch::ScmpArchX32);
    let i386 = last(ScmpArch::X86, Arch::ScmpArchX86);
    // Without a named call no number is above the last.
    let above = |last: Option<u32>| last.unwrap_or(u32::MAX);
    vec![
        op(LD_W_ABS, 0, 0, DATA_ARCH),
        op(JMP_JEQ_K, 1, 0, AUDIT_ARCH_X86_64), // to A
        op(JMP_JEQ_K, 4, 9, AUDIT_ARCH_I386),   // to B, to the filter
        // A
        op(LD_W_ABS, 0, 0, DATA_NR),
        op(JMP_JSET_K, 5, 0, X32_BIT), // to C
        op(JMP_JGT_K, 5, 0, above(native)),
        op(JMP_JA, 0, 0, 5),
        // B
        op(LD_W_ABS, 0, 0, DATA_NR),
        op(JMP_JGT_K, 2, 0, above(i386)),
        op(JMP_JA, 0, 0, 2),
        // C
        op(JMP_JGT_K, 0, 1, above(x32)),
        // ENOSYS
        op(RET_K, 0, 0, RET_ERRNO | libc::ENOSYS as u32),
    ]
}

/// The highest call number that the rules name.
fn last_call(profile: &LinuxSeccomp, arch: ScmpArch) -> Option<u32> {
    let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
    // Names that the architecture does not have map to negative numbers.
    let numbers = names.filter_map(|name| {
        u32::try_from(ScmpSyscall::from_name_by_arch(name, arch).ok()?.as_raw_syscall()).ok()
    });
    numbers.max()
}

fn filter(profile: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>> {
    let bad = |error: libseccomp::error::SeccompError| error.to_string();
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(bad)?;
    // 2: binary tree.
    context.set_ctl_optimize(2).map_err(bad)?;
    for arch in profile.architectures().iter().flatten() {
        context.add_arch(architecture(*arch)?).map_err(bad)?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            // libseccomp refuses a rule with the default action.
            continue;
        }
        for name in rule.names() {
            // Unknown to libseccomp: a newer call, which the prologue handles.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            for conditions in conditions(rule.args().as_deref().unwrap_or_default())? {
                let added = if conditions.is_empty() {
                    context.add_rule(action, call)
                } else {
                    context.add_rule_conditional(action, call, &conditions)
                };
                added.map_err(|error| format!("rule for {name}: {error}"))?;
            }
        }
    }
    export(&context)
}

/// Converts argument conditions to rules: one rule, or one for each condition if an index appears
/// twice, as libseccomp allows an index only once in a rule. Same as runc.
fn conditions(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>> {
    let mut compares = Vec::new();
    for arg in args {
        let index = u32::try_from(arg.index())
            .ok()
            .filter(|index| *index < 6)
            .ok_or_else(|| format!("argument {} of a call does not exist", arg.index()))?;
        let op = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
            LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
            LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
            LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
            LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
            LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
            // The host swaps the two values, as libcontainer 0.7 expects (cri's `for_guest`).
            LinuxSeccompOperator::ScmpCmpMaskedEq => {
                ScmpCompareOp::MaskedEqual(arg.value_two().unwrap_or(0))
            }
        };
        compares.push(ScmpArgCompare::new(index, op, arg.value()));
    }
    let twice = args
        .iter()
        .enumerate()
        .any(|(at, arg)| args[..at].iter().any(|other| other.index() == arg.index()));
    Ok(match twice {
        true => compares.into_iter().map(|compare| vec![compare]).collect(),
        false => vec![compares],
    })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = i32::try_from(errno.unwrap_or(libc::EPERM as u32))
        .map_err(|_| "an error number is out of range".to_owned())?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(
            u16::try_from(errno).map_err(|_| "a trace value is out of range".to_owned())?,
        ),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err("SCMP_ACT_NOTIFY is not supported".to_owned());
        }
    })
}

/// Architectures of calls that an x86-64 kernel supports.
fn architecture(arch: Arch) -> Result<ScmpArch> {
    match arch {
        Arch::ScmpArchNative | Arch::ScmpArchX86_64 => Ok(ScmpArch::X8664),
        Arch::ScmpArchX86 => Ok(ScmpArch::X86),
        Arch::ScmpArchX32 => Ok(ScmpArch::X32),
        other => Err(format!("architecture {other:?} is not supported on x86-64")),
    }
}

fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    let failed = |error: std::io::Error| format!("export the filter: {error}");
    let memory = nix::sys::memfd::memfd_create(c"filter", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let mut file = std::fs::File::from(memory.map_err(|error| failed(error.into()))?);
    context.export_bpf(&file).map_err(|error| error.to_string())?;
    file.rewind().map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    // struct sock_filter { u16 code; u8 jt; u8 jf; u32 k; }, in native byte order.
    let (instructions, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err("libseccomp exported a partial instruction".to_owned());
    }
    let parse = |bytes: &[u8; 8]| {
        let [a, b, jt, jf, k @ ..] = *bytes;
        op(u16::from_ne_bytes([a, b]), jt, jf, u32::from_ne_bytes(k))
    };
    Ok(instructions.iter().map(parse).collect())
}

#[cfg(test)]
mod tests;
