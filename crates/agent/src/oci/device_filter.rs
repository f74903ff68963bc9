//! Device rules of a container (runtime-spec config-linux.md, "Allowed Device list") as an eBPF
//! program of type BPF_PROG_TYPE_CGROUP_DEVICE.
//!
//! The last matching rule decides, so the program checks the rules from the last to the first. Each
//! compares type, access, major and minor and returns 1 (allow) or 0:
//! ```text
//! r2 = type, r3 = access, r4 = major, r5 = minor
//! rule n: if it does not match, jump to rule n-1;  r0 = allow; exit
//! ...
//! r0 = 0; exit
//! ```
#![allow(unsafe_code)] // bpf(2) has no safe wrapper

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

use crate::error::{Context, Error, Result};

/// Maximum rules of one container. Each is at most 8 instructions; bounds the time of the kernel's
/// verifier.
const MAX_RULES: usize = 400;

// uapi/linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_DEVCG_ACC_MKNOD: i32 = 1;
const BPF_DEVCG_ACC_READ: i32 = 2;
const BPF_DEVCG_ACC_WRITE: i32 = 4;
const BPF_DEVCG_DEV_BLOCK: i32 = 1;
const BPF_DEVCG_DEV_CHAR: i32 = 2;

// Opcodes: class | source or size | operation.
const LDX_MEM_W: u8 = 0x61;
const ALU_AND_K: u8 = 0x54;
const ALU_RSH_K: u8 = 0x74;
const ALU_MOV_X: u8 = 0xbc;
const ALU64_MOV_K: u8 = 0xb7;
const JMP_JEQ_K: u8 = 0x15;
const JMP_JNE_K: u8 = 0x55;
const EXIT: u8 = 0x95;

/// One eBPF instruction (kernel Documentation/bpf/instruction-set.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low nibble, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}
const _: () = assert!(size_of::<Instruction>() == 8);

fn op(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: dst | src << 4, offset, immediate }
}

/// Rules that precede those of every container, as in runc (`AllowedDevices` of
/// libcontainer/specconv): mknod of any device, the default device nodes, and net/tun, whose node
/// VPN clients with CAP_NET_ADMIN create themselves.
fn defaults() -> Vec<LinuxDeviceCgroup> {
    let rule = |typ, major: Option<i64>, minor: Option<i64>, access: &str| {
        let mut builder = LinuxDeviceCgroupBuilder::default().allow(true).typ(typ).access(access);
        if let Some(major) = major {
            builder = builder.major(major);
        }
        if let Some(minor) = minor {
            builder = builder.minor(minor);
        }
        builder.build().ok()
    };
    let c = LinuxDeviceType::C;
    [
        rule(LinuxDeviceType::C, None, None, "m"),
        rule(LinuxDeviceType::B, None, None, "m"),
        rule(c, Some(1), Some(3), "rwm"),    // null
        rule(c, Some(1), Some(5), "rwm"),    // zero
        rule(c, Some(1), Some(7), "rwm"),    // full
        rule(c, Some(1), Some(8), "rwm"),    // random
        rule(c, Some(1), Some(9), "rwm"),    // urandom
        rule(c, Some(5), Some(0), "rwm"),    // tty
        rule(c, Some(5), Some(2), "rwm"),    // ptmx
        rule(c, Some(136), None, "rwm"),     // pts
        rule(c, Some(10), Some(200), "rwm"), // net/tun
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn rule(out: &mut Vec<Instruction>, rule: &LinuxDeviceCgroup) -> Result<()> {
    let bad = |reason: String| Error::invalid("resources.devices", reason);
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BPF_DEVCG_DEV_BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(BPF_DEVCG_DEV_CHAR),
        Some(other) => return Err(bad(format!("devices of type {other:?} are not accessible"))),
    };
    let number = |value: Option<i64>, name: &str| match value {
        None => Ok(None),
        Some(value) if value < 0 => Ok(None), // -1: any
        Some(value) => i32::try_from(value).map(Some).map_err(|_| bad(format!("{name} {value}"))),
    };
    let (major, minor) = (number(rule.major(), "major")?, number(rule.minor(), "minor")?);
    let text = rule.access().as_deref().unwrap_or("rwm");
    let mut access = 0;
    for letter in text.chars() {
        access |= match letter {
            'r' => BPF_DEVCG_ACC_READ,
            'w' => BPF_DEVCG_ACC_WRITE,
            'm' => BPF_DEVCG_ACC_MKNOD,
            _ => return Err(bad(format!("access {text:?} is not made of r, w and m"))),
        };
    }
    let all = BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE | BPF_DEVCG_ACC_MKNOD;
    let mut body = Vec::new();
    let mut jumps = Vec::new();
    // Jumps to the next rule; their offsets are set below.
    let mut jump = |body: &mut Vec<Instruction>, code, register, value| {
        jumps.push(body.len());
        body.push(op(code, register, 0, 0, value));
    };
    if let Some(kind) = kind {
        jump(&mut body, JMP_JNE_K, 2, kind);
    }
    if access != all {
        if rule.allow() {
            // Matches if all requested accesses are allowed.
            body.push(op(ALU_MOV_X, 1, 3, 0, 0));
            body.push(op(ALU_AND_K, 1, 0, 0, !access & all));
            jump(&mut body, JMP_JNE_K, 1, 0);
        } else {
            // Matches if any requested access is denied.
            body.push(op(ALU_MOV_X, 1, 3, 0, 0));
            body.push(op(ALU_AND_K, 1, 0, 0, access));
            jump(&mut body, JMP_JEQ_K, 1, 0);
        }
    }
    if let Some(major) = major {
        jump(&mut body, JMP_JNE_K, 4, major);
    }
    if let Some(minor) = minor {
        jump(&mut body, JMP_JNE_K, 5, minor);
    }
    body.push(op(ALU64_MOV_K, 0, 0, 0, i32::from(rule.allow())));
    body.push(op(EXIT, 0, 0, 0, 0));
    let end = body.len();
    for at in jumps {
        body[at].offset = (end - at - 1) as i16;
    }
    // A rule without conditions ends the program: the verifier refuses unreachable instructions.
    out.extend(body);
    Ok(())
}

/// Whether a rule matches every access.
fn is_catch_all(rule: &LinuxDeviceCgroup) -> bool {
    matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && rule.major().is_none_or(|n| n < 0)
        && rule.minor().is_none_or(|n| n < 0)
        && rule
            .access()
            .as_deref()
            .is_none_or(|access| ['r', 'w', 'm'].iter().all(|letter| access.contains(*letter)))
}

fn program(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>> {
    if rules.len() > MAX_RULES {
        return Err(Error::Exhausted { what: "device rules", limit: MAX_RULES as u64 });
    }
    // struct bpf_cgroup_dev_ctx { u32 access_type: access << 16 | type; u32 major; u32 minor; }
    let mut out = vec![
        op(LDX_MEM_W, 2, 1, 0, 0),
        op(ALU_AND_K, 2, 0, 0, 0xffff),
        op(LDX_MEM_W, 3, 1, 0, 0),
        op(ALU_RSH_K, 3, 0, 0, 16),
        op(LDX_MEM_W, 4, 1, 4, 0),
        op(LDX_MEM_W, 5, 1, 8, 0),
    ];
    let defaults = defaults();
    for each in rules.iter().chain(&defaults).rev() {
        rule(&mut out, each)?;
        if is_catch_all(each) {
            return Ok(out);
        }
    }
    out.push(op(ALU64_MOV_K, 0, 0, 0, 0));
    out.push(op(EXIT, 0, 0, 0, 0));
    Ok(out)
}

/// Whether every device is allowed, so that no program is needed. An empty list allows the defaults
/// only.
fn is_open(rules: &[LinuxDeviceCgroup]) -> bool {
    rules.last().is_some_and(|rule| rule.allow() && is_catch_all(rule))
}

/// Loads the rules and attaches them to the cgroup; they are removed with it.
pub fn attach(rules: &[LinuxDeviceCgroup], cgroup: &Path) -> Result<()> {
    if is_open(rules) {
        return Ok(());
    }
    let program = load(&program(rules)?)?;
    let cgroup =
        std::fs::File::open(cgroup).context(|| "open the container's cgroup".to_owned())?;

    #[repr(C)]
    struct AttachAttr {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
        replace_bpf_fd: u32,
    }
    let attr = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    // SAFETY: the kernel reads `size_of::<AttachAttr>()` bytes of a struct that lives until the
    // call returns; both descriptors in it are open.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>())
    };
    nix::errno::Errno::result(result).context(|| "attach the device rules".to_owned())?;
    Ok(())
}

/// Maximum attempts of BPF_PROG_LOAD after EAGAIN.
const LOAD_ATTEMPTS: usize = 16;

fn load(program: &[Instruction]) -> Result<OwnedFd> {
    #[repr(C)]
    struct LoadAttr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    let license = c"Apache-2.0";
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    let attempt = || {
        // SAFETY: `insns` and `license` point to memory of the given length (NUL-terminated for the
        // license) that outlives the call; the kernel only reads.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>())
        };
        nix::errno::Errno::result(result)
    };
    // The verifier returns EAGAIN if a signal is pending (bpf(2)), such as SIGCHLD.
    let result = std::iter::repeat_with(attempt)
        .take(LOAD_ATTEMPTS)
        .find(|result| *result != Err(nix::errno::Errno::EAGAIN))
        .unwrap_or(Err(nix::errno::Errno::EAGAIN));
    let fd = result.context(|| "load the device rules".to_owned())?;
    // SAFETY: the kernel has just created this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the instructions used here.
    fn evaluate(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> i32 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i32; 11];
        let mut at = 0usize;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (dst, src) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            let jump = |taken: bool| if taken { offset as usize } else { 0 };
            match code {
                LDX_MEM_W => registers[dst] = context[offset as usize / 4],
                ALU_AND_K => registers[dst] &= immediate,
                ALU_RSH_K => registers[dst] = ((registers[dst] as u32) >> immediate) as i32,
                ALU_MOV_X => registers[dst] = registers[src],
                ALU64_MOV_K => registers[dst] = immediate,
                JMP_JNE_K => at += jump(registers[dst] != immediate),
                JMP_JEQ_K => at += jump(registers[dst] == immediate),
                EXIT => return registers[0],
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Instruction> {
        program(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
    }

    #[test]
    fn everything_is_denied_except_default_devices() {
        let program = rules(r#"[{"allow":false,"access":"rwm"}]"#);
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 6, 1, 3), 1, "null");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 6, 136, 7), 1, "a terminal");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 7, 10, 200), 1, "net/tun");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 2, 10, 229), 0, "fuse");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 2, 5, 1), 0, "the guest's console");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 1, 254, 0), 1, "mknod");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 2, 254, 0), 0, "a disk");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 2, 1, 1), 0, "memory");
    }

    #[test]
    fn the_last_matching_rule_counts_and_partial_access_is_partial() {
        let program = rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":254,"access":"rw"},
                {"allow":false,"type":"b","major":254,"minor":1,"access":"w"}]"#,
        );
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 6, 254, 0), 1);
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 2, 254, 1), 1);
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 6, 254, 1), 0);
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 6, 254, 0), 0);
    }

    #[test]
    fn an_empty_list_allows_the_default_devices_only() {
        assert!(!is_open(&[]));
        let program = rules("[]");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_CHAR, 6, 1, 3), 1, "null");
        assert_eq!(evaluate(&program, BPF_DEVCG_DEV_BLOCK, 2, 254, 0), 0, "a disk");
    }

    #[test]
    fn a_list_is_open_only_if_its_last_rule_allows_everything() {
        let open = |json: &str| is_open(&serde_json::from_str::<Vec<_>>(json).unwrap());
        assert!(open(r#"[{"allow":true,"access":"rwm"}]"#));
        assert!(!open(r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b"}]"#));
        assert!(!open(r#"[{"allow":false,"access":"rwm"}]"#));
    }

    #[test]
    fn too_many_rules_are_refused() {
        let many = vec![LinuxDeviceCgroup::default(); MAX_RULES + 1];
        assert!(matches!(program(&many), Err(Error::Exhausted { .. })));
    }
}
