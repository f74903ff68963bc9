//! A network namespace that somebody else has connected. Needs root and iproute2.

mod common;

use std::path::Path;

use common::{on_a_host, run, run_in};
use network::existing;

/// A namespace with an interface at an address, a gateway, and the other end on the host.
fn connected(path: &Path) {
    let name = path.display().to_string();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "").unwrap();
    run("unshare", &[&format!("--net={name}"), "true"]);
    run("ip", &["link", "add", "host0", "type", "veth", "peer", "name", "eth0"]);
    run("ip", &["addr", "add", "10.97.0.1/24", "dev", "host0"]);
    run("ip", &["link", "set", "host0", "up"]);
    let holder = std::process::Command::new("nsenter")
        .args([&format!("--net={name}"), "sleep", "60"])
        .spawn()
        .unwrap();
    let pid = holder.id().to_string();
    // The process has to be in the namespace before it can be named by it.
    let inside = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    while inside(&pid).is_none_or(|netns| netns == own) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    run("ip", &["link", "set", "eth0", "netns", &pid]);
    let mut holder = holder;
    holder.kill().unwrap();
    holder.wait().unwrap();
    run_in(path, "ip", &["addr", "add", "10.97.0.2/24", "dev", "eth0"]);
    run_in(path, "ip", &["link", "set", "eth0", "up"]);
    run_in(path, "ip", &["route", "add", "default", "via", "10.97.0.1"]);
}

fn links(path: &Path) -> String {
    run_in(path, "ip", &["-o", "link"])
}

#[test]
fn interfaces_of_anybodys_namespace_are_joined_to_taps_and_parted_again() {
    on_a_host(|host| {
        let path = host.path("theirs/a");
        connected(&path);
        let block = |future| host.runtime.block_on(future);
        let made = block(existing::attach(path.clone())).unwrap();
        assert_eq!(made.addresses, ["10.97.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((made.interfaces.len(), &*made.interfaces[0].name), (1, "eth0"));
        assert_eq!((made.routes.len(), &*made.routes[0].gateway), (1, "10.97.0.1"));
        assert!(links(&path).contains("tap0"));
        let taps = host.runtime.block_on(existing::open_taps(path.clone(), made.clone()));
        drop(taps.unwrap());
        // Of a caller that died in the middle nothing is in the way.
        assert_eq!(block(existing::attach(path.clone())).unwrap(), made);
        for _ in 0..2 {
            host.runtime.block_on(existing::detach(path.clone())).unwrap();
            assert!(!links(&path).contains("tap0"), "{}", links(&path));
            let filters = run_in(&path, "tc", &["qdisc", "show", "dev", "eth0"]);
            assert!(!filters.contains("ingress"), "{filters}");
        }
        assert!(run_in(&path, "ip", &["addr"]).contains("10.97.0.2"), "it is theirs");
        run("umount", &[&path.display().to_string()]);
    });
}

#[test]
fn a_namespace_without_interfaces_or_one_that_has_gone_is_no_error() {
    on_a_host(|host| {
        let path = host.path("theirs/b");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        run("unshare", &[&format!("--net={}", path.display()), "true"]);
        let made = host.runtime.block_on(existing::attach(path.clone())).unwrap();
        assert!(made.interfaces.is_empty() && made.addresses.is_empty());
        host.runtime.block_on(existing::detach(path.clone())).unwrap();
        run("umount", &[&path.display().to_string()]);
        host.runtime.block_on(existing::detach(path.clone())).unwrap();
        assert!(host.runtime.block_on(existing::attach(path)).is_err());
    });
}
