//! Test guests without a VM. A second network namespace acts as the guest: it is configured from
//! the attachment only, and a thread copies frames between its taps and the pod's, as the VM's NIC
//! would, with virtio-net headers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use network::{Attachment, Cni, Pod};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

use super::{Host, on_a_host, run, run_in};

/// Maximum frame size with offloads, and the header.
const FRAME: usize = 65_536 + 64;
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a test with Debian's plugins on a host with the default network.
pub fn on_a_network(body: impl FnOnce(&Host, &Cni) + Send + 'static) {
    if !Path::new("/usr/lib/cni/bridge").exists() && !Path::new("/opt/cni/bin/bridge").exists() {
        println!("SKIP: no CNI plugins (Debian package containernetworking-plugins)");
        return;
    }
    on_a_host(|host| {
        let text = network::default_conflist(Some("10.99.0.0/24"), Some("fd99::/64")).unwrap();
        host.conflist(&text);
        body(host, &host.cni());
    });
}

/// A test guest: a namespace, and for each interface a thread that copies frames between two taps.
pub struct Guest {
    pub netns: PathBuf,
    stop: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
}

impl Guest {
    pub fn boot(host: &Host, cni: &Cni, id: &str, attachment: &Attachment) -> Self {
        let netns = host.path("netns").join(format!("guest-{id}"));
        let name = netns.display().to_string();
        std::fs::write(&netns, "").unwrap();
        run("unshare", &["--net", "mount", "--bind", "/proc/self/ns/net", &name]);
        let taps = host.runtime.block_on(cni.open_taps(id, attachment.interface_names())).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let ip = |args: &[&str]| run_in(&netns, "ip", args);
        ip(&["link", "set", "lo", "up"]);
        let mut pairs = Vec::new();
        for (interface, tap) in attachment.interfaces.iter().zip(taps) {
            let name = interface.name.as_str();
            pairs.push((inside(&netns, || super::tap::open(name)), tap));
            let mac: Vec<String> = interface.mac.iter().map(|b| format!("{b:02x}")).collect();
            let mtu = interface.mtu.to_string();
            ip(&["link", "set", name, "address", &mac.join(":"), "mtu", &mtu]);
            ip(&["link", "set", name, "up"]);
            for address in &interface.addresses {
                let mut args = vec!["addr", "add", address, "dev", name];
                if address.contains(':') {
                    args.push("nodad");
                }
                ip(&args);
            }
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
        let pumps = pairs
            .into_iter()
            .map(|(ours, theirs)| {
                let stop = stop.clone();
                std::thread::spawn(move || pump(&ours, &theirs, &stop))
            })
            .collect();
        Self { netns, stop, pumps }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
        // Detached: between fork and exec, a child of a test on another thread has a copy of each
        // descriptor of this process, also of those that `inside` opens in this mount.
        nix::mount::umount2(&self.netns, nix::mount::MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_file(&self.netns).unwrap();
    }
}

/// Copies frames with their virtio-net headers in both directions.
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
                // A full queue drops frames.
                let _ = nix::unistd::write(to, &frame[..n]);
            }
        }
    }
}

/// Runs `work` on a thread in a namespace.
pub fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(netns).unwrap();
    std::thread::scope(|scope| {
        let job = scope.spawn(|| {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        job.join().unwrap()
    })
}

/// Replies to each connection with its source address and all received bytes.
pub fn serve(netns: &Path, address: &str) -> JoinHandle<()> {
    let listener = inside(netns, || TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(format!("{}\n", peer.ip().to_canonical()).as_bytes()).unwrap();
        stream.write_all(&all).unwrap();
    })
}

/// Sends data to a server of [`serve`] and checks the reply; returns the source address.
pub fn ask(netns: Option<&Path>, address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    let connect = || {
        TcpStream::connect_timeout(&address, TIMEOUT)
            .unwrap_or_else(|e| panic!("from {netns:?} to {address}: {e}"))
    };
    let mut stream = match netns {
        Some(netns) => inside(netns, connect),
        None => connect(),
    };
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let sent: Vec<u8> = (0..400_000_u32).map(|i| (i % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.iter().position(|b| *b == b'\n').unwrap();
    assert!(answer[end + 1..] == sent[..], "the received bytes differ");
    String::from_utf8(answer[..end].to_vec()).unwrap()
}

pub fn address(attachment: &Attachment, v6: bool) -> String {
    let ip = attachment.addresses.iter().find(|a| a.is_ipv6() == v6).unwrap();
    if v6 { format!("[{ip}]") } else { ip.to_string() }
}

pub fn attach(host: &Host, cni: &Cni, pod: Pod) -> Attachment {
    host.runtime.block_on(cni.attach(pod)).unwrap_or_else(|e| panic!("{e:?}"))
}

pub fn rules() -> String {
    ["iptables-save", "ip6tables-save"].map(|program| run(program, &[])).concat()
}
