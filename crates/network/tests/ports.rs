//! hostPorts with Debian's `portmap`: all protocols, both families, one or all host addresses.
//! Needs root, iproute2 and iptables.

mod common;

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::guest::{Guest, TIMEOUT, ask, attach, inside, on_a_network, rules, serve};
use common::{Host, pod, run, run_in, sctp};
use network::{Cni, Pod, PortMapping, Protocol};

fn port(protocol: Protocol, host_port: u16, container_port: u16, host_ip: &str) -> PortMapping {
    PortMapping { protocol, container_port, host_port, host_ip: host_ip.parse().ok() }
}

/// A client outside of the host, which has 192.0.2.1, 192.0.2.7 and 2001:db8::1 there.
struct Outside(PathBuf);

impl Outside {
    fn new(host: &Host) -> Self {
        let path = host.path("outside");
        std::fs::write(&path, "").unwrap();
        let name = path.display().to_string();
        run("unshare", &["--net", "mount", "--bind", "/proc/self/ns/net", &name]);
        run("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        run("ip", &["link", "set", "up1", "netns", &name]);
        for address in ["192.0.2.1/24", "192.0.2.7/24"] {
            run("ip", &["addr", "add", address, "dev", "up0"]);
        }
        run("ip", &["-6", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
        run("ip", &["link", "set", "up0", "up"]);
        run_in(&path, "ip", &["addr", "add", "192.0.2.2/24", "dev", "up1"]);
        run_in(&path, "ip", &["-6", "addr", "add", "2001:db8::2/64", "dev", "up1", "nodad"]);
        run_in(&path, "ip", &["link", "set", "up1", "up"]);
        Self(path)
    }

    fn reaches(&self, address: &str) -> bool {
        let address: SocketAddr = address.parse().unwrap();
        let knock = || TcpStream::connect_timeout(&address, Duration::from_secs(2));
        inside(&self.0, knock).is_ok()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
        let _ = std::fs::remove_file(&self.0);
    }
}

fn with_ports(ports: Vec<PortMapping>, body: impl FnOnce(&Guest, &Outside) + Send + 'static) {
    on_a_network(move |host: &Host, cni: &Cni| {
        let outside = Outside::new(host);
        let a = attach(host, cni, Pod { ports, ..pod("a") });
        let guest = Guest::boot(host, cni, "a", &a);
        let started = Instant::now();
        while !run("ip", &["-6", "addr", "show", "tentative"]).is_empty() {
            assert!(started.elapsed() < TIMEOUT, "an address is still tentative");
            std::thread::sleep(Duration::from_millis(50));
        }
        body(&guest, &outside);
        drop((guest, outside));
        host.runtime.block_on(cni.detach("a")).unwrap();
        host.nothing_left();
        for rule in ["8080", "8081", "8053", "5060"] {
            assert!(!rules().contains(&format!("dport {rule}")), "{}", rules());
        }
    });
}

#[test]
fn one_port_serves_both_families() {
    let ports = vec![port(Protocol::Tcp, 8080, 80, ""), port(Protocol::Udp, 8053, 53, "")];
    with_ports(ports, |guest, outside| {
        for (bind, to, from) in
            [("0.0.0.0", "192.0.2.1", "192.0.2.2"), ("[::]", "[2001:db8::1]", "2001:db8::2")]
        {
            let server = serve(&guest.netns, &format!("{bind}:80"));
            assert_eq!(ask(Some(&outside.0), &format!("{to}:8080")), from);
            server.join().unwrap();
            let bind_udp = |netns, address: String| {
                let socket = inside(netns, || UdpSocket::bind(address).unwrap());
                socket.set_read_timeout(Some(TIMEOUT)).unwrap();
                socket
            };
            let server = bind_udp(&guest.netns, format!("{bind}:53"));
            let client = bind_udp(&outside.0, format!("{bind}:0"));
            client.send_to(b"name?", format!("{to}:8053")).unwrap();
            let mut buffer = [0; 16];
            let (n, peer) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..n], peer.ip().to_string().as_str()), (&b"name?"[..], from));
            // The reply has the source address to which the request was sent.
            server.send_to(b"this", peer).unwrap();
            let (n, peer) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], b"this");
            assert_eq!(peer, format!("{to}:8053").parse().unwrap());
        }
    });
}

#[test]
fn a_port_with_a_host_ip_is_open_on_that_address_only() {
    let ports = vec![
        port(Protocol::Tcp, 8080, 80, "192.0.2.7"),
        port(Protocol::Tcp, 8081, 81, "2001:db8::1"),
    ];
    with_ports(ports, |guest, outside| {
        let server = serve(&guest.netns, "0.0.0.0:80");
        assert!(!outside.reaches("192.0.2.1:8080") && !outside.reaches("[2001:db8::1]:8080"));
        assert_eq!(ask(Some(&outside.0), "192.0.2.7:8080"), "192.0.2.2");
        server.join().unwrap();
        let server = serve(&guest.netns, "[::]:81");
        assert!(!outside.reaches("192.0.2.1:8081"));
        assert_eq!(ask(Some(&outside.0), "[2001:db8::1]:8081"), "2001:db8::2");
        server.join().unwrap();
    });
}

#[test]
fn sctp_ports_are_mapped_if_the_kernel_tracks_sctp() {
    if !Path::new("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_closed").exists() {
        println!("SKIP: the kernel does not track SCTP (NF_CT_PROTO_SCTP)");
        return;
    }
    let ports = vec![port(Protocol::Sctp, 5060, 6050, "")];
    with_ports(ports, |guest, outside| {
        let rules = rules();
        assert!(rules.contains("-p sctp") && rules.contains("--dport 5060"), "{rules}");
        let server = inside(&guest.netns, || sctp::socket(TIMEOUT));
        let client = inside(&outside.0, || sctp::socket(TIMEOUT));
        sctp::send_init(&client, 4000, "192.0.2.1".parse().unwrap(), 5060);
        let arrived = sctp::recv_init(&server);
        assert_eq!(arrived, Some(("192.0.2.2".parse().unwrap(), 6050)));
    });
}
