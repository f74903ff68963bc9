//! Tests of the launcher process: this program is the daemon's side and, called with `launcher`,
//! the launcher itself. Needs root and cgroup v2.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe;
use sandbox::launcher::{IdRange, Launch, Launched, LauncherProcess, Namespaces, Program};

fn main() {
    if std::env::args().nth(1).as_deref() == Some("launcher") {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        sandbox::launcher::main(socket).unwrap();
        return;
    }
    let Some(cgroup) = cgroup() else {
        println!("SKIP: launcher: needs root and cgroup v2");
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let launcher = || {
        let exe = std::env::current_exe().unwrap();
        LauncherProcess::start(vec![exe.into(), "launcher".into()]).unwrap()
    };
    let run_test = |name: &str, test: &dyn Fn(&LauncherProcess, &Path)| {
        test(&launcher(), &cgroup);
        println!("test {name} ... ok");
    };
    let launch = |launcher: &LauncherProcess, program| runtime.block_on(launcher.launch(program));

    run_test("a program starts in its cgroup and namespaces with only its descriptors", &|l, c| {
        let (read, write) = pipe().unwrap();
        let script = "echo $(ls /proc/self/fd) >&3; cat /proc/self/cgroup >&3; \
                      readlink /proc/self/ns/net >&3; cut -d' ' -f5,6 /proc/self/stat >&3";
        let _child = launch(l, program(c, &["-c", script], vec![write])).unwrap();
        let mut text = String::new();
        File::from(read).read_to_string(&mut text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        // 4 is the directory that ls reads; /proc is the host's, so the program's pid may be
        // missing.
        assert!(lines[0].starts_with("0 1 2 3 "), "{text}");
        assert!(lines[0].split_whitespace().count() <= 5, "leaked descriptors: {text}");
        let name = c.file_name().unwrap().to_str().unwrap();
        assert!(lines.iter().any(|l| l.ends_with(name)), "{text}");
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        assert!(!lines.contains(&ours.to_str().unwrap()), "{text}");
    });
    run_test("a missing program is an error with its path", &|l, c| {
        let mut missing = program(c, &[], vec![]);
        missing.exe = "/no/such/vmm".into();
        let error = launch(l, missing).unwrap_err().to_string();
        assert!(error.contains("exec of /no/such/vmm"), "{error}");
    });
    run_test("launched programs survive the launcher, which is restarted", &|l, c| {
        let first = launch(l, program(c, &["-c", "sleep 60"], vec![])).unwrap();
        kill_launchers();
        assert!(!ended(&first, Duration::from_millis(300)));
        let second = launch(l, program(c, &["-c", "exit 0"], vec![])).unwrap();
        assert!(ended(&second, Duration::from_secs(10)));
        assert!(!ended(&first, Duration::ZERO));
        fs::write(c.join("cgroup.kill"), "1").unwrap();
        assert!(ended(&first, Duration::from_secs(10)));
    });
    run_test("a user namespace is created with its maps and without processes", &|l, _| {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let uids = vec![range(0, 65_536, 1000), range(5000, 200_000, 1)];
        let make = |uids, gids| runtime.block_on(l.user_namespace(uids, gids));
        let namespace = make(uids, vec![range(0, 131_072, 65_536)]).unwrap();
        let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        let ours = fs::metadata("/proc/self/ns/user").unwrap();
        let theirs = fs::metadata(&path).unwrap();
        assert_ne!(
            std::os::unix::fs::MetadataExt::ino(&ours),
            std::os::unix::fs::MetadataExt::ino(&theirs)
        );
        let overlapping = vec![range(0, 1000, 10), range(5, 5000, 10)];
        let good = vec![range(0, 1000, 10)];
        for (uids, gids) in [(vec![], good.clone()), (overlapping, good.clone())] {
            let error = make(uids, gids).unwrap_err().to_string();
            assert!(error.contains("map"), "{error}");
        }
        // The launcher has no children left.
        let me = std::process::id();
        let launchers = fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
        for pid in launchers.split_whitespace() {
            let until = Instant::now() + Duration::from_secs(10);
            let children = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            while children().is_ok_and(|text| !text.is_empty()) {
                assert!(Instant::now() < until, "processes stay in user namespaces");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    let until = Instant::now() + Duration::from_secs(10);
    while fs::remove_dir(&cgroup).is_err() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!cgroup.exists(), "processes stay in {}", cgroup.display());
}

fn cgroup() -> Option<PathBuf> {
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|p| Path::new(p).join("cgroup.procs").exists() && is_v2(p))?;
    let path = Path::new(root).join(format!("nacelle-launcher-{}", std::process::id()));
    fs::create_dir(&path).ok()?;
    Some(path)
}

fn is_v2(path: &str) -> bool {
    use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
    statfs(path).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

fn program(cgroup: &Path, args: &[&str], fds: Vec<OwnedFd>) -> Program {
    Program {
        exe: "/bin/sh".into(),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        cgroup: File::open(cgroup).unwrap().into(),
        stderr: std::io::stderr().as_fd().try_clone_to_owned().unwrap(),
        fds,
        own: Namespaces::ALL,
    }
}

fn ended(launched: &Launched, limit: Duration) -> bool {
    let mut fds = [PollFd::new(launched.pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap() > 0
}

/// Kills the launchers among this process' children.
fn kill_launchers() {
    let me = std::process::id();
    let children = fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
    for pid in children.split_whitespace() {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.contains("launcher") {
            let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    }
}
