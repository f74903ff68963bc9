//! Pods on a real network: Debian's plugins (containernetworking-plugins), a bridge, masquerading,
//! published ports. A second network namespace plays the guest: it is configured from the
//! attachment alone, and a pump between its tap and the pod's plays the VM's NIC, virtio-net
//! headers and all. Needs root, iproute2 and iptables.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Host, on_a_host, pod, run, run_in};
use network::{Attachment, Cni, Pod, PortMapping, Protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

/// The largest frame with offloads, and its header.
const FRAME: usize = 65_536 + 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test where the plugins are, on a host with a network of the default form.
fn on_a_network(body: impl FnOnce(&Host, &Cni) + Send + 'static) {
    if !Path::new("/usr/lib/cni/bridge").exists() && !Path::new("/opt/cni/bin/bridge").exists() {
        println!("SKIP: the CNI plugins are missing (Debian package containernetworking-plugins)");
        return;
    }
    on_a_host(|host| {
        let text = network::default_conflist(Some("10.99.0.0/24"), Some("fd99::/64")).unwrap();
        host.conflist(&text);
        body(host, &host.cni());
    });
}

/// A stand-in for a VM: its own namespace, and a pump between two taps.
struct Guest {
    netns: PathBuf,
    stop: Arc<AtomicBool>,
    pump: Option<JoinHandle<()>>,
}

impl Guest {
    fn boot(host: &Host, cni: &Cni, id: &str, attachment: &Attachment) -> Self {
        let netns = host.path("netns").join(format!("guest-{id}"));
        let name = netns.display().to_string();
        std::fs::write(&netns, "").unwrap();
        run("unshare", &["--net", "mount", "--bind", "/proc/self/ns/net", &name]);
        let taps = host.runtime.block_on(cni.open_taps(id, attachment)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let interface = &attachment.interfaces[0];
        let eth = inside(&netns, || tap("eth0"));
        let mac: Vec<String> = interface.mac.iter().map(|b| format!("{b:02x}")).collect();
        let ip = |args: &[&str]| run_in(&netns, "ip", args);
        ip(&["link", "set", "lo", "up"]);
        ip(&["link", "set", "eth0", "address", &mac.join(":"), "mtu", &interface.mtu.to_string()]);
        ip(&["link", "set", "eth0", "up"]);
        for address in &interface.addresses {
            let mut args = vec!["addr", "add", address, "dev", "eth0"];
            if address.contains(':') {
                args.push("nodad");
            }
            ip(&args);
        }
        for route in &attachment.routes {
            let family = if route.gateway.contains(':') || route.destination.contains(':') {
                "-6"
            } else {
                "-4"
            };
            let destination =
                if route.destination.is_empty() { "default" } else { &route.destination };
            let mut args = vec![family, "route", "add", destination, "dev", &route.interface];
            if !route.gateway.is_empty() {
                args.extend(["via", &route.gateway]);
            }
            ip(&args);
        }
        let pump = std::thread::spawn({
            let stop = stop.clone();
            move || pump(&eth, &taps[0], &stop)
        });
        Self { netns, stop, pump: Some(pump) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.pump.take().unwrap().join();
        nix::mount::umount(&self.netns).unwrap();
        std::fs::remove_file(&self.netns).unwrap();
    }
}

/// Carries whole frames with their virtio-net headers both ways.
fn pump(one: &OwnedFd, other: &OwnedFd, stop: &AtomicBool) {
    let mut frame = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [
            PollFd::new(one.as_fd(), PollFlags::POLLIN),
            PollFd::new(other.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::from(50_u8));
        let ready: Vec<bool> = fds.iter().map(|f| f.any() == Some(true)).collect();
        for (from, to, ready) in [(one, other, ready[0]), (other, one, ready[1])] {
            if ready && let Ok(n) = nix::unistd::read(from, &mut frame) {
                // A full queue drops frames, as a wire does.
                let _ = nix::unistd::write(to, &frame[..n]);
            }
        }
    }
}

/// A tap with virtio-net headers, made by the `ip` tool and opened like any VMM would.
fn tap(name: &str) -> OwnedFd {
    common::tap::open(name)
}

/// Runs something on a thread inside a namespace.
fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(netns).unwrap();
    std::thread::scope(|scope| {
        let job = scope.spawn(|| {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        job.join().unwrap()
    })
}

/// Answers each connection with the address it came from and all that it sent.
fn serve(netns: &Path, address: &str) -> JoinHandle<()> {
    let listener = inside(netns, || TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(format!("{}\n", peer.ip().to_canonical()).as_bytes()).unwrap();
        stream.write_all(&all).unwrap();
    })
}

/// Sends a lot to a server of [`serve`] and checks that it comes back; the address it saw.
fn ask(netns: Option<&Path>, address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    let connect = || {
        TcpStream::connect_timeout(&address, PATIENCE)
            .unwrap_or_else(|e| panic!("from {netns:?} to {address}: {e}"))
    };
    let mut stream = match netns {
        Some(netns) => inside(netns, connect),
        None => connect(),
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let sent: Vec<u8> = (0..400_000_u32).map(|i| (i % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.iter().position(|b| *b == b'\n').unwrap();
    assert!(answer[end + 1..] == sent[..], "the bytes that came back are others");
    String::from_utf8(answer[..end].to_vec()).unwrap()
}

fn address(attachment: &Attachment, v6: bool) -> String {
    let ip = attachment.addresses.iter().find(|a| a.is_ipv6() == v6).unwrap();
    if v6 { format!("[{ip}]") } else { ip.to_string() }
}

fn attach(host: &Host, cni: &Cni, pod: Pod) -> Attachment {
    host.runtime.block_on(cni.attach(pod)).unwrap_or_else(|e| panic!("{e:?}"))
}

fn rules() -> String {
    ["iptables-save", "ip6tables-save"].map(|program| run(program, &[])).concat()
}

#[test]
fn pods_reach_each_other_and_the_host_in_both_families() {
    on_a_network(|host, cni| {
        let (a, b) = (attach(host, cni, pod("a")), attach(host, cni, pod("b")));
        let (one, two) = (Guest::boot(host, cni, "a", &a), Guest::boot(host, cni, "b", &b));
        // The bridge plugin does not wait for the kernel to make sure of the gateway's address, and
        // what the host says meanwhile comes from its link-local one.
        let started = Instant::now();
        while !run("ip", &["-6", "addr", "show", "tentative"]).is_empty() {
            assert!(started.elapsed() < PATIENCE, "the gateway's address stays tentative");
            std::thread::sleep(Duration::from_millis(50));
        }
        for v6 in [false, true] {
            let any = if v6 { "[::]" } else { "0.0.0.0" };
            let server = serve(&two.netns, &format!("{any}:7000"));
            let seen = ask(Some(&one.netns), &format!("{}:7000", address(&b, v6)));
            assert_eq!(
                seen,
                address(&a, v6).trim_matches(['[', ']']),
                "a pod's address is its own"
            );
            server.join().unwrap();
            let server = serve(&two.netns, &format!("{any}:7001"));
            ask(None, &format!("{}:7001", address(&b, v6)));
            server.join().unwrap();
        }
        // From a pod to the host, by the gateway's address.
        let listener = TcpListener::bind("10.99.0.1:7002").unwrap();
        let server = std::thread::spawn(move || listener.accept().unwrap().1.ip());
        inside(&one.netns, || {
            TcpStream::connect_timeout(&"10.99.0.1:7002".parse().unwrap(), PATIENCE).unwrap()
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
fn the_namespaces_own_kernel_never_answers_in_the_guests_place() {
    on_a_network(|host, cni| {
        let a = attach(host, cni, pod("a"));
        let knock = |v6| {
            let door: SocketAddr = format!("{}:9", address(&a, v6)).parse().unwrap();
            TcpStream::connect_timeout(&door, Duration::from_secs(1)).unwrap_err().kind()
        };
        for v6 in [false, true] {
            // A closed port of somebody who is there says so.
            assert_ne!(knock(v6), ErrorKind::ConnectionRefused, "something answered");
            let ip = address(&a, v6);
            let ip = ip.trim_matches(['[', ']']);
            let neighbours = run("ip", &["neigh", "show", "to", ip]);
            assert!(!neighbours.contains("lladdr"), "something answered: {neighbours}");
        }
        let guest = Guest::boot(host, cni, "a", &a);
        for v6 in [false, true] {
            let started = Instant::now();
            while knock(v6) != ErrorKind::ConnectionRefused {
                assert!(started.elapsed() < PATIENCE, "the guest does not answer");
            }
        }
        drop(guest);
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
    });
}

#[test]
fn published_ports_lead_into_the_pod_and_vanish_with_it() {
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
        // Somebody outside of the host.
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
        assert_eq!(seen, "192.0.2.2", "the pod sees who asks");
        server.join().unwrap();
        let server = serve(&guest.netns, "0.0.0.0:80");
        ask(None, "127.0.0.1:8080");
        server.join().unwrap();
        // Datagrams.
        let socket = inside(&guest.netns, || UdpSocket::bind("0.0.0.0:53").unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = inside(&outside, || UdpSocket::bind("0.0.0.0:0").unwrap());
        client.send_to(b"name?", "192.0.2.1:8053").unwrap();
        let mut buffer = [0; 16];
        let (n, peer) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..n], peer.ip().to_string().as_str()), (&b"name?"[..], "192.0.2.2"));
        // The way out: masqueraded as the host.
        let server = serve(&outside, "192.0.2.2:9000");
        assert_eq!(ask(Some(&guest.netns), "192.0.2.2:9000"), "192.0.2.1");
        server.join().unwrap();
        drop(guest);
        assert!(rules().contains("8080"));
        host.runtime.block_on(cni.detach("a")).unwrap();
        nix::mount::umount(&outside).unwrap();
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
fn nothing_is_left_after_many_pods_come_and_go() {
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
        // The first pod makes the bridge and the plugins' own chains.
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
                        drop(cni.open_taps(&id, &a).await.unwrap());
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
            assert_eq!(addresses.len(), 12, "an address was given twice");
            // A daemon that was killed: its successor knows half of them.
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
        // Other tests of this process open and close files meanwhile.
        assert!(fds() < fds_before + 40, "{} open files, {fds_before} before", fds());
    });
}

#[test]
fn point_to_point_routes_are_carried_over() {
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
fn the_plugins_own_check_is_content_with_a_pod() {
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
