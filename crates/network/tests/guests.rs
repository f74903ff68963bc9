//! Pods on a real network: Debian's plugins (containernetworking-plugins), a bridge, masquerading,
//! hostPorts. Needs root, iproute2 and iptables.

mod common;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::guest::{Guest, TIMEOUT, address, ask, attach, inside, on_a_network, rules, serve};
use common::{pod, run, run_in};
use network::{PortMapping, Protocol};

#[test]
fn pods_reach_each_other_and_the_host_over_ipv4_and_ipv6() {
    on_a_network(|host, cni| {
        let (a, b) = (attach(host, cni, pod("a")), attach(host, cni, pod("b")));
        let (one, two) = (Guest::boot(host, cni, "a", &a), Guest::boot(host, cni, "b", &b));
        // The bridge plugin does not wait for duplicate address detection of the gateway's address;
        // until then the host uses its link-local address.
        let started = Instant::now();
        while !run("ip", &["-6", "addr", "show", "tentative"]).is_empty() {
            assert!(started.elapsed() < TIMEOUT, "the gateway's address is still tentative");
            std::thread::sleep(Duration::from_millis(50));
        }
        for v6 in [false, true] {
            let any = if v6 { "[::]" } else { "0.0.0.0" };
            let server = serve(&two.netns, &format!("{any}:7000"));
            let seen = ask(Some(&one.netns), &format!("{}:7000", address(&b, v6)));
            assert_eq!(
                seen,
                address(&a, v6).trim_matches(['[', ']']),
                "a pod's address is not masqueraded"
            );
            server.join().unwrap();
            let server = serve(&two.netns, &format!("{any}:7001"));
            ask(None, &format!("{}:7001", address(&b, v6)));
            server.join().unwrap();
        }
        // From a pod to the host, by the gateway address.
        let listener = TcpListener::bind("10.99.0.1:7002").unwrap();
        let server = std::thread::spawn(move || listener.accept().unwrap().1.ip());
        inside(&one.netns, || {
            TcpStream::connect_timeout(&"10.99.0.1:7002".parse().unwrap(), TIMEOUT).unwrap()
        });
        assert_eq!(server.join().unwrap(), a.addresses[0]);
        drop((one, two));
        for id in ["a", "b"] {
            host.runtime.block_on(cni.detach(id)).unwrap();
        }
        host.nothing_left();
    });
}

#[test]
fn the_namespaces_kernel_never_answers_for_the_guest() {
    on_a_network(|host, cni| {
        let a = attach(host, cni, pod("a"));
        let knock = |v6| {
            let door: SocketAddr = format!("{}:9", address(&a, v6)).parse().unwrap();
            TcpStream::connect_timeout(&door, Duration::from_secs(1)).unwrap_err().kind()
        };
        for v6 in [false, true] {
            // A closed port would be refused.
            assert_ne!(knock(v6), ErrorKind::ConnectionRefused, "the kernel answered");
            let ip = address(&a, v6);
            let ip = ip.trim_matches(['[', ']']);
            let neighbours = run("ip", &["neigh", "show", "to", ip]);
            assert!(!neighbours.contains("lladdr"), "the kernel answered: {neighbours}");
        }
        let guest = Guest::boot(host, cni, "a", &a);
        for v6 in [false, true] {
            let started = Instant::now();
            while knock(v6) != ErrorKind::ConnectionRefused {
                assert!(started.elapsed() < TIMEOUT, "the guest does not answer");
            }
        }
        drop(guest);
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn host_ports_lead_into_the_pod_and_are_removed_with_it() {
    on_a_network(|host, cni| {
        let before = rules();
        let port = |protocol, host_port, container_port| PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: None,
        };
        let mut p = pod("a");
        p.ports = vec![port(Protocol::Tcp, 8080, 80), port(Protocol::Udp, 8053, 53)];
        let a = attach(host, cni, p);
        let guest = Guest::boot(host, cni, "a", &a);
        // A client outside of the host.
        let outside = host.path("netns").join("guest-outside");
        std::fs::write(&outside, "").unwrap();
        let name = outside.display().to_string();
        run("unshare", &["--net", "mount", "--bind", "/proc/self/ns/net", &name]);
        let netns = format!("--net={name}");
        run("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        let pid_free = ["link", "set", "up1", "netns", name.as_str()];
        run("ip", &pid_free);
        run("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        run("ip", &["link", "set", "up0", "up"]);
        run("nsenter", &[&netns, "ip", "addr", "add", "192.0.2.2/24", "dev", "up1"]);
        run("nsenter", &[&netns, "ip", "link", "set", "up1", "up"]);
        let server = serve(&guest.netns, "0.0.0.0:80");
        let seen = ask(Some(&outside), "192.0.2.1:8080");
        assert_eq!(seen, "192.0.2.2", "the pod sees the client's address");
        server.join().unwrap();
        let server = serve(&guest.netns, "0.0.0.0:80");
        ask(None, "127.0.0.1:8080");
        server.join().unwrap();
        // UDP.
        let socket = inside(&guest.netns, || UdpSocket::bind("0.0.0.0:53").unwrap());
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let client = inside(&outside, || UdpSocket::bind("0.0.0.0:0").unwrap());
        client.send_to(b"name?", "192.0.2.1:8053").unwrap();
        let mut buffer = [0; 16];
        let (n, peer) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..n], peer.ip().to_string().as_str()), (&b"name?"[..], "192.0.2.2"));
        // Outbound connections are masqueraded.
        let server = serve(&outside, "192.0.2.2:9000");
        assert_eq!(ask(Some(&guest.netns), "192.0.2.2:9000"), "192.0.2.1");
        server.join().unwrap();
        drop(guest);
        assert!(rules().contains("8080"));
        host.runtime.block_on(cni.detach("a")).unwrap();
        nix::mount::umount2(&outside, nix::mount::MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_file(&outside).unwrap();
        host.nothing_left();
        let mine: Vec<String> = rules()
            .lines()
            .filter(|line| line.contains("10.99.0.") && !line.contains("10.99.0.0/24"))
            .map(str::to_owned)
            .collect();
        assert_eq!(mine, Vec::<String>::new(), "rules of the pod are left; before:\n{before}");
        assert!(!rules().contains("8080") && !rules().contains("CNI-a"), "{}", rules());
    });
}

#[test]
fn nothing_is_left_after_many_pods() {
    on_a_network(|host, cni| {
        let leases = || {
            let mut names: Vec<_> = std::fs::read_dir("/var/lib/cni/networks/nacelle")
                .map(|d| d.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
                .unwrap_or_default();
            names.retain(|n: &String| n.starts_with("10.") || n.starts_with("fd"));
            names
        };
        let links = || run("ip", &["-o", "link"]).lines().count();
        let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        // The first pod creates the bridge and the plugins' chains.
        attach(host, cni, pod("first"));
        host.runtime.block_on(cni.detach("first")).unwrap();
        let (links_before, rules_before, fds_before) = (links(), rules().lines().count(), fds());
        host.runtime.block_on(async {
            let pods: Vec<String> = (0..12).map(|n| format!("pod{n}")).collect();
            let jobs: Vec<_> = pods
                .iter()
                .map(|id| {
                    let (cni, p) = (cni.clone(), pod(id));
                    tokio::spawn(async move {
                        let id = p.id.clone();
                        let a = cni.attach(p).await.unwrap();
                        drop(cni.open_taps(&id, a.interface_names()).await.unwrap());
                        a.addresses[0]
                    })
                })
                .collect();
            let mut addresses = Vec::new();
            for job in jobs {
                addresses.push(job.await.unwrap());
            }
            addresses.sort();
            addresses.dedup();
            assert_eq!(addresses.len(), 12, "an address was assigned twice");
            // The daemon is killed; its successor knows half of the pods.
            let successor = host.cni();
            successor.collect(&pods[..6]).await.unwrap();
            for id in &pods[..6] {
                successor.detach(id).await.unwrap();
            }
        });
        host.nothing_left();
        assert_eq!(leases(), Vec::<String>::new());
        assert_eq!(links(), links_before);
        assert_eq!(rules().lines().count(), rules_before, "{}", rules());
        // Other tests of this process open files meanwhile.
        assert!(fds() < fds_before + 40, "{} open files, {fds_before} before", fds());
    });
}

#[test]
fn point_to_point_routes_are_passed_on() {
    on_a_network(|host, cni| {
        host.conflist(
            r#"{"cniVersion":"0.4.0","name":"p2p","plugins":[{"type":"ptp","mtu":1300,"ipam":
               {"type":"host-local","subnet":"10.98.0.0/24","routes":[{"dst":"0.0.0.0/0"}]}}]}"#,
        );
        let (a, b) = (attach(host, cni, pod("a")), attach(host, cni, pod("b")));
        assert_eq!(a.interfaces[0].mtu, 1300);
        assert!(a.interfaces[0].addresses[0].ends_with("/32"), "{:?}", a.interfaces);
        let gateways: Vec<&str> = a.routes.iter().map(|r| r.gateway.as_str()).collect();
        assert_eq!(gateways[0], "", "on-link routes come first: {:?}", a.routes);
        let (one, two) = (Guest::boot(host, cni, "a", &a), Guest::boot(host, cni, "b", &b));
        let server = serve(&two.netns, "0.0.0.0:7000");
        ask(Some(&one.netns), &format!("{}:7000", address(&b, false)));
        server.join().unwrap();
        drop((one, two));
        for id in ["a", "b"] {
            host.runtime.block_on(cni.detach(id)).unwrap();
        }
        host.nothing_left();
    });
}

#[test]
fn check_succeeds_for_an_attached_pod() {
    on_a_network(|host, cni| {
        let a = attach(host, cni, pod("a"));
        host.runtime.block_on(cni.check("a", &a)).unwrap();
        assert_eq!(host.runtime.block_on(cni.trouble()), None);
        run_in(&a.netns, "ip", &["link", "del", "eth0"]);
        assert!(host.runtime.block_on(cni.check("a", &a)).is_err());
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}

/// A pod that asks for the default network, on a host without CNI configuration.
fn on_the_built_in_network(ipv6: bool) {
    on_a_network(move |host, cni| {
        std::fs::remove_dir_all(host.path("conf")).unwrap();
        let switch = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
        if !ipv6 && let Err(e) = std::fs::write(switch, "1") {
            println!("SKIP: IPv6 cannot be disabled here ({e})");
            return;
        }
        let a = attach(host, cni, network::Pod { default_network: true, ..pod("a") });
        assert_eq!(a.addresses.iter().any(|a| a.is_ipv6()), ipv6, "{:?}", a.addresses);
        assert!(address(&a, false).starts_with("10.213."), "{:?}", a.addresses);
        let guest = Guest::boot(host, cni, "a", &a);
        let listener = TcpListener::bind("10.213.0.1:7003").unwrap();
        let server = std::thread::spawn(move || listener.accept().unwrap().1.ip());
        inside(&guest.netns, || {
            TcpStream::connect_timeout(&"10.213.0.1:7003".parse().unwrap(), TIMEOUT).unwrap()
        });
        assert_eq!(server.join().unwrap().to_string(), address(&a, false));
        assert!(rules().contains("MASQUERADE"), "{}", rules());
        drop(guest);
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn the_built_in_network_works_with_both_families() {
    on_the_built_in_network(true);
}

#[test]
fn the_built_in_network_works_on_a_host_without_ipv6() {
    on_the_built_in_network(false);
}
