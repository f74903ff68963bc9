//! What the plugins' own garbage collection (GC of CNI 1.1) is told, and when it is spoken. Shell
//! scripts stand in for plugins. Needs root and iproute2.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{GOOD, Host, conflist, json, on_a_host, pod, text};
use network::{Cni, Config};
use serde_json::json;

fn told(host: &Host) -> Vec<String> {
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
fn plugins_are_told_of_every_pod_that_may_live() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.1.0", &["good"]));
        let before = host.cni();
        for id in ["p1", "p2", "p3"] {
            host.runtime.block_on(before.attach(pod(id))).unwrap();
        }
        // A damaged record is a pod all the same.
        fs::write(host.path("cache/attachments/p2.json"), "{").unwrap();
        // So is one of another runtime on the same network, and not one of another network.
        fs::create_dir_all("/var/lib/cni/results").unwrap();
        for network in ["test", "other"] {
            let cached = json!({"kind":"cniCacheV1","containerId":format!("c-{network}"),
                "ifName":"eth0","networkName":network});
            let path = format!("/var/lib/cni/results/{network}-c-eth0");
            fs::write(path, cached.to_string()).unwrap();
        }
        let after = host.cni();
        host.runtime.block_on(after.attach(pod("p4"))).unwrap();
        host.clear_log();
        collect(host, &after, &["p1", "p2"]).unwrap();
        let log = host.log();
        assert!(log.contains("DEL p3") && log.contains("\nGC"), "{log}");
        assert!(log.find("DEL p3") < log.find("GC"), "{log}");
        assert_eq!(told(host), ["c-test", "p1", "p2", "p4"]);
        // When the others cannot be known, nothing is freed.
        fs::write("/var/lib/cni/results/test-c2-eth0", "{").unwrap();
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
fn older_networks_and_those_that_forbid_it_are_left_alone() {
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
fn a_removal_is_followed_by_a_collection_but_not_too_often() {
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
        assert_eq!(told(host), ["p3"]);
        host.runtime.block_on(rare.detach("p3")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn no_pod_comes_or_goes_while_plugins_collect() {
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
