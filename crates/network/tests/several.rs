//! Pods with several interfaces, and with addresses of both families in any order. A script that
//! runs Debian's `bridge` twice acts as a meta plugin.

mod common;

use std::time::{Duration, Instant};

use common::guest::{Guest, TIMEOUT, address, ask, attach, inside, on_a_network, serve};
use common::{Host, on_a_host, pod, run, run_in};

/// Creates eth0 and net1 with real bridges and reports `REPORT`: like Multus, only the first.
const TWO: &str = r#"
IFS=:
for dir in $CNI_PATH; do test -x "$dir/bridge" && bridge=$dir/bridge; done
work=$(dirname "$0")/..
cat > "$work/stdin.$CNI_COMMAND"
first='{"cniVersion":"1.0.0","name":"first","type":"bridge","bridge":"first0","isGateway":true,
  "ipam":{"type":"host-local","ranges":[[{"subnet":"fd96::/64"}],[{"subnet":"10.96.0.0/24"}]],
  "routes":[{"dst":"::/0"},{"dst":"0.0.0.0/0"}]}}'
side='{"cniVersion":"1.0.0","name":"side","type":"bridge","bridge":"side0","isGateway":true,
  "mtu":1300,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.97.0.0/24"}],
  [{"subnet":"fd97::/64"}]],"routes":[{"dst":"10.95.0.0/16"}]}}'
case $CNI_COMMAND in
ADD)
  # The side network first: the order of making is not the pod's order.
  echo "$side" | CNI_IFNAME=net1 "$bridge" > "$work/side.out" || { cat "$work/side.out"; exit 1; }
  echo "$first" | "$bridge";;
DEL)
  echo "$side" | CNI_IFNAME=net1 "$bridge"; echo "$first" | "$bridge";;
VERSION) echo '{"supportedVersions":["1.0.0"]}';;
esac
"#;

const CHAIN: &str = r#"{"cniVersion":"1.0.0","name":"two","plugins":[{"type":"two"},
    {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

fn gateways_are_sure() {
    let started = Instant::now();
    while !run("ip", &["-6", "addr", "show", "tentative"]).is_empty() {
        assert!(started.elapsed() < TIMEOUT, "a gateway's address is still tentative");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn each_interface_has_its_own_tap_and_both_networks_work() {
    on_a_network(|host, cni| {
        host.plugin("two", TWO);
        host.conflist(CHAIN);
        let (a, b) = (attach(host, cni, pod("a")), attach(host, cni, pod("b")));
        let names: Vec<_> = a.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"], "the primary comes first");
        assert_ne!(a.interfaces[0].mac, a.interfaces[1].mac);
        assert_eq!((a.interfaces[0].mtu, a.interfaces[1].mtu), (1500, 1300));
        assert!(a.interfaces[1].addresses[0].starts_with("10.97.0."), "{:?}", a.interfaces);
        assert!(a.interfaces[1].addresses[1].starts_with("fd97::"), "{:?}", a.interfaces);
        // The pod's addresses are those of the primary interface, in the plugin's order.
        assert_eq!(a.addresses.len(), 2);
        assert!(a.addresses[0].is_ipv6() && a.addresses[1].is_ipv4(), "{:?}", a.addresses);
        let routes: Vec<_> =
            a.routes.iter().map(|r| [&*r.destination, &*r.gateway, &*r.interface]).collect();
        for route in [
            ["", "10.96.0.1", "eth0"],
            ["", "fd96::1", "eth0"],
            ["10.95.0.0/16", "10.97.0.1", "net1"],
        ] {
            assert!(routes.contains(&route), "{route:?} is not among {routes:?}");
        }
        let taps = host.runtime.block_on(cni.open_taps("a", a.interface_names())).unwrap();
        assert_eq!(taps.len(), 2);
        drop(taps);
        host.runtime.block_on(cni.check("a", &a)).unwrap();
        let (one, two) = (Guest::boot(host, cni, "a", &a), Guest::boot(host, cni, "b", &b));
        gateways_are_sure();
        for v6 in [false, true] {
            let any = if v6 { "[::]" } else { "0.0.0.0" };
            let plain = |i: &network::Interface| {
                let found = i.addresses.iter().find(|a| a.contains(':') == v6).unwrap();
                found.split('/').next().unwrap().to_owned()
            };
            for (mine, theirs) in a.interfaces.iter().zip(&b.interfaces) {
                let (mine, theirs) = (plain(mine), plain(theirs));
                let to = if v6 { format!("[{theirs}]:7000") } else { format!("{theirs}:7000") };
                let server = serve(&two.netns, &format!("{any}:7000"));
                assert_eq!(
                    ask(Some(&one.netns), &to),
                    mine,
                    "the packet leaves through that interface"
                );
                server.join().unwrap();
                let server = serve(&two.netns, &format!("{any}:7000"));
                ask(None, &to);
                server.join().unwrap();
            }
        }
        // A removed redirect is detected.
        run_in(&a.netns, "tc", &["qdisc", "del", "dev", "net1", "ingress"]);
        let not_connected = host.runtime.block_on(cni.check("a", &a)).unwrap_err().to_string();
        assert!(
            not_connected.contains("tap1") && not_connected.contains("net1"),
            "{not_connected}"
        );
        drop((one, two));
        for id in ["a", "b"] {
            host.runtime.block_on(cni.detach(id)).unwrap();
        }
        host.nothing_left();
    });
}

/// Two interfaces, both reported, the primary last.
const REPORTED: &str = r#"
cat > /dev/null
in="nsenter --net=$CNI_NETNS ip"
case $CNI_COMMAND in
ADD)
  for n in net1 eth0; do
    ip link add h$n type veth peer name $n netns $CNI_NETNS || exit 9
    ip link set h$n up
    $in link set $n up
  done
  $in addr add 10.9.1.5/24 dev net1 && $in addr add 10.9.0.5/24 dev eth0
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"hnet1"},
      {"name":"net1","sandbox":"'$CNI_NETNS'"},{"name":"eth0","sandbox":"'$CNI_NETNS'"}],
    "ips":[{"address":"10.9.1.5/24","gateway":"10.9.1.1","interface":1},
           {"address":"10.9.0.5/24","gateway":"10.9.0.1","interface":2}],
    "routes":[{"dst":"10.8.0.0/16","gw":"10.9.0.7"},{"dst":"10.7.0.0/16","gw":"10.9.1.7"}]}';;
DEL) ip link del hnet1; ip link del heth0; exit 0;;
esac
"#;

#[test]
fn the_primary_interface_comes_first_also_if_it_is_reported_last() {
    on_a_host(|host: &Host| {
        host.plugin("reported", REPORTED);
        host.conflist(r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"reported"}]}"#);
        let cni = host.cni();
        let a = attach(host, &cni, pod("a"));
        let names: Vec<_> = a.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"]);
        assert_eq!(a.addresses, ["10.9.0.5".parse::<std::net::IpAddr>().unwrap()]);
        let routes: Vec<_> =
            a.routes.iter().map(|r| [&*r.destination, &*r.gateway, &*r.interface]).collect();
        assert_eq!(
            routes,
            [["10.8.0.0/16", "10.9.0.7", "eth0"], ["10.7.0.0/16", "10.9.1.7", "net1"]],
            "a route uses the interface of its gateway"
        );
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn interfaces_with_the_same_mac_are_refused() {
    on_a_host(|host: &Host| {
        host.plugin(
            "reported",
            &REPORTED.replace("$in link", "$in link set $n address 02:00:00:00:00:07; $in link"),
        );
        host.conflist(r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"reported"}]}"#);
        let error = host.runtime.block_on(host.cni().attach(pod("a"))).unwrap_err().to_string();
        assert!(error.contains("eth0 and net1 have the same MAC"), "{error}");
        host.nothing_left();
    });
}

#[test]
fn a_pod_without_a_vm_uses_the_interfaces_directly() {
    on_a_network(|host, cni| {
        let a = attach(host, cni, network::Pod { native: true, ..pod("a") });
        let b = attach(host, cni, pod("b"));
        assert!(a.interfaces.is_empty() && a.routes.is_empty());
        assert_eq!(a.addresses.len(), 2);
        assert!(!run_in(&a.netns, "ip", &["link"]).contains("tap"), "there is no tap");
        let guest = Guest::boot(host, cni, "b", &b);
        gateways_are_sure();
        for v6 in [false, true] {
            let server = serve(&a.netns, if v6 { "[::]:7000" } else { "0.0.0.0:7000" });
            let seen = ask(Some(&guest.netns), &format!("{}:7000", address(&a, v6)));
            assert_eq!(seen, address(&b, v6).trim_matches(['[', ']']));
            server.join().unwrap();
        }
        host.runtime.block_on(cni.check("a", &a)).unwrap();
        drop(guest);
        for id in ["a", "b"] {
            host.runtime.block_on(cni.detach(id)).unwrap();
        }
        host.nothing_left();
    });
}

#[test]
fn an_interface_without_an_address_is_an_error() {
    on_a_network(|host, cni| {
        host.conflist(
            r#"{"cniVersion":"1.0.0","name":"l2","plugins":[{"type":"bridge","bridge":"l20"}]}"#,
        );
        let error = host.runtime.block_on(cni.attach(pod("a"))).unwrap_err().to_string();
        assert!(error.contains("no address to the pod's interface eth0"), "{error}");
        host.nothing_left();
    });
}

#[test]
fn the_loopback_interface_of_the_namespace_is_up() {
    on_a_network(|host, cni| {
        let a = attach(host, cni, pod("a"));
        let lo = run_in(&a.netns, "ip", &["addr", "show", "lo"]);
        assert!(lo.contains("127.0.0.1/8") && lo.contains("::1/128"), "{lo}");
        let door = inside(&a.netns, || std::net::TcpListener::bind("[::1]:80").map(drop));
        door.unwrap();
        assert!(!address(&a, true).is_empty());
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}
