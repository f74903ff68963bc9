//! A hung file system in one container does not affect others.
//!
//! Needs root, a static busybox, unshare(1), cgroup v2 in the kernel, /dev/fuse.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use agent_api::v1;
use common::{Guest, guest, spec};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::json;

/// Timeout for calls that do not access the hung file system.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Mounts a FUSE file system without a server over a directory of a container; it hangs until the
/// returned file is dropped. Prints SKIP and returns None without FUSE.
fn hang(guest: &Guest, pid: u32, dir: &'static str) -> Option<File> {
    let Ok(fuse) = File::options().read(true).write(true).open("/dev/fuse") else {
        println!("SKIP: no /dev/fuse");
        return None;
    };
    // `pid` is in the agent's PID namespace.
    let agent = guest.agent_pid();
    let namespace = File::open(format!("/proc/{agent}/root/proc/{pid}/ns/mnt")).unwrap();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    let mounting = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
        mount(Some("hung"), dir, Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
    });
    mounting.join().unwrap();
    Some(fuse)
}

fn as_user(id: &str, exec_id: &str) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        oci_process: json!({"args": ["true"]}).to_string().into_bytes(),
        user: "web".into(),
        ..Default::default()
    }
}

async fn within_timeout<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(TIMEOUT, work).await;
    done.unwrap_or_else(|_| panic!("{what}: waits for another container's file system"))
}

#[tokio::test]
async fn a_hung_etc_fails_execs_at_their_deadline_and_blocks_no_other_container() {
    let Some(mut guest) = guest().await else { return };
    guest.configure().await;
    let mut pid = 0;
    for id in ["free", "hung"] {
        let request = guest.request(id, &spec("sleep 1000", json!({})));
        pid = guest.create(request).await;
        guest.start(id).await.unwrap();
    }
    let Some(fuse) = hang(&guest, pid, "/etc") else { return };
    let start = Instant::now();
    // Enough to use up a pool that all containers would share.
    let waiting: Vec<_> = (0..12)
        .map(|n| {
            let mut client = guest.client.clone();
            tokio::spawn(async move { client.exec(as_user("hung", &format!("h{n}"))).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;

    for n in 0..3 {
        let exec_id = format!("f{n}");
        let hello = guest.client.hello(v1::HelloRequest { protocol: 1 });
        within_timeout("ping", hello).await.unwrap();
        let mut client = guest.client.clone();
        within_timeout("exec", client.exec(as_user("free", &exec_id))).await.unwrap();
        assert_eq!(within_timeout("exit", guest.exit("free", &exec_id)).await.code, 0);
    }
    let request = guest.request("new", &spec("echo new", json!({})));
    let (output, exit) = within_timeout("a new container", guest.run(request)).await;
    assert_eq!((output.as_str(), exit.code), ("new\n", 0));
    within_timeout("removal", guest.remove("new")).await.unwrap();
    let stats =
        within_timeout("statistics", guest.client.stats(v1::StatsRequest {})).await.unwrap();
    assert_eq!(stats.into_inner().containers.len(), 2);
    // An exec without a user needs no lookup.
    let exec = guest.exec("hung", "plain", json!({"args": ["true"]}));
    within_timeout("exec without a user", exec).await.unwrap();
    assert_eq!(within_timeout("exit", guest.exit("hung", "plain")).await.code, 0);
    assert!(!waiting.iter().any(tokio::task::JoinHandle::is_finished), "no exec hangs");

    for exec in waiting {
        let error = exec.await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
        let text = "container hung: read the user database in /etc";
        assert!(error.message().contains(text), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // All threads hang now: the next call fails at once.
    let error =
        within_timeout("exec", guest.client.exec(as_user("hung", "late"))).await.unwrap_err();
    assert!(error.message().contains("does not answer"), "{error}");
    within_timeout("removal", guest.remove("hung")).await.unwrap();
    drop(fuse);
    within_timeout("removal", guest.remove("free")).await.unwrap();
}

#[tokio::test]
async fn an_exec_waiting_for_a_file_system_fails_when_its_container_exits() {
    let Some(mut guest) = guest().await else { return };
    let request = guest.request("hung", &spec("sleep 1000", json!({})));
    let pid = guest.create(request).await;
    guest.start("hung").await.unwrap();
    let Some(_fuse) = hang(&guest, pid, "/etc") else { return };
    let mut client = guest.client.clone();
    let exec = tokio::spawn(async move { client.exec(as_user("hung", "e")).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let kill =
        v1::SignalProcessRequest { container_id: "hung".into(), signal: 9, ..Default::default() };
    guest.client.signal_process(kill).await.unwrap();
    let error = within_timeout("exec", exec).await.unwrap().unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    within_timeout("removal", guest.remove("hung")).await.unwrap();
}

#[tokio::test]
async fn a_hung_working_directory_blocks_no_other_container() {
    let Some(mut guest) = guest().await else { return };
    let mut pid = 0;
    for id in ["free", "hung"] {
        let request = guest.request(id, &spec("sleep 1000", json!({})));
        pid = guest.create(request).await;
        guest.start(id).await.unwrap();
    }
    let Some(_fuse) = hang(&guest, pid, "/etc") else { return };
    let mut client = guest.client.clone();
    let exec = tokio::spawn(async move {
        let process = json!({"args": ["true"], "cwd": "/etc/deep"}).to_string().into_bytes();
        let request =
            v1::ExecRequest { user: String::new(), oci_process: process, ..as_user("hung", "e") };
        client.exec(request).await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    within_timeout("exec", guest.client.exec(as_user("free", "f"))).await.unwrap();
    assert_eq!(within_timeout("exit", guest.exit("free", "f")).await.code, 0);
    assert!(!exec.is_finished());
    let error = exec.await.unwrap().unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    within_timeout("removal", guest.remove("hung")).await.unwrap();
}

/// A volume from the share.
fn share(id: &str) -> v1::VolumeMount {
    v1::VolumeMount {
        volume_id: id.into(),
        destination: "/data".into(),
        source: v1::VolumeSource::Share as i32,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_hung_share_fails_creates_at_their_deadline_and_blocks_no_other_container() {
    let Some(mut guest) = guest().await else { return };
    let shares = guest.dir.path().join("shares");
    std::fs::create_dir_all(shares.join("bad/hung")).unwrap();
    std::fs::create_dir_all(shares.join("good")).unwrap();
    let mut request = guest.request("free", &spec("sleep 1000", json!({})));
    request.volumes = vec![share("good")];
    guest.create(request).await;
    guest.start("free").await.unwrap();
    // In the agent's mount namespace, where the share is mounted.
    let Some(_fuse) = hang(&guest, 1, "/run/nacelle/shares/bad/hung") else { return };
    let cwd = json!({"process": {"cwd": "/data/hung/deep"}});
    let mut in_cwd = guest.request("cwd", &spec("true", cwd));
    in_cwd.volumes = vec![share("bad")];
    let mut in_sub_path = guest.request("sub", &spec("true", json!({})));
    in_sub_path.volumes = vec![v1::VolumeMount { sub_path: "hung/deep".into(), ..share("bad") }];
    let creates: Vec<_> = [in_cwd, in_sub_path]
        .into_iter()
        .map(|request| {
            let mut client = guest.client.clone();
            tokio::spawn(async move { client.create_container(request).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;

    within_timeout("ping", guest.client.hello(v1::HelloRequest { protocol: 1 })).await.unwrap();
    within_timeout("exec", guest.client.exec(as_user("free", "f"))).await.unwrap();
    assert_eq!(within_timeout("exit", guest.exit("free", "f")).await.code, 0);
    let mut request = guest.request("new", &spec("echo new > /data/new", json!({})));
    request.volumes = vec![share("good")];
    assert_eq!(within_timeout("a new container", guest.run(request)).await.1.code, 0);
    assert!(!creates.iter().any(tokio::task::JoinHandle::is_finished), "no create hangs");

    for create in creates {
        let error = create.await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    }
    // Only the threads remain.
    let mounts = format!("/proc/{}/mounts", guest.agent_pid());
    let mounts = std::fs::read_to_string(mounts).unwrap();
    for id in ["cwd", "sub"] {
        assert!(!mounts.contains(&format!("/binds/{id}/")), "{mounts}");
        assert!(!mounts.contains(&format!("/containers/{id}/")), "{mounts}");
        within_timeout("removal", guest.remove(id)).await.unwrap();
    }
}
