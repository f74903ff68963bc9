//! GC of CNI 1.1: the list of valid attachments and the conditions. Shell scripts act as plugins.
//! Needs root and iproute2.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{GOOD, Host, conflist, json, on_a_host, pod, text};
use network::{Cni, Config};
use serde_json::json;

fn gc_attachments(host: &Host) -> Vec<String> {
    let stdin = json(host, "stdin.GC");
    assert_eq!(stdin["cni.dev/valid-attachments"], stdin["cni.dev/attachments"]);
    let attachments = stdin["cni.dev/valid-attachments"].as_array().unwrap();
    attachments
        .iter()
        .map(|a| {
            assert_eq!(a["ifname"], "eth0");
            a["containerID"].as_str().unwrap().to_owned()
        })
        .collect()
}

fn collect(host: &Host, cni: &Cni, known: &[&str]) -> Result<(), network::Error> {
    let known: Vec<String> = known.iter().map(|k| (*k).to_owned()).collect();
    host.runtime.block_on(cni.collect(&known))
}

#[test]
fn plugins_get_every_pod_that_may_exist() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.1.0", &["good"]));
        let before = host.cni();
        for id in ["p1", "p2", "p3"] {
            host.runtime.block_on(before.attach(pod(id))).unwrap();
        }
        // A damaged record counts as a pod.
        fs::write(host.path("cache/attachments/p2.json"), "{").unwrap();
        // So does a pod of another runtime on the same network, but not one of another network.
        for network in ["test", "other"] {
            let cached = json!({"kind":"cniCacheV1","containerId":format!("c-{network}"),
                "ifName":"eth0","networkName":network});
            let path = host.path(&format!("results/{network}-c-eth0"));
            fs::write(path, cached.to_string()).unwrap();
        }
        let after = host.cni();
        host.runtime.block_on(after.attach(pod("p4"))).unwrap();
        host.clear_log();
        collect(host, &after, &["p1", "p2"]).unwrap();
        let log = host.log();
        assert!(log.contains("DEL p3") && log.contains("\nGC"), "{log}");
        assert!(log.find("DEL p3") < log.find("GC"), "{log}");
        assert_eq!(gc_attachments(host), ["c-test", "p1", "p2", "p4"]);
        // If other runtimes' pods cannot be determined, nothing is freed.
        fs::write(host.path("results/test-c2-eth0"), "{").unwrap();
        host.clear_log();
        let error = collect(host, &after, &["p1", "p2"]).unwrap_err();
        assert!(text(&error).contains("test-c2-eth0 cannot be read"), "{}", text(&error));
        assert_eq!(host.log(), "");
        for id in ["p1", "p2", "p4"] {
            host.runtime.block_on(after.detach(id)).unwrap();
        }
        host.nothing_left();
    });
}

#[test]
fn gc_is_not_run_for_older_networks_or_with_disable_gc() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        let cni = Cni::new(Config { gc_interval_ms: 0, ..host.config() });
        let new = conflist("1.1.0", &["good"]);
        let forbidden = new.replace("\"name\"", "\"disableGC\":true,\"name\"");
        for list in [conflist("1.0.0", &["good"]), forbidden] {
            host.conflist(&list);
            host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
            collect(host, &cni, &["p1"]).unwrap();
            host.runtime.block_on(cni.detach("p1")).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            assert!(!host.log().contains("GC"), "{}", host.log());
        }
        host.nothing_left();
    });
}

#[test]
fn a_detach_is_followed_by_gc_with_a_minimum_interval() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.1.0", &["good"]));
        let rare = host.cni();
        let always = Cni::new(Config { gc_interval_ms: 0, ..host.config() });
        for id in ["p1", "p2", "p3"] {
            host.runtime.block_on(rare.attach(pod(id))).unwrap();
        }
        host.runtime.block_on(rare.detach("p1")).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(!host.log().contains("GC"), "{}", host.log());
        host.runtime.block_on(always.detach("p2")).unwrap();
        let started = Instant::now();
        let whole = |text: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&text).is_ok();
        while !fs::read(host.path("stdin.GC")).is_ok_and(whole) {
            assert!(started.elapsed() < Duration::from_secs(10), "{}", host.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(gc_attachments(host), ["p3"]);
        host.runtime.block_on(rare.detach("p3")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn no_add_or_del_runs_during_gc() {
    on_a_host(|host| {
        let note = r#"echo "$CNI_COMMAND end" >> $(dirname "$0")/../log"#;
        let slow = format!(
            "[ $CNI_COMMAND = GC ] && {{ echo GC begin >> $(dirname $0)/../log; sleep 1; {note}; \
             exit 0; }}\n[ $CNI_COMMAND = ADD ] && {{ echo ADD begin >> $(dirname $0)/../log; \
             sleep 0.3; }}\n{GOOD}\n[ $CNI_COMMAND = ADD ] && {note}; exit 0"
        );
        host.plugin("good", &slow.replace("exit 0;;\nVERSION", ";;\nVERSION"));
        host.conflist(&conflist("1.1.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(async {
            let tasks: Vec<_> = (0..3)
                .map(|n| {
                    let cni = cni.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_millis(150 * n)).await;
                        cni.attach(pod(&format!("p{n}"))).await.unwrap();
                    })
                })
                .collect();
            tokio::time::sleep(Duration::from_millis(200)).await;
            cni.collect(&[]).await.unwrap();
            for task in tasks {
                task.await.unwrap();
            }
        });
        let log = host.log();
        let mut running = 0;
        let mut collecting = false;
        for line in log.lines() {
            match line {
                "GC begin" => {
                    assert_eq!(running, 0, "{log}");
                    collecting = true;
                }
                "GC end" => collecting = false,
                "ADD begin" => {
                    assert!(!collecting, "{log}");
                    running += 1;
                }
                "ADD end" => running -= 1,
                _ => {}
            }
        }
        assert!(log.contains("GC end") && log.matches("ADD end").count() == 3, "{log}");
        for n in 0..3 {
            host.runtime.block_on(cni.detach(&format!("p{n}"))).unwrap();
        }
        host.nothing_left();
    });
}

/// Files of libcni's cache directory.
fn cached(host: &Host) -> Vec<String> {
    host.names("results").into_iter().filter(|name| name.starts_with("test-")).collect()
}

#[test]
fn the_cache_file_of_a_pod_exists_from_before_add_until_after_del() {
    on_a_host(|host| {
        let look = r#"ls $(dirname "$0")/../results > $(dirname "$0")/../seen.$CNI_COMMAND"#;
        host.plugin("good", &format!("{look}\n{GOOD}"));
        host.conflist(&conflist("1.1.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        assert_eq!(cached(host), ["test-p1-eth0"]);
        let entry = json(host, "results/test-p1-eth0");
        assert_eq!(entry["kind"], "cniCacheV1");
        assert_eq!(entry["containerId"], "p1");
        assert_eq!(entry["netns"], host.path("netns/nacelle-p1").display().to_string());
        assert_eq!(entry["result"]["ips"][0]["address"], "10.9.0.5/24");
        let seen = |verb: &str| fs::read_to_string(host.path(&format!("seen.{verb}"))).unwrap();
        assert_eq!(seen("ADD"), "test-p1-eth0\n");
        host.runtime.block_on(cni.detach("p1")).unwrap();
        assert_eq!(seen("DEL"), "test-p1-eth0\n");
        assert_eq!(cached(host), Vec::<String>::new());

        // A pod of an earlier release has a record but no cache file.
        host.runtime.block_on(cni.attach(pod("p2"))).unwrap();
        fs::remove_file(host.path("results/test-p2-eth0")).unwrap();
        collect(host, &host.cni(), &["p2"]).unwrap();
        assert_eq!(cached(host), ["test-p2-eth0"]);
        // The cache file of a pod with a damaged record is removed at detach.
        fs::write(host.path("cache/attachments/p2.json"), "{").unwrap();
        host.runtime.block_on(cni.detach("p2")).unwrap();
        assert_eq!(cached(host), Vec::<String>::new());

        // A failed attach removes its cache file.
        host.plugin("good", "[ $CNI_COMMAND = ADD ] && exit 1; exit 0");
        host.runtime.block_on(cni.attach(pod("p3"))).unwrap_err();
        assert_eq!(cached(host), Vec::<String>::new());
        host.nothing_left();
    });
}

/// Runs the runtime's tasks for some time.
fn drive(host: &Host, time: Duration) {
    host.runtime.block_on(async { tokio::time::sleep(time).await });
}

/// Waits for a line in the plugins' log.
fn wait_for(host: &Host, line: &str) {
    let started = Instant::now();
    while !host.log().lines().any(|l| l.starts_with(line)) {
        assert!(started.elapsed() < Duration::from_secs(30), "no {line:?}: {}", host.log());
        drive(host, Duration::from_millis(20));
    }
}

#[test]
fn a_hanging_add_and_a_waiting_gc_block_no_other_pod() {
    on_a_host(|host| {
        let hang = "[ $CNI_COMMAND$CNI_CONTAINERID = ADDhung ] && { \
                    echo hangs >> $(dirname $0)/../log; sleep 600; }";
        host.plugin("good", &format!("{hang}\n{GOOD}"));
        host.conflist(&conflist("1.1.0", &["good"]));
        let cni = Cni::new(Config { plugin_timeout_ms: 15_000, ..host.config() });
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        let hung = host.runtime.spawn({
            let cni = cni.clone();
            async move { cni.attach(pod("hung")).await }
        });
        drive(host, Duration::from_millis(10));
        wait_for(host, "hangs");
        let collection = host.runtime.spawn({
            let cni = cni.clone();
            async move { cni.collect(&["p1".into(), "hung".into()]).await }
        });
        // The GC waits now.
        drive(host, Duration::from_millis(500));
        let started = Instant::now();
        host.runtime.block_on(async {
            cni.attach(pod("p2")).await.unwrap();
            cni.detach("p1").await.unwrap();
            cni.detach("p2").await.unwrap();
        });
        let took = started.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}");
        let error = host.runtime.block_on(hung).unwrap().unwrap_err();
        assert!(text(&error).contains("15000 ms"), "{}", text(&error));
        host.runtime.block_on(collection).unwrap().unwrap();
        // The GC is retried.
        wait_for(host, "GC");
        host.nothing_left();
    });
}

#[test]
fn a_hanging_gc_is_stopped_for_a_pod_and_retried() {
    on_a_host(|host| {
        let hang = "[ $CNI_COMMAND = GC ] && { echo GC $$ >> $(dirname $0)/../log; sleep 600; }";
        host.plugin("good", &format!("{hang}\n{GOOD}"));
        host.conflist(&conflist("1.1.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        let collection = host.runtime.spawn({
            let cni = cni.clone();
            async move { cni.collect(&["p1".into()]).await }
        });
        drive(host, Duration::from_millis(10));
        wait_for(host, "GC");
        let started = Instant::now();
        host.runtime.block_on(async {
            cni.attach(pod("p2")).await.unwrap();
            cni.detach("p1").await.unwrap();
        });
        let took = started.elapsed();
        assert!(took < Duration::from_secs(12), "{took:?}");
        host.runtime.block_on(collection).unwrap().unwrap();
        let pid = host.log().lines().find_map(|l| l.strip_prefix("GC ")?.parse::<i32>().ok());
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.unwrap())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "the plugin still runs: {stat}");
        // The plugin works again.
        host.plugin("good", GOOD);
        host.clear_log();
        wait_for(host, "GC");
        drive(host, Duration::from_millis(500));
        assert_eq!(gc_attachments(host), ["p2"]);
        host.runtime.block_on(cni.detach("p2")).unwrap();
        host.nothing_left();
    });
}
