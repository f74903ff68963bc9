//! Bandwidth limits with Debian's `bandwidth` plugin, whose queues are at the host's end of the
//! pod's veth pair. Needs root, iproute2 and the kernel's tbf and ifb.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::guest::{Guest, address, ask, attach, on_a_network, serve};
use common::{Host, pod, run};
use network::{Cni, Pod};

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

fn conflist(shaping: &str) -> String {
    format!(
        r#"{{"cniVersion":"1.0.0","name":"shaped","plugins":[
            {{"type":"bridge","bridge":"shaped0","isGateway":true,
              "ipam":{{"type":"host-local","subnet":"10.94.0.0/24"}}}},
            {{"type":"bandwidth",{shaping}}}]}}"#
    )
}

fn on_a_shaping_network(body: impl FnOnce(&Host, &Cni) + Send + 'static) {
    let plugin = ["/usr/lib/cni/bandwidth", "/opt/cni/bin/bandwidth"];
    if !plugin.iter().any(|p| Path::new(p).exists()) {
        println!("SKIP: no bandwidth plugin (Debian package containernetworking-plugins)");
        return;
    }
    on_a_network(|host, cni| {
        for (what, program, args) in [
            ("ifb", "ip", &["link", "add", "probe0", "type", "ifb"][..]),
            (
                "sch_tbf",
                "tc",
                &[
                    "qdisc", "add", "dev", "probe0", "root", "tbf", "rate", "1mbit", "burst", "9k",
                    "latency", "9ms",
                ],
            ),
        ] {
            let output = Command::new(program).args(args).output().unwrap();
            if !output.status.success() {
                let stderr = String::from_utf8_lossy(&output.stderr);
                println!("SKIP: the kernel does not support {what} ({})", stderr.trim());
                return;
            }
        }
        run("ip", &["link", "del", "probe0"]);
        body(host, cni);
    });
}

/// Shaping qdiscs with their counters, one on each line.
fn queues() -> Vec<String> {
    let all = run("tc", &["-s", "qdisc", "show"]);
    let blocks = all.split("qdisc ").filter(|block| block.starts_with("tbf"));
    blocks.map(|block| block.replace('\n', " ")).collect()
}

fn ifbs() -> usize {
    run("ip", &["-o", "link", "show", "type", "ifb"]).lines().count()
}

fn sent(queue: &str) -> u64 {
    let rest = queue.split("Sent ").nth(1).unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn annotations_limit_both_directions_and_queues_are_removed_with_the_pod() {
    on_a_shaping_network(|host, cni| {
        host.conflist(&conflist(r#""capabilities":{"bandwidth":true}"#));
        let annotations =
            [(INGRESS.to_owned(), "20M".to_owned()), (EGRESS.to_owned(), "1e7".to_owned())];
        let a = attach(host, cni, Pod { annotations: annotations.into(), ..pod("a") });
        let guest = Guest::boot(host, cni, "a", &a);
        let server = serve(&guest.netns, "0.0.0.0:7000");
        ask(None, &format!("{}:7000", address(&a, false)));
        server.join().unwrap();
        let queues_of = |rate: &str| -> Vec<String> {
            queues().into_iter().filter(|q| q.contains(rate)).collect()
        };
        let (into, out) = (queues_of("rate 20Mbit"), queues_of("rate 10Mbit"));
        assert_eq!((into.len(), out.len()), (1, 1), "{:?}", queues());
        assert!(into[0].contains("dev veth") && !out[0].contains("dev veth"), "{into:?} {out:?}");
        // Traffic in both directions passed the queues.
        assert!(sent(&into[0]) > 400_000 && sent(&out[0]) > 400_000, "{into:?} {out:?}");
        assert_eq!(ifbs(), 1);
        drop(guest);
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
        assert_eq!((ifbs(), queues()), (0, Vec::new()));
    });
}

#[test]
fn the_rate_of_a_guest_behind_a_tap_is_limited() {
    on_a_shaping_network(|host, cni| {
        let time = |shaping: &str| {
            host.conflist(&conflist(shaping));
            let a = attach(host, cni, pod("a"));
            let guest = Guest::boot(host, cni, "a", &a);
            let server = serve(&guest.netns, "0.0.0.0:7000");
            let started = Instant::now();
            ask(None, &format!("{}:7000", address(&a, false)));
            let took = started.elapsed();
            server.join().unwrap();
            drop(guest);
            host.runtime.block_on(cni.detach("a")).unwrap();
            took
        };
        // 3.2 Mbit in each direction, of which the burst passes at once: 0.6 s for each direction.
        let ingress = r#""ingressRate":4000000,"ingressBurst":800000"#;
        let egress = r#""egressRate":4000000,"egressBurst":800000"#;
        for shaping in [ingress, egress] {
            let took = time(shaping);
            assert!(took > Duration::from_millis(500), "{shaping}: only {took:?}");
        }
    });
}

#[test]
fn an_invalid_annotation_fails_the_pod_before_anything_is_changed() {
    on_a_network(|host, cni| {
        for (key, value) in [(INGRESS, "10Mbit"), (EGRESS, "1")] {
            let annotations = [(key.to_owned(), value.to_owned())].into();
            let p = Pod { annotations, ..pod("a") };
            let error = host.runtime.block_on(cni.attach(p)).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
            host.nothing_left();
        }
        // Without annotations the plugin has no effect.
        host.conflist(&conflist(r#""capabilities":{"bandwidth":true}"#));
        if Path::new("/usr/lib/cni/bandwidth").exists() {
            attach(host, cni, pod("a"));
            assert_eq!(queues(), Vec::<String>::new());
            host.runtime.block_on(cni.detach("a")).unwrap();
        }
        host.nothing_left();
    });
}
