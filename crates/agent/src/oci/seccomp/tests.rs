use super::*;

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = RET_ERRNO | libc::ENOSYS as u32;

/// Interprets a program on the `struct seccomp_data` of a call.
fn evaluate(program: &[libc::sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = [0u32; 16];
    (data[0], data[1]) = (nr, arch);
    for (at, arg) in args.iter().enumerate() {
        (data[4 + 2 * at], data[5 + 2 * at]) = (*arg as u32, (arg >> 32) as u32);
    }
    let (mut at, mut accumulator) = (0usize, 0u32);
    loop {
        let libc::sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            LD_W_ABS => accumulator = data[k as usize / 4],
            JMP_JA => at += k as usize,
            JMP_JEQ_K => jump(accumulator == k),
            JMP_JGT_K => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            JMP_JSET_K => jump(accumulator & k != 0),
            0x54 => accumulator &= k,
            RET_K => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

/// `statx` is the newest call in it.
const PROFILE: &str = r#"{"defaultAction":"SCMP_ACT_ERRNO",
    "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
    "syscalls":[
        {"names":["read","write","statx","no_such_call"],"action":"SCMP_ACT_ALLOW"},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
        {"names":["clone"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":0,"valueTwo":2113929216,"op":"SCMP_CMP_MASKED_EQ"}]},
        {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#;

#[test]
fn denied_calls_get_the_default_action_and_newer_calls_enosys() {
    // Without clone3, whose number is above that of statx.
    let mut profile = profile(PROFILE);
    profile.set_syscalls(profile.syscalls().clone().map(|mut rules| {
        rules.pop();
        rules
    }));
    let program = compile(&profile).unwrap();
    let native = |nr: i64| evaluate(&program, AUDIT_ARCH_X86_64, nr as u32, [0; 6]);
    assert_eq!(native(libc::SYS_read), ALLOW);
    assert_eq!(native(libc::SYS_statx), ALLOW);
    for withheld in [libc::SYS_keyctl, libc::SYS_mount, libc::SYS_bpf, libc::SYS_userfaultfd] {
        assert_eq!(native(withheld), EPERM, "{withheld}");
    }
    for newer in [libc::SYS_statx + 1, libc::SYS_pidfd_open, libc::SYS_openat2, 462, 9999] {
        assert_eq!(native(newer), ENOSYS, "{newer}");
    }
    // Of i386: keyctl 288, statx 383, mseal 462; of x32 with its bit: keyctl 250, statx 332.
    let i386 = |nr| evaluate(&program, AUDIT_ARCH_I386, nr, [0; 6]);
    assert_eq!((i386(3), i386(288), i386(383), i386(384)), (ALLOW, EPERM, ALLOW, ENOSYS));
    let x32 = |nr| evaluate(&program, AUDIT_ARCH_X86_64, X32_BIT | nr, [0; 6]);
    assert_eq!((x32(250), x32(332), x32(333)), (EPERM, ALLOW, ENOSYS));
    let arm = evaluate(&program, 0xc000_00b7, 0, [0; 6]);
    assert_eq!(arm & 0xffff_0000, 0, "a call of another architecture kills");
}

#[test]
fn conditions_and_error_codes_of_rules_hold() {
    let program = compile(&profile(PROFILE)).unwrap();
    let native =
        |nr: i64, arg| evaluate(&program, AUDIT_ARCH_X86_64, nr as u32, [arg, 0, 0, 0, 0, 0]);
    assert_eq!(native(libc::SYS_personality, 8), ALLOW);
    assert_eq!(native(libc::SYS_personality, 9), EPERM);
    assert_eq!(native(libc::SYS_personality, 1 << 32 | 8), EPERM);
    assert_eq!(native(libc::SYS_clone, libc::CLONE_VM as u64), ALLOW);
    assert_eq!(native(libc::SYS_clone, libc::CLONE_NEWUSER as u64), EPERM);
    assert_eq!(native(libc::SYS_clone3, 0), ENOSYS);
    assert_eq!(native(libc::SYS_clone3 + 1, 0), ENOSYS);
    assert_eq!(native(libc::SYS_openat2, 0), ENOSYS, "clone3 is the newest call of the profile");
    assert_eq!(native(libc::SYS_pidfd_open, 0), EPERM);
}

#[test]
fn a_default_action_that_allows_or_returns_enosys_has_no_prologue() {
    for json in [
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_LOG","syscalls":[
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"syscalls":[
            {"names":["mkdir"],"action":"SCMP_ACT_ALLOW"}]}"#,
    ] {
        assert!(prologue(&profile(json)).is_empty(), "{json}");
    }
    let killing = r#"{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[
        {"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#;
    let program = compile(&profile(killing)).unwrap();
    assert_eq!(evaluate(&program, AUDIT_ARCH_X86_64, 9999, [0; 6]), ENOSYS);
}

#[test]
fn two_conditions_on_one_argument_are_two_rules() {
    let json = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
            {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#;
    let program = compile(&profile(json)).unwrap();
    let socket = |family| {
        evaluate(&program, AUDIT_ARCH_X86_64, libc::SYS_socket as u32, [family, 0, 0, 0, 0, 0])
    };
    assert_eq!((socket(1), socket(2), socket(3)), (ALLOW, ALLOW, EPERM));
}

#[test]
fn unsupported_profiles_are_refused_by_name() {
    for (json, word) in [
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "NOTIFY"),
        (r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_ARM"]}"#, "x86-64"),
        (
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],
                "action":"SCMP_ACT_ALLOW","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            "argument 6",
        ),
    ] {
        let error = compile(&profile(json)).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn the_kernel_accepts_the_program_and_applies_it() {
    let json = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"action":"SCMP_ACT_ALLOW","names":[
        "read","write","close","mmap","munmap","mprotect","madvise","brk","futex","sched_yield",
        "sigaltstack","rt_sigprocmask","clock_gettime","getrandom","exit","exit_group","set_robust_list",
        "rseq","gettid","tgkill","getpid"]}]}"#;
    let profile = profile(json);
    let errors = std::thread::spawn(move || {
        nix::sys::prctl::set_no_new_privs().unwrap();
        Filter::compile(&profile).unwrap().load().unwrap();
        // SAFETY: neither call dereferences a pointer, as the filter denies both.
        let call = |nr| Errno::result(unsafe { libc::syscall(nr, 0, 0, 0, 0, 0) }).unwrap_err();
        (call(libc::SYS_keyctl), call(9999))
    });
    // rseq is the newest call of the profile; keyctl is older.
    assert_eq!(errors.join().unwrap(), (Errno::EPERM, Errno::ENOSYS));
}

#[test]
fn a_profile_is_compiled_once_and_few_filters_are_kept() {
    let filters = Filters::default();
    let first = profile(PROFILE);
    let filter = filters.get(&first).unwrap();
    let raw = |op: &libc::sock_filter| (op.code, op.jt, op.jf, op.k);
    let wanted: Vec<_> = compile(&first).unwrap().iter().map(raw).collect();
    assert_eq!(filter.instructions().iter().map(raw).collect::<Vec<_>>(), wanted);
    for errno in 1..=KEPT as u32 {
        let mut other = first.clone();
        other.set_default_errno_ret(Some(errno));
        filters.get(&other).unwrap();
        assert_eq!(filters.get(&other).unwrap(), Filter::compile(&other).unwrap());
    }
    let kept: Vec<_> = filters.lock().iter().map(|(known, _)| known.default_errno_ret()).collect();
    assert_eq!(kept, (1..=KEPT as u32).rev().map(Some).collect::<Vec<_>>());
    assert_eq!(filters.get(&first).unwrap(), filter);
}
