//! Containers from creation to removal, with the agent as an ordinary process. Disks, network
//! interfaces and cgroup limits are tested in a guest.
//!
//! Needs root, a static busybox, unshare(1), cgroup v2 in the kernel.

mod common;

use agent_api::stdio::{Kind, Status};
use agent_api::v1;
use common::{guest, spec};
use serde_json::json;

#[tokio::test]
async fn a_container_runs_and_leaves_nothing_behind() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let hello = guest.client.hello(v1::HelloRequest { protocol: 1 }).await.unwrap().into_inner();
    assert!(hello.configured && hello.protocol == 1);
    let script = "echo out; echo err >&2; echo $$ $HOSTNAME $HOME; hostname; exit 7";
    let request = guest.request("c1", &spec(script, json!({})));
    let (output, exit) = guest.run(request).await;
    assert_eq!(output, "out\n1 pod-host /root\npod-host\n");
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (7, 0, false));
    let mut stderr = guest.open(Kind::Stderr, "c1", "", 0).await;
    assert_eq!(stderr.read_all().await, b"err\n");
    guest.remove("c1").await.unwrap();
    guest.remove("c1").await.unwrap();
    assert!(matches!(
        guest.try_open(Kind::Stdout, "c1", "", 0).await.map(|_| ()),
        Err(Status::NoSuchStream)
    ));
    let list = guest.client.list_processes(v1::ListProcessesRequest {}).await.unwrap();
    assert!(list.into_inner().processes.is_empty());
    // Reuse of the id.
    let request = guest.request("c1", &spec("ls /new 2>/dev/null; touch /new", json!({})));
    assert_eq!(guest.run(request).await.0, "");
    guest.remove("c1").await.unwrap();
}

#[tokio::test]
async fn exits_are_kept_until_they_are_acknowledged() {
    let Some(mut guest) = guest().await else { return };
    for id in ["a", "b"] {
        let request = guest.request(id, &spec("exit 3", json!({})));
        guest.run(request).await;
    }
    let events = guest.events_until("b", "").await;
    assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [1, 2]);
    guest.client.ack_events(v1::AckEventsRequest { sequence: 1 }).await.unwrap();
    let events = guest.events_until("b", "").await;
    assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
    let list = guest.client.list_processes(v1::ListProcessesRequest {}).await.unwrap();
    for process in list.into_inner().processes {
        assert_eq!(process.state, v1::ProcessState::Ended as i32);
        assert_eq!(process.exit.unwrap().code, 3);
    }
}

#[tokio::test]
async fn output_survives_a_host_that_disconnects() {
    let Some(mut guest) = guest().await else { return };
    let request = guest.request("c", &spec("seq 1 200000", json!({})));
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let mut got = Vec::new();
    let mut stored = 0;
    // The host disconnects repeatedly, with less stored than it has read.
    for round in 0.. {
        let mut stream = guest.open(Kind::Stdout, "c", "", stored).await;
        got.truncate(stored as usize);
        let mut ended = false;
        // At most three reads of 64 KiB: the window is four, and rounds without acknowledgements
        // must not wait for more than it holds.
        for _ in 0..=round % 3 {
            let bytes = stream.read().await;
            ended = bytes.is_empty();
            got.extend(bytes);
            if round % 5 != 0 {
                stream.acknowledge().await;
                stored = stream.offset;
            }
        }
        if ended {
            break;
        }
    }
    let want: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(got == want.as_bytes(), "{} bytes instead of {}", got.len(), want.len());
    assert_eq!(guest.try_open(Kind::Stdout, "c", "", 1 << 40).await.err(), Some(Status::BadOffset));
    assert_eq!(guest.try_open(Kind::Stdout, "c", "", 0).await.err(), Some(Status::BadOffset));
    guest.remove("c").await.unwrap();
}

#[tokio::test]
async fn stdin_reaches_the_process_with_its_end() {
    let Some(mut guest) = guest().await else { return };
    let mut request = guest.request("c", &spec("cat; echo done", json!({})));
    (request.stdin, request.stdin_once) = (true, true);
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let mut stdin = guest.open(Kind::Stdin, "c", "", 0).await;
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    let data = "x".repeat(1_000_000);
    let writer = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        stdin.conn.write_all(data.as_bytes()).await.unwrap();
        stdin.conn.shutdown().await.unwrap();
    });
    let output = stdout.read_all().await;
    writer.await.unwrap();
    assert_eq!(output.len(), 1_000_005);
    assert!(output.ends_with(b"xdone\n"));
}

#[tokio::test]
async fn a_terminal_has_a_size_and_echoes() {
    let Some(mut guest) = guest().await else { return };
    let mut request = guest.request("c", &spec("stty size; tty; read x; echo got $x", json!({})));
    (request.tty, request.stdin) = (true, true);
    (request.tty_width, request.tty_height) = (123, 45);
    guest.create(request).await;
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    guest.start("c").await.unwrap();
    let text = stdout.read_until("/dev/pts/0").await;
    assert!(text.contains("45 123"), "{text:?}");
    let mut stdin = guest.open(Kind::Stdin, "c", "", 0).await;
    {
        use tokio::io::AsyncWriteExt;
        stdin.conn.write_all(b"hello\n").await.unwrap();
    }
    let text = stdout.read_until("got hello").await;
    assert!(text.contains("hello\r\n"), "{text:?}");
    assert_eq!(guest.exit("c", "").await.code, 0);
}

#[tokio::test]
async fn a_terminal_stays_usable_after_the_process_closed_it() {
    let Some(mut guest) = guest().await else { return };
    let script = "t=$(tty); echo early; exec </dev/null >/dev/null 2>&1; sleep 0.3; echo late >$t; \
                  exit 6";
    let mut request = guest.request("c", &spec(script, json!({})));
    request.tty = true;
    let (output, exit) = guest.run(request).await;
    assert_eq!((output.as_str(), exit.code), ("early\r\nlate\r\n", 6));
    // Same for an exec.
    let request = guest.request("d", &spec("sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("d").await.unwrap();
    let request = v1::ExecRequest {
        container_id: "d".into(),
        exec_id: "e".into(),
        oci_process: json!({"args": ["sh", "-c", script]}).to_string().into_bytes(),
        tty: true,
        ..Default::default()
    };
    guest.client.exec(request).await.unwrap();
    let output = guest.open(Kind::Stdout, "d", "e", 0).await.read_all().await;
    assert_eq!(output, b"early\r\nlate\r\n");
    assert_eq!(guest.exit("d", "e").await.code, 6);
}

#[tokio::test]
async fn execs_join_the_container_with_and_without_a_terminal() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let mut request = guest.request("c", &spec("touch /tmp/mark; sleep 1000", json!({})));
    request.user = "web".into();
    guest.create(request).await;
    assert_eq!(
        guest.exec("c", "early", json!({"args": ["true"]})).await.unwrap_err().code(),
        tonic::Code::FailedPrecondition
    );
    guest.start("c").await.unwrap();
    let script = "until [ -e /tmp/mark ]; do sleep 0.01; done; id; ps | grep -c 'sleep 1000'; \
                  echo $HOME $X; exit 5";
    guest.exec("c", "e1", json!({"args": ["sh", "-c", script], "env": ["X=y"]})).await.unwrap();
    let output = guest.open(Kind::Stdout, "c", "e1", 0).await.read_all().await;
    let text = String::from_utf8(output).unwrap();
    assert!(text.starts_with("uid=101(web) gid=102(web) groups=102(web),200(log)"), "{text}");
    assert!(text.ends_with("/home/web y\n"), "{text}");
    assert_eq!(guest.exit("c", "e1").await.code, 5);

    // The streams of a short exec without output remain after its exit was acknowledged.
    guest.exec("c", "e0", json!({"args": ["true"]})).await.unwrap();
    guest.exit("c", "e0").await;
    guest.client.ack_events(v1::AckEventsRequest { sequence: 100 }).await.unwrap();
    for kind in [Kind::Stdout, Kind::Stderr] {
        assert_eq!(guest.open(kind, "c", "e0", 0).await.read_all().await, b"");
    }

    let request = v1::ExecRequest {
        container_id: "c".into(),
        exec_id: "e2".into(),
        oci_process: br#"{"args":["sh","-c","tty; id -u; stty size"]}"#.to_vec(),
        tty: true,
        stdin: true,
        user: "0:0".into(),
        tty_width: 80,
        tty_height: 24,
    };
    guest.client.exec(request).await.unwrap();
    let output = guest.open(Kind::Stdout, "c", "e2", 0).await.read_all().await;
    let text = String::from_utf8(output).unwrap();
    assert!(text.starts_with("/dev/pts/0\r\n0\r\n"), "{text:?}");
    assert_eq!(guest.exit("c", "e2").await.code, 0);
    guest.remove("c").await.unwrap();
}

#[tokio::test]
async fn start_and_exec_report_a_program_that_cannot_run() {
    let Some(mut guest) = guest().await else { return };
    for (id, program, code, text) in [
        (
            "c1",
            "nosuch",
            tonic::Code::NotFound,
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        ("c2", "/no/such", tonic::Code::NotFound, "stat /no/such: no such file or directory"),
        ("c3", "/bin/text", tonic::Code::FailedPrecondition, "permission denied"),
        ("c4", "/etc", tonic::Code::FailedPrecondition, "is a directory"),
    ] {
        let request = guest.request(id, &spec("", json!({"process": {"args": [program]}})));
        guest.create(request).await;
        let error = guest.start(id).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(text), "{error}");
        guest.remove(id).await.unwrap();
    }
    let request = guest.request("c", &spec("sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let error = guest.exec("c", "e", json!({"args": ["nosuch"]})).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound);
    assert_eq!(error.message(), "exec: \"nosuch\": executable file not found in $PATH");
    let error = guest.exec("c", "e", json!({"args": ["ls"], "cwd": "/nosuch"})).await.unwrap_err();
    assert!(error.message().contains("/nosuch"), "{error}");
    guest.exec("c", "e", json!({"args": ["true"]})).await.unwrap();
    assert_eq!(guest.exit("c", "e").await.code, 0);
}

#[tokio::test]
async fn containers_share_pid_namespaces_as_requested() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let script = "sleep 2000 & echo $$; exec sleep 1000";
    let mut pids = Vec::new();
    for id in ["a", "b"] {
        let mut request = guest.request(id, &spec(script, json!({})));
        request.pid_mode = v1::PidMode::Pod as i32;
        guest.create(request).await;
        guest.start(id).await.unwrap();
        let mut stdout = guest.open(Kind::Stdout, id, "", 0).await;
        pids.push(stdout.read_until("\n").await);
    }
    assert!(pids[0] != pids[1] && pids[0] != "1\n", "{pids:?}");
    let script = "ps; kill -9 $(ps | grep 'sleep [1]000' | awk '{print $1}')";
    let mut request = guest.request("t", &spec(script, json!({})));
    (request.pid_mode, request.pid_target) = (v1::PidMode::Target as i32, "a".into());
    let (output, _) = guest.run(request).await;
    assert_eq!(output.matches("sleep 1000").count(), 2, "{output}");
    assert_eq!(output.matches("sleep 2000").count(), 2, "{output}");
    for id in ["a", "b"] {
        assert_eq!(guest.exit(id, "").await.code, 137);
    }
    // The exit of init ends all other processes also in a shared namespace.
    let script = "while ps | grep -q 'sleep [2]000'; do sleep 0.01; done; echo gone";
    let mut request = guest.request("u", &spec(script, json!({})));
    request.pid_mode = v1::PidMode::Pod as i32;
    assert_eq!(guest.run(request).await.0, "gone\n");
    for id in ["a", "b", "t", "u"] {
        guest.remove(id).await.unwrap();
    }
}

#[tokio::test]
async fn an_unprivileged_container_is_confined() {
    let Some(mut guest) = guest().await else { return };
    let script = "grep -E 'CapBnd|CapEff|NoNewPrivs|Seccomp:|SigIgn|SigBlk' /proc/self/status; \
                  touch /x 2>&1; cat /proc/kcore | wc -c; echo 1 > /proc/sys/kernel/panic; \
                  mkdir /dir 2>&1; ulimit -n; cat /proc/self/oom_score_adj; ls /dev | tr '\\n' ' '; \
                  echo again > /dev/stdout; pwd";
    let extra = json!({
        "process": {
            "noNewPrivileges": true, "oomScoreAdj": 500, "cwd": "/made/here",
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 77}],
        },
        "linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        }},
    });
    let spec = spec(script, extra);
    let mut request = guest.request("c", &spec);
    request.user = "101".into();
    request.rootfs.as_mut().unwrap().read_only = true;
    let (output, _) = guest.run(request).await;
    // No signal disposition of the agent is inherited. 32 and 33 are reserved by the C library and
    // may be ignored by the caller of the tests.
    let field = |name: &str| {
        let value = output.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(value.trim(), 16).unwrap()
    };
    assert_eq!((field("SigIgn:") & !(3 << 31), field("SigBlk:")), (0, 0));
    for text in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000000000e0",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "touch: /x: Read-only file system",
        "\n0\n",
        "not supported",
        "\n77\n",
        "\n500\n",
        "full mqueue null",
        "again\n/made/here\n",
    ] {
        assert!(output.contains(text), "{text:?} is not in {output}");
    }
    // Same for an exec.
    let mut request = guest.request("d", &common::spec("sleep 1000", json!({})));
    request.oci_spec = {
        let mut spec = spec;
        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec.to_string().into_bytes()
    };
    guest.create(request).await;
    guest.start("d").await.unwrap();
    let script = "mkdir /dir 2>&1; grep -E 'NoNewPrivs|Seccomp:|CapBnd' /proc/self/status; pwd";
    guest.exec("d", "e", json!({"args": ["sh", "-c", script]})).await.unwrap();
    let output = guest.open(Kind::Stdout, "d", "e", 0).await.read_all().await;
    let output = String::from_utf8(output).unwrap();
    for text in ["not supported", "NoNewPrivs:\t1", "Seccomp:\t2", "00e0", "/made/here"] {
        assert!(output.contains(text), "{text:?} is not in {output}");
    }
}

#[tokio::test]
async fn a_filter_needs_to_allow_only_the_calls_of_the_program() {
    let Some(mut guest) = guest().await else { return };
    let allowed = [
        "arch_prctl",
        "brk",
        "clock_nanosleep",
        "execve",
        "exit_group",
        "getegid",
        "geteuid",
        "getgid",
        "getrandom",
        "getuid",
        "mprotect",
        "nanosleep",
        "prctl",
        "prlimit64",
        "readlink",
        "rseq",
        "set_robust_list",
        "set_tid_address",
        "write",
    ];
    let with = |args: &[&str]| {
        let extra = json!({
            "process": {"noNewPrivileges": true, "args": args},
            "linux": {"seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}],
            }},
        });
        spec("", extra)
    };
    let request = guest.request("c", &with(&["echo", "allowed"]));
    let (output, exit) = guest.run(request).await;
    assert_eq!((output.as_str(), exit.code), ("allowed\n", 0));
    let request = guest.request("d", &with(&["sleep", "1000"]));
    guest.create(request).await;
    guest.start("d").await.unwrap();
    guest.exec("d", "e", json!({"args": ["echo", "too"]})).await.unwrap();
    assert_eq!(guest.open(Kind::Stdout, "d", "e", 0).await.read_all().await, b"too\n");
    // The filter is active: mkdir fails.
    guest.exec("d", "f", json!({"args": ["mkdir", "/tmp/x"]})).await.unwrap();
    assert_eq!(guest.exit("d", "f").await.code, 1);
    let error = guest.exec("d", "g", json!({"args": ["nosuch"]})).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn a_seccomp_filter_works_without_no_new_privs() {
    let Some(mut guest) = guest().await else { return };
    let extra = json!({
        "process": {"noNewPrivileges": false},
        "linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
        }},
    });
    let spec = spec("mkdir /dir 2>&1; grep Seccomp: /proc/self/status; sleep 1000", extra);
    let mut request = guest.request("c", &spec);
    request.user = "web".into();
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    let text = stdout.read_until("Seccomp:").await;
    assert!(text.contains("Operation not permitted"), "{text}");
    guest.exec("c", "e", json!({"args": ["mkdir", "/tmp/x"]})).await.unwrap();
    assert_eq!(guest.exit("c", "e").await.code, 1);
}

#[tokio::test]
async fn volumes_are_mounted_and_can_change_while_the_container_runs() {
    let Some(mut guest) = guest().await else { return };
    let file = |path: &str, content: &str| v1::VolumeFile {
        path: path.into(),
        mode: 0o100_644,
        content: content.into(),
        ..Default::default()
    };
    let write = |id: &str, files, swap| v1::WriteVolumeRequest {
        volume_id: id.into(),
        files,
        swap,
        ..Default::default()
    };
    guest
        .client
        .write_volume(write("pod", vec![file("hosts", "127.0.0.1 x\n")], false))
        .await
        .unwrap();
    guest.client.write_volume(write("c.cfg", vec![file("key", "one")], true)).await.unwrap();
    let script = "cat /etc/hosts /cfg/key; echo w > /data/f; echo w > /cfg/f; \
                  until grep -q two /cfg/key; do sleep 0.01; done; cat /cfg/key; \
                  echo shm > /dev/shm/s";
    let mut request = guest.request("c", &spec(script, json!({})));
    let volume = |id: &str, destination: &str, sub_path: &str, read_only| v1::VolumeMount {
        volume_id: id.into(),
        destination: destination.into(),
        sub_path: sub_path.into(),
        read_only,
        ..Default::default()
    };
    request.volumes = vec![
        volume("pod", "/etc/hosts", "hosts", true),
        volume("c.cfg", "/cfg", "", true),
        volume("empty", "/data", "", false),
    ];
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    let text = stdout.read_until("one").await;
    assert!(text.starts_with("127.0.0.1 x\n"), "{text}");
    guest.client.write_volume(write("c.cfg", vec![file("key", "two")], true)).await.unwrap();
    stdout.read_until("two").await;
    let mut stderr = guest.open(Kind::Stderr, "c", "", 0).await;
    let errors = String::from_utf8(stderr.read_all().await).unwrap();
    assert_eq!(errors, "sh: can't create /cfg/f: Read-only file system\n");
    guest.exit("c", "").await;
    guest.remove("c").await.unwrap();
    let mut request = guest.request("d", &spec("cat /data/f /dev/shm/s", json!({})));
    request.volumes = vec![volume("empty", "/data", "", false)];
    assert_eq!(guest.run(request).await.0, "w\nshm\n");
}

#[tokio::test]
async fn an_exec_in_an_exiting_container_fails_with_not_running() {
    let Some(mut guest) = guest().await else { return };
    for round in 0..10 {
        let id = format!("c{round}");
        let request = guest.request(&id, &spec("read x", json!({})));
        guest.create(v1::CreateContainerRequest { stdin: true, ..request }).await;
        guest.start(&id).await.unwrap();
        drop(guest.open(Kind::Stdin, &id, "", 0).await);
        let mut client = guest.client.clone();
        let signal =
            v1::SignalProcessRequest { container_id: id.clone(), signal: 9, ..Default::default() };
        let killed = async { client.signal_process(signal).await.map(drop) };
        let started = guest.exec(&id, "e", json!({"args": ["true"]}));
        let (_, started) = tokio::join!(killed, started);
        if let Err(error) = started {
            assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
        }
        guest.exit(&id, "").await;
        let error = guest.exec(&id, "f", json!({"args": ["true"]})).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(error.message().contains("is not running"), "{error}");
    }
}

#[tokio::test]
async fn statistics_count_processes_threads_and_files() {
    let Some(mut guest) = guest().await else { return };
    let script = "sleep 1000 & exec 7</dev/null 8</dev/null; nc -l -p 7009 & sleep 0.2; \
                  echo ready; wait";
    let extra = json!({"process": {
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
    }});
    let request = guest.request("c", &spec(script, extra));
    guest.create(request).await;
    let created = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    assert_eq!(created.containers[0].started_unix_ns, 0);
    guest.start("c").await.unwrap();
    guest.open(Kind::Stdout, "c", "", 0).await.read_until("ready").await;
    let reply = guest.client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    let own = &reply.containers[0];
    let processes = own.processes.unwrap();
    assert_eq!((processes.processes, processes.sockets), (3, 1), "{processes:?}");
    assert!(processes.threads >= 3, "{processes:?}");
    // Three standard streams for each process, and the script's own.
    assert!((11..=20).contains(&processes.file_descriptors), "{processes:?}");
    assert_eq!(processes.ulimit_soft_nofile, 100);
    let age = reply.unix_time_ns - own.started_unix_ns;
    assert!(own.started_unix_ns > 0 && (0..60_000_000_000).contains(&age), "{age}");
    assert_eq!(own.oom_events, 0);
}

#[tokio::test]
async fn signals_reach_one_process_or_all() {
    let Some(mut guest) = guest().await else { return };
    let script = "trap 'echo caught; exit 9' TERM; sleep 1000 & echo ready; wait";
    let request = guest.request("c", &spec(script, json!({})));
    guest.create(request).await;
    guest.start("c").await.unwrap();
    let mut stdout = guest.open(Kind::Stdout, "c", "", 0).await;
    stdout.read_until("ready").await;
    let signal = |signal, all| v1::SignalProcessRequest {
        container_id: "c".into(),
        signal,
        all,
        ..Default::default()
    };
    guest.client.signal_process(signal(15, false)).await.unwrap();
    stdout.read_until("caught").await;
    assert_eq!(guest.exit("c", "").await.code, 9);
    let error = guest.client.signal_process(signal(15, false)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    guest.remove("c").await.unwrap();
    let request = guest.request("c", &spec("sleep 1000 & wait", json!({})));
    guest.create(request).await;
    guest.start("c").await.unwrap();
    guest.client.ack_events(v1::AckEventsRequest { sequence: 100 }).await.unwrap();
    guest.client.signal_process(signal(9, true)).await.unwrap();
    let exit = guest.exit("c", "").await;
    assert_eq!((exit.code, exit.signal), (137, 9));
    // Real-time signals.
    let request = guest.request("d", &spec("exec sleep 1000", json!({})));
    guest.create(request).await;
    guest.start("d").await.unwrap();
    guest.exec("d", "e", json!({"args": ["sleep", "1000"]})).await.unwrap();
    let request = v1::SignalProcessRequest {
        container_id: "d".into(),
        exec_id: "e".into(),
        signal: 37,
        all: false,
        await_handler: false,
    };
    guest.client.signal_process(request).await.unwrap();
    let exit = guest.exit("d", "e").await;
    assert_eq!((exit.code, exit.signal), (165, 37));
}

#[tokio::test]
async fn bad_requests_are_refused_and_leave_nothing_behind() {
    let Some(mut guest) = guest().await else { return };
    let good = guest.request("c", &spec("sleep 1000", json!({})));
    let with = |change: fn(&mut v1::CreateContainerRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    use tonic::Code;
    for (request, code) in [
        (with(|r| r.container_id = "../x".into()), Code::InvalidArgument),
        (with(|r| r.oci_spec = b"{".to_vec()), Code::InvalidArgument),
        (with(|r| r.rootfs = None), Code::InvalidArgument),
        (with(|r| r.user = "nosuch".into()), Code::InvalidArgument),
        (with(|r| r.rootfs.as_mut().unwrap().lower_serial = "none".into()), Code::NotFound),
        (with(|r| r.rootfs.as_mut().unwrap().upper_serial = "none".into()), Code::NotFound),
        (with(|r| r.pid_mode = 77), Code::InvalidArgument),
        (
            with(|r| (r.pid_mode, r.pid_target) = (v1::PidMode::Target as i32, "x".into())),
            Code::NotFound,
        ),
    ] {
        let error = guest.client.create_container(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    let leftovers = || {
        let text = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        text.lines().filter(|line| line.contains("/run/nacelle/")).count()
    };
    assert_eq!(leftovers(), 0, "the agent has a mount namespace of its own");
    guest.create(good.clone()).await;
    let error = guest.client.create_container(good).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    // A container that was created but never started can be removed.
    guest.remove("c").await.unwrap();
    for id in ["c", ""] {
        assert_eq!(guest.start(id).await.unwrap_err().code(), Code::NotFound);
    }
}

#[tokio::test]
async fn many_concurrent_containers_and_execs_keep_their_streams_apart() {
    let Some(guest) = guest().await else { return };
    let guest = std::sync::Arc::new(guest);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..8 {
        let guest = guest.clone();
        tasks.spawn(async move {
            let mut client = guest.client.clone();
            let id = format!("c{n}");
            let request = guest.request(&id, &spec("sleep 1000", json!({})));
            client.create_container(request).await.unwrap();
            let start = v1::StartContainerRequest { container_id: id.clone() };
            client.start_container(start).await.unwrap();
            let mut execs = tokio::task::JoinSet::new();
            for m in 0..8 {
                let (guest, id) = (guest.clone(), id.clone());
                execs.spawn(async move {
                    let script =
                        format!("i=0; while [ $i -lt 2000 ]; do echo {n}.{m}; i=$((i+1)); done");
                    let process = json!({"args": ["sh", "-c", script]});
                    let request = v1::ExecRequest {
                        container_id: id.clone(),
                        exec_id: format!("e{m}"),
                        oci_process: process.to_string().into_bytes(),
                        ..Default::default()
                    };
                    guest.client.clone().exec(request).await.unwrap();
                    let mut stdout = guest.open(Kind::Stdout, &id, &format!("e{m}"), 0).await;
                    let output = String::from_utf8(stdout.read_all().await).unwrap();
                    assert_eq!(output, format!("{n}.{m}\n").repeat(2000));
                });
            }
            execs.join_all().await;
            let remove = v1::RemoveContainerRequest { container_id: id };
            client.remove_container(remove).await.unwrap();
        });
    }
    tasks.join_all().await;
    let mut client = guest.client.clone();
    let mut events = client.events(v1::EventsRequest {}).await.unwrap().into_inner();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 8 * 9 {
        let next = tokio::time::timeout(common::TIMEOUT, events.message());
        let event = next.await.expect("an exit is missing").unwrap().unwrap();
        let Some(v1::event::Event::Exit(exit)) = event.event else { continue };
        let code = if exit.exec_id.is_empty() { 137 } else { 0 };
        assert_eq!(exit.code, code, "{exit:?}");
        assert!(seen.insert((exit.container_id, exit.exec_id)), "reported twice");
    }
}
