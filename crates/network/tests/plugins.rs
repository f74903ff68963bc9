//! Behaviour and misbehaviour of plugins, which are shell scripts here. Needs root and iproute2; no
//! network, no VM.

mod common;

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{GOOD, Host, conflist, json, on_a_host, pod, run_in, text};
use network::observe::{Observer, Outcome, PluginRun};
use network::{Cni, Config, Error, PluginError, Verb};

/// Passes prevResult on and logs the command.
const SECOND: &str = r#"
LOG=$(dirname "$0")/../log
echo "second $CNI_COMMAND" >> $LOG
cat > $(dirname "$0")/../stdin.second.$CNI_COMMAND
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.5/24"}]}';;
VERSION) echo '{"supportedVersions":["1.0.0","1.1.0"]}';;
esac
"#;

fn fails(host: &Host, cni: &Cni, id: &str) -> Error {
    host.runtime.block_on(cni.attach(pod(id))).unwrap_err()
}

#[test]
fn a_pod_gets_the_plugins_network_and_releases_all_of_it() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        let a = host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        assert_eq!(a.netns, cni.netns_path("p1"));
        assert_eq!(a.interfaces.len(), 1);
        assert_eq!(a.interfaces[0].name, "eth0");
        assert_eq!(a.interfaces[0].mac, [2, 0, 0, 0, 0, 5]);
        assert_eq!(a.interfaces[0].mtu, 1400);
        assert_eq!(a.interfaces[0].addresses, ["10.9.0.5/24", "fd09::5/64"]);
        let routes: Vec<_> =
            a.routes.iter().map(|r| (r.destination.as_str(), r.gateway.as_str())).collect();
        assert_eq!(routes, [("", "10.9.0.1"), ("", "fd09::1")]);
        assert_eq!(a.addresses[0], "10.9.0.5".parse::<std::net::IpAddr>().unwrap());
        assert_eq!(a.dns.servers, ["10.9.0.1"]);
        assert_eq!(
            host.log().trim(),
            format!(
                "ADD p1 eth0 {} IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p1-name;\
                 K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=p1-uid",
                a.netns.display()
            )
        );
        let taps = host.runtime.block_on(cni.open_taps("p1", a.interface_names())).unwrap();
        assert_eq!(taps.len(), 1);
        let busy = host.runtime.block_on(cni.open_taps("p1", a.interface_names())).unwrap_err();
        assert!(text(&busy).contains("another VMM"), "{}", text(&busy));
        drop(taps);
        // The tap remains after it was closed, with the same MTU.
        let link = run_in(&a.netns, "ip", &["link", "show", "tap0"]);
        assert!(link.contains("mtu 1400"), "{link}");
        host.runtime.block_on(cni.open_taps("p1", a.interface_names())).unwrap();
        host.runtime.block_on(cni.check("p1", &a)).unwrap();
        run_in(&a.netns, "tc", &["qdisc", "del", "dev", "eth0", "ingress"]);
        let not_connected = host.runtime.block_on(cni.check("p1", &a)).unwrap_err();
        assert!(text(&not_connected).contains("not connected"), "{}", text(&not_connected));
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn results_and_capabilities_are_passed_along_the_chain() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.plugin("second", SECOND);
        host.conflist(&conflist("1.0.0", &["good", "second"]));
        let cni = host.cni();
        let mut p = pod("p1");
        p.ports.push(network::PortMapping {
            protocol: network::Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: None,
        });
        host.runtime.block_on(cni.attach(p)).unwrap();
        let stdin = json(host, "stdin.second.ADD");
        assert_eq!(stdin["name"], "test");
        assert_eq!(stdin["cniVersion"], "1.0.0");
        assert_eq!(stdin["runtimeConfig"]["portMappings"][0]["hostPort"], 8080);
        assert_eq!(stdin["prevResult"]["ips"][0]["address"], "10.9.0.5/24");
        assert!(stdin.get("capabilities").is_none());
        assert!(json(host, "stdin.ADD").get("prevResult").is_none());
        host.clear_log();
        // The configuration changes meanwhile; DEL uses the one of ADD.
        host.conflist(&conflist("1.0.0", &["nonesuch"]));
        host.runtime.block_on(host.cni().detach("p1")).unwrap();
        let log = host.log();
        assert!(log.starts_with("second DEL\nDEL p1 eth0"), "{log}");
        // DEL gets the last plugin's result and the same capabilities.
        let stdin = json(host, "stdin.DEL");
        assert!(stdin["prevResult"].get("dns").is_none());
        assert_eq!(stdin["runtimeConfig"]["portMappings"][0]["containerPort"], 80);
        host.nothing_left();
    });
}

#[test]
fn every_failure_is_reported_and_leaves_nothing_behind() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good", "bad"]));
        let cni = Cni::new(Config { plugin_timeout_ms: 4000, ..host.config() });
        // DEL succeeds, ADD fails.
        let bad = |add: &str| {
            host.clear_log();
            let del = "echo \"bad DEL\" >> $(dirname $0)/../log; exit 0";
            host.plugin("bad", &format!("case $CNI_COMMAND in DEL) {del};; ADD) {add};; esac"));
            let started = Instant::now();
            let error = text(&fails(host, &cni, "p1"));
            assert!(started.elapsed() < Duration::from_secs(60));
            host.nothing_left();
            assert!(host.log().contains("bad DEL\nDEL p1"), "no clean-up: {}", host.log());
            error
        };
        for (add, expected) in [
            (
                r#"echo '{"code":7,"msg":"no pool","details":"left"}'; exit 1"#,
                "no pool (left), code 7",
            ),
            ("echo oops >&2; exit 3", "without an error message: exit status: 3; output: oops"),
            ("echo hello", "invalid reply to ADD: it is not JSON"),
            ("exit 0", "invalid reply to ADD: it printed nothing"),
            ("echo '[1]'", "not a JSON object"),
            ("echo panic; exit 2", "its output is not a CNI error; output: panic"),
            ("sleep 60", "did not finish within 4000 ms and was killed"),
            ("exec 1>&- 2>&-; sleep 60", "did not finish within 4000 ms and was killed"),
            ("yes", "printed more than 1048576 bytes"),
            ("kill -9 $$", "signal: 9"),
            (r#"echo '{"ips":[{"address":"nowhere"}]}'"#, "\"nowhere\" is not an address"),
        ] {
            let error = bad(add);
            assert!(error.contains("\"bad\"") && error.contains(expected), "{add}: {error}");
        }
        let again = bad(r#"echo '{"code":11,"msg":"busy"}'; exit 1"#);
        assert!(again.contains("try again later"), "{again}");
    });
}

#[derive(Debug, Default)]
struct Seen(Mutex<Vec<(String, Verb, Outcome)>>);

impl Observer for Seen {
    fn plugin_ran(&self, run: PluginRun<'_>) {
        self.0.lock().unwrap().push((run.plugin.to_owned(), run.verb, run.outcome));
    }
}

#[test]
fn an_observer_is_told_of_every_run_with_its_outcome() {
    on_a_host(|host| {
        let seen = Arc::new(Seen::default());
        let config = Config { plugin_timeout_ms: 4000, ..host.config() };
        let cni = Cni::observed(config, seen.clone());
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good", "bad"]));
        let ran = |plugin: &str, verb, outcome| (plugin.to_owned(), verb, outcome);
        for (add, outcome) in [
            ("exit 3", Outcome::Failed),
            ("echo hello", Outcome::Failed),
            ("sleep 60", Outcome::TimedOut),
        ] {
            host.plugin("bad", &format!("case $CNI_COMMAND in ADD) {add};; esac"));
            fails(host, &cni, "p1");
            let expected = [
                ran("good", Verb::Add, Outcome::Ok),
                ran("bad", Verb::Add, outcome),
                ran("bad", Verb::Del, Outcome::Ok),
                ran("good", Verb::Del, Outcome::Ok),
            ];
            assert_eq!(std::mem::take(&mut *seen.0.lock().unwrap()), expected);
        }
    });
}

#[test]
fn a_missing_plugin_is_reported_before_anything_is_changed() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good", "nonesuch"]));
        let cni = host.cni();
        let error = fails(host, &cni, "p1");
        assert!(matches!(error, Error::Plugin(PluginError::Missing { .. })));
        let error = text(&error);
        assert!(error.contains("\"nonesuch\"") && error.contains("/usr/lib/cni"), "{error}");
        assert_eq!(host.log(), "");
        host.nothing_left();
        let trouble = host.runtime.block_on(cni.trouble()).unwrap();
        assert!(trouble.contains("\"nonesuch\""), "{trouble}");
    });
}

#[test]
fn success_without_an_interface_is_an_error() {
    on_a_host(|host| {
        host.plugin("liar", r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0"}'; exit 0"#);
        host.conflist(&conflist("1.0.0", &["liar"]));
        let error = text(&fails(host, &host.cni(), "p1"));
        assert!(error.contains("left no interface"), "{error}");
        host.nothing_left();
    });
}

#[test]
fn a_failed_detach_is_reported_and_can_be_retried() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.plugin("second", SECOND);
        host.conflist(&conflist("1.0.0", &["good", "second"]));
        let cni = host.cni();
        let a = host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        host.plugin("second", "echo '{\"code\":100,\"msg\":\"stuck\"}'; exit 1");
        host.clear_log();
        let error = host.runtime.block_on(cni.detach("p1")).unwrap_err();
        assert!(text(&error).contains("stuck, code 100"), "{}", text(&error));
        assert!(host.log().contains("DEL p1"), "the other plugin must run anyway");
        assert!(a.netns.exists(), "the plugin may need it for a retry");
        host.plugin("second", SECOND);
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn a_plugin_that_does_not_know_the_pod_does_not_fail_its_detach() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        host.plugin("good", "echo '{\"code\":3,\"msg\":\"unknown\"}'; exit 1");
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn networks_of_unknown_pods_are_removed_and_others_kept() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let before = host.cni();
        for id in ["p1", "p2", "p3", "p4"] {
            host.runtime.block_on(before.attach(pod(id))).unwrap();
        }
        // The namespace of p3 was lost in a reboot; p4 has only the file of an interrupted
        // creation. Other namespaces belong to other programs, also to another daemon.
        nix::mount::umount2(&before.netns_path("p3"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(before.netns_path("p3")).unwrap();
        nix::mount::umount2(&before.netns_path("p4"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        fs::write(host.path("netns/cni-1234"), "").unwrap();
        fs::write(before.netns_path("other"), "").unwrap();
        let after = host.cni();
        host.runtime.block_on(after.attach(pod("p5"))).unwrap();
        host.clear_log();
        host.runtime.block_on(after.collect(&["p1".to_owned()])).unwrap();
        assert_eq!(host.names("netns"), ["cni-1234", "nacelle-other", "nacelle-p1", "nacelle-p5"]);
        assert_eq!(host.names("cache/attachments"), ["p1.json", "p5.json"]);
        let log = host.log();
        assert!(log.contains("DEL p2 eth0 /") && log.contains("DEL p3 eth0 none"), "{log}");
        for id in ["p1", "p5"] {
            host.runtime.block_on(after.detach(id)).unwrap();
        }
        fs::remove_file(host.path("netns/cni-1234")).unwrap();
        fs::remove_file(before.netns_path("other")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn collection_continues_after_a_plugin_that_always_fails() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        host.runtime.block_on(host.cni().attach(pod("p1"))).unwrap();
        host.plugin("good", "exit 1");
        let error = host.runtime.block_on(host.cni().collect(&[])).unwrap_err();
        assert!(text(&error).contains("failed at DEL"), "{}", text(&error));
        assert_eq!(host.names("netns"), Vec::<String>::new());
        assert_eq!(host.names("cache/attachments"), ["p1.json"], "the record must be kept");
        host.plugin("good", "exit 0");
        host.runtime.block_on(host.cni().collect(&[])).unwrap();
        host.nothing_left();
    });
}

#[test]
fn a_pod_with_a_damaged_record_can_be_detached() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let damages: [fn(&std::path::Path); 4] = [
            |path| fs::write(path, "").unwrap(),
            |path| fs::write(path, [0xa5; 4096]).unwrap(),
            |path| {
                let text = fs::read_to_string(path).unwrap();
                fs::write(path, text.replace("\"version\":1", "\"version\":9")).unwrap();
            },
            |path| {
                fs::remove_file(path).unwrap();
                fs::create_dir_all(path.join("deep")).unwrap();
            },
        ];
        for damage in damages {
            let cni = host.cni();
            host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
            assert_eq!(host.runtime.block_on(cni.damaged()), Vec::<String>::new());
            damage(&host.path("cache/attachments/p1.json"));
            // A new daemon knows the pod and does not change its network.
            let cni = host.cni();
            assert_eq!(host.runtime.block_on(cni.damaged()).len(), 1);
            host.clear_log();
            host.runtime.block_on(cni.collect(&["p1".to_owned()])).unwrap();
            assert!(!host.log().contains("DEL"), "{}", host.log());
            assert_eq!(host.names("cache/attachments"), ["p1.json"]);
            host.clear_log();
            host.runtime.block_on(cni.detach("p1")).unwrap();
            assert!(host.log().starts_with("DEL p1 eth0 /"), "{}", host.log());
            host.nothing_left();
            assert_eq!(host.names("cache/damaged"), ["p1.json"]);
        }
    });
}

/// Neither the configuration nor libcni's cache says what network the pod was on.
#[test]
fn a_pod_with_a_damaged_record_can_be_detached_without_a_configuration() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        fs::write(host.path("cache/attachments/p1.json"), "").unwrap();
        fs::remove_dir_all(host.path("conf")).unwrap();
        for plugin in ["bridge", "portmap", "firewall", "host-local", "tuning"] {
            host.plugin(plugin, "exit 0");
        }
        let cni = host.cni();
        host.runtime.block_on(cni.detach("p1")).unwrap();
        assert_eq!(host.names("netns"), Vec::<String>::new());
    });
}

#[test]
fn a_repeated_attach_first_undoes_the_previous_one() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let first = host.runtime.block_on(host.cni().attach(pod("p1"))).unwrap();
        host.clear_log();
        let second = host.runtime.block_on(host.cni().attach(pod("p1"))).unwrap();
        assert_eq!(first, second);
        let verbs: Vec<String> =
            host.log().lines().map(|l| l.split(' ').next().unwrap().to_owned()).collect();
        assert_eq!(verbs, ["DEL", "ADD"]);
        host.runtime.block_on(host.cni().detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn status_is_run_for_networks_of_1_1_and_its_message_is_passed_on() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.1.0", &["good"]));
        let cni = host.cni();
        assert_eq!(host.runtime.block_on(cni.trouble()), None);
        assert!(host.log().contains("STATUS"), "{}", host.log());
        for (code, meaning) in [(50, "cannot attach pods now"), (51, "may have lost connectivity")]
        {
            host.plugin(
                "good",
                &format!(
                    "case $CNI_COMMAND in
                     STATUS) echo '{{\"code\":{code},\"msg\":\"daemon down\"}}'; exit 1;;
                     VERSION) echo '{{\"supportedVersions\":[\"1.1.0\"]}}';; esac"
                ),
            );
            let trouble = host.runtime.block_on(cni.trouble()).unwrap();
            assert!(trouble.contains(&format!("daemon down, code {code}")), "{trouble}");
            assert!(trouble.contains(meaning), "{trouble}");
        }
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        host.clear_log();
        assert_eq!(host.runtime.block_on(cni.trouble()), None);
        assert!(!host.log().contains("STATUS"), "{}", host.log());
    });
}

#[test]
fn a_failed_check_after_add_fails_the_pod_with_the_plugins_message() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        let checks = |script: &str| {
            host.plugin(
                "second",
                &format!("[ $CNI_COMMAND = CHECK ] && {{ {script}; }}\n{SECOND}"),
            );
        };
        checks(r#"echo '{"code":110,"msg":"the route is gone"}'; exit 1"#);
        host.conflist(&conflist("1.0.0", &["good", "second"]));
        let cni = Cni::new(Config { check_after_add: true, ..host.config() });
        let error = text(&fails(host, &cni, "p1"));
        assert!(error.contains("\"second\" failed at CHECK"), "{error}");
        assert!(error.contains("the route is gone, code 110"), "{error}");
        assert!(host.log().contains("second DEL\nDEL p1"), "{}", host.log());
        host.nothing_left();
        // With disableCheck, or a successful CHECK, the pod is attached.
        let list = conflist("1.0.0", &["good", "second"]);
        host.conflist(&list.replace("\"name\"", "\"disableCheck\":true,\"name\""));
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.conflist(&list);
        checks("cp /dev/stdin $(dirname $0)/../stdin.CHECK; exit 0");
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        assert_eq!(json(host, "stdin.CHECK")["prevResult"]["ips"][0]["address"], "10.9.0.5/24");
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn changes_of_the_configuration_take_effect_at_once() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        let cni = host.cni();
        let trouble = || host.runtime.block_on(cni.trouble());
        let directory = host.path("conf").display().to_string();
        let none = trouble().unwrap();
        assert!(none.contains(&directory) && none.contains("nacelled config cni"), "{none}");
        assert!(text(&fails(host, &cni, "p1")).contains(&directory));
        host.conflist(&conflist("1.0.0", &["good"]));
        assert_eq!(trouble(), None);
        host.runtime.block_on(cni.attach(pod("p1"))).unwrap();
        host.conflist("{");
        let broken = trouble().unwrap();
        assert!(broken.contains("10-test.conflist is not JSON"), "{broken}");
        fs::remove_file(host.path("conf/10-test.conflist")).unwrap();
        assert!(trouble().unwrap().contains(&directory));
        // DEL uses the configuration of ADD.
        host.runtime.block_on(cni.detach("p1")).unwrap();
        assert!(host.log().contains("DEL p1"), "{}", host.log());
        host.nothing_left();
    });
}

#[test]
fn a_plugin_too_old_for_the_network_is_reported() {
    on_a_host(|host| {
        host.plugin("good", "echo '{\"supportedVersions\":[\"0.3.1\"]}'");
        host.conflist(&conflist("1.0.0", &["good"]));
        let trouble = host.runtime.block_on(host.cni().trouble()).unwrap();
        assert!(trouble.contains("does not support") && trouble.contains("0.3.1"), "{trouble}");
        let none = Cni::new(Config { conf_dir: host.path("void"), ..host.config() });
        let trouble = host.runtime.block_on(none.trouble()).unwrap();
        assert!(trouble.contains("no network is configured"), "{trouble}");
    });
}

#[test]
fn a_cancelled_attach_leaves_nothing_after_a_detach() {
    on_a_host(|host| {
        host.plugin("good", &format!("[ $CNI_COMMAND = ADD ] && sleep 1\n{GOOD}"));
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        host.runtime.block_on(async {
            let impatient =
                tokio::time::timeout(Duration::from_millis(200), cni.attach(pod("p1"))).await;
            assert!(impatient.is_err());
            cni.detach("p1").await.unwrap();
        });
        assert!(host.log().contains("ADD p1"), "the attach must have been completed first");
        host.nothing_left();
    });
}

#[test]
fn concurrent_attaches_of_one_pod_are_serialized() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        let (a, b) = host
            .runtime
            .block_on(async { tokio::join!(cni.attach(pod("p1")), cni.attach(pod("p1"))) });
        assert_eq!(a.unwrap(), b.unwrap());
        host.runtime.block_on(cni.detach("p1")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn invalid_pods_are_refused_before_anything_is_changed() {
    on_a_host(|host| {
        host.plugin("good", GOOD);
        host.conflist(&conflist("1.0.0", &["good"]));
        let cni = host.cni();
        for id in ["", "../escape", "a b"] {
            let error = fails(host, &cni, id);
            assert!(matches!(error, Error::Pod(_)), "{error}");
            assert!(host.runtime.block_on(cni.detach(id)).is_err());
        }
        assert_eq!(host.log(), "");
        host.nothing_left();
    });
}

/// Answers for `bridge` of the built-in network; the other plugins pass its result on.
const PASSES: &str = r#"
echo "$(basename "$0") $CNI_COMMAND" >> $(dirname "$0")/../log
case $CNI_COMMAND in
ADD) cat >/dev/null
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"'$CNI_IFNAME'","sandbox":"'$CNI_NETNS'"}],
    "ips":[{"address":"10.9.0.5/24","gateway":"10.9.0.1","interface":0}]}';;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
esac
"#;

#[test]
fn the_built_in_network_is_for_pods_that_ask_for_it_on_a_host_without_configuration() {
    on_a_host(|host| {
        host.plugin("bridge", GOOD);
        for name in ["portmap", "firewall", "host-local"] {
            host.plugin(name, PASSES);
        }
        let cni = host.cni();
        let asking = |id: &str| network::Pod { default_network: true, ..pod(id) };
        // A kubelet's pods wait for the operator's configuration, and NetworkReady stays false.
        assert!(text(&fails(host, &cni, "p1")).contains("no network is configured"));
        let trouble = host.runtime.block_on(cni.trouble()).unwrap();
        assert!(trouble.contains("no network is configured"), "{trouble}");
        assert!(!host.runtime.block_on(cni.is_configured()));
        assert_eq!(host.runtime.block_on(cni.default_trouble()), None);
        host.nothing_left();

        let a = host.runtime.block_on(cni.attach(asking("p1"))).unwrap();
        assert_eq!(a.interfaces[0].addresses[0], "10.9.0.5/24");
        // The record holds the network: a configuration that comes later changes nothing for it.
        host.conflist(&conflist("1.0.0", &["good"]));
        host.clear_log();
        host.runtime.block_on(cni.detach("p1")).unwrap();
        assert!(
            host.log().contains("portmap DEL") && host.log().contains("DEL p1"),
            "{}",
            host.log()
        );
        host.nothing_left();

        // With a configuration, it is the network of all pods.
        host.plugin("good", GOOD);
        host.clear_log();
        host.runtime.block_on(cni.attach(asking("p2"))).unwrap();
        assert!(!host.log().contains("portmap"), "{}", host.log());
        host.runtime.block_on(cni.detach("p2")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn a_built_in_network_without_plugins_says_what_to_install() {
    on_a_host(|host| {
        let mut config = host.config();
        config.bin_dirs = vec![host.path("bin")];
        let cni = Cni::new(config);
        let asking = network::Pod { default_network: true, ..pod("p1") };
        let error = text(&host.runtime.block_on(cni.attach(asking)).unwrap_err());
        assert!(error.contains("apt install containernetworking-plugins"), "{error}");
        assert!(host.runtime.block_on(cni.default_trouble()).is_some());
        host.nothing_left();
    });
}
