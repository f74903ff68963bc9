//! The features in docs/guest-kernel.md, tested in a privileged container: one row of a table per
//! feature. All rows run; failures are reported together.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use cri::v1;

use super::Story;
use crate::client::container;
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("the guest kernel has the documented firewall modules", firewall),
    ("the guest kernel has the documented network features", network),
    ("the guest kernel has the documented storage features", storage),
    ("the guest kernel has the documented tracing and system calls", tracing),
];

/// A feature, and shell lines that fail without it.
struct Row {
    what: String,
    lines: String,
}

/// Limit of a table, seconds; in a lab, a process takes a tenth of a second.
const LIMIT: i64 = 300;

fn firewall() -> Result<()> {
    let mut rows = Vec::new();
    for (end, family) in FRONT_ENDS {
        let mut chains = String::new();
        for table in ["filter", "nat", "mangle", "raw", "security"] {
            let _ = writeln!(chains, "{end} -w -t {table} -N X");
        }
        rows.push(Row { what: format!("{end}: tables"), lines: chains });
        for (families, table, spec) in XTABLES {
            if families.contains(*family) {
                let lines = format!("{end} -w -t {table} -A X {spec}");
                rows.push(Row { what: format!("{end}: {spec}"), lines });
            }
        }
    }
    for end in ["ebtables-legacy", "ebtables-nft"] {
        let chains = format!("{end} -t filter -N X; {end} -t nat -N X");
        rows.push(Row { what: format!("{end}: tables"), lines: chains });
        for (table, spec) in EBTABLES {
            let lines = format!("{end} -t {table} -A {spec}");
            rows.push(Row { what: format!("{end}: {spec}"), lines });
        }
    }
    // ebtables-nft has no broute table.
    rows.push(row("ebtables-legacy: broute", "ebtables-legacy -t broute -A BROUTING -j ACCEPT"));
    for end in ["arptables-legacy", "arptables-nft"] {
        let spec = "-A OUTPUT -o lo -j mangle --mangle-ip-s 10.0.0.1";
        rows.push(Row { what: format!("{end}: {spec}"), lines: format!("{end} {spec}") });
    }
    for (chain, rule) in NFTABLES {
        let lines = format!("nft 'add rule {chain} {rule}'");
        rows.push(Row { what: format!("nft: {chain}: {rule}"), lines });
    }
    for kind in IPSETS {
        let name = kind.split(' ').next().unwrap_or_default().replace([':', ','], "-");
        let lines = format!("ipset create {name} {kind}");
        rows.push(Row { what: format!("ipset {kind}"), lines });
    }
    for scheduler in ["rr", "wrr", "lc", "wlc", "dh", "sh", "mh", "sed", "nq", "fo", "ovf"] {
        let lines = format!(
            "ipvsadm -A -t 10.9.0.1:80 -s {scheduler}
             ipvsadm -a -t 10.9.0.1:80 -r 10.9.0.2:80 -m
             ipvsadm -D -t 10.9.0.1:80"
        );
        rows.push(Row { what: format!("ipvs scheduler {scheduler}"), lines });
    }
    rows.extend(FIREWALL.iter().map(|(what, lines)| row(what, lines)));
    try_all(FIREWALL_PRELUDE, &rows)
}

/// A program for packet filter rules, and the address family of its rules.
const FRONT_ENDS: &[(&str, char)] = &[
    ("iptables-legacy", '4'),
    ("iptables-nft", '4'),
    ("ip6tables-legacy", '6'),
    ("ip6tables-nft", '6'),
];

/// Sets, objects and tables that rules refer to.
const FIREWALL_PRELUDE: &str = "
mkdir -p /etc/xtables && echo '1 one' > /etc/xtables/connlabel.conf
ipset create s4 hash:ip && ipset create s6 hash:ip family inet6
nfacct add counted
nft -f - <<'END'
table inet t {
    ct helper ftp { type \"ftp\" protocol tcp; }
    ct timeout short { protocol tcp; l3proto ip; policy = { established: 60 }; }
    ct expectation e { protocol tcp; dport 1; timeout 1m; size 1; l3proto ip; }
    synproxy s { mss 1460; wscale 7; timestamp sack-perm; }
    flowtable f { hook ingress priority 0; devices = { lo }; }
    chain c { }
    chain raw { type filter hook prerouting priority raw; }
    chain through { type filter hook forward priority 0; }
    chain pre { type nat hook prerouting priority dstnat; }
    chain post { type nat hook postrouting priority srcnat; }
    chain transparent { type filter hook prerouting priority mangle; }
}
table ip t4 { chain c { type filter hook output priority 10; }; }
table ip6 t6 { chain c { type filter hook output priority 10; }; }
table arp t { chain c { type filter hook input priority 0; }; }
table bridge t { chain c { type filter hook prerouting priority 0; }; }
table netdev t {
    chain in { type filter hook ingress device lo priority 0; }
    chain out { type filter hook egress device lo priority 0; }
}
END
";

/// Address families, table, match and target. No rule jumps to their chain.
const XTABLES: &[(&str, &str, &str)] = &[
    ("46", "mangle", "-m addrtype --dst-type LOCAL"),
    ("4", "mangle", "-m bpf --bytecode '4,48 0 0 9,21 0 1 6,6 0 0 1,6 0 0 0'"),
    ("6", "mangle", "-m bpf --bytecode '1,6 0 0 1'"),
    ("46", "mangle", "-m cgroup --cgroup 1"),
    ("46", "mangle", "-m cgroup --path /"),
    (
        "46",
        "mangle",
        "-m cluster --cluster-total-nodes 2 --cluster-local-node 1 --cluster-hash-seed 7",
    ),
    ("46", "mangle", "-m comment --comment text"),
    ("46", "mangle", "-m connbytes --connbytes 1: --connbytes-dir both --connbytes-mode packets"),
    ("46", "mangle", "-m connlabel --label one"),
    ("46", "mangle", "-p tcp --syn -m connlimit --connlimit-above 5"),
    ("46", "mangle", "-m connmark --mark 1"),
    ("46", "mangle", "-m conntrack --ctstate NEW"),
    ("46", "mangle", "-m cpu --cpu 0"),
    ("46", "mangle", "-p dccp -m dccp --dport 1"),
    ("46", "mangle", "-m devgroup --src-group 1"),
    ("46", "mangle", "-m dscp --dscp 1"),
    ("46", "mangle", "-p tcp -m ecn --ecn-tcp-cwr"),
    ("46", "mangle", "-p esp -m esp --espspi 1"),
    (
        "46",
        "mangle",
        "-m hashlimit --hashlimit-name x --hashlimit-mode srcip --hashlimit-upto 1/sec",
    ),
    ("46", "mangle", "-m helper --helper ftp"),
    ("4", "mangle", "-m ttl --ttl-eq 1"),
    ("6", "mangle", "-m hl --hl-eq 1"),
    ("46", "mangle", "-p ipcomp -m ipcomp --ipcompspi 1"),
    ("4", "mangle", "-m iprange --src-range 10.0.0.1-10.0.0.2"),
    ("6", "mangle", "-m iprange --src-range fd00::1-fd00::2"),
    ("46", "mangle", "-m ipvs --ipvs"),
    ("46", "mangle", "-m length --length 1"),
    ("46", "mangle", "-m limit --limit 1/s"),
    ("46", "mangle", "-m mac --mac-source 02:00:00:00:00:01"),
    ("46", "mangle", "-m mark --mark 1"),
    ("46", "mangle", "-p tcp -m multiport --dports 1,2:3"),
    ("46", "mangle", "-m nfacct --nfacct-name counted"),
    ("4", "mangle", "-p tcp -m osf --genre Linux"),
    ("46", "mangle", "-m owner --uid-owner 1337"),
    ("46", "mangle", "-m physdev --physdev-is-bridged"),
    ("46", "mangle", "-m pkttype --pkt-type multicast"),
    ("46", "mangle", "-m policy --dir in --pol ipsec"),
    ("46", "mangle", "-m quota --quota 1"),
    ("46", "mangle", "-j RATEEST --rateest-name r --rateest-interval 250ms --rateest-ewma 0.5s"),
    ("46", "mangle", "-m rateest --rateest r --rateest-lt --rateest-bps 1mbit"),
    ("4", "mangle", "-m realm --realm 1"),
    ("46", "mangle", "-m recent --name r --set"),
    ("46", "raw", "-m rpfilter --invert"),
    ("46", "mangle", "-p sctp -m sctp --dport 1"),
    ("4", "mangle", "-m set --match-set s4 src"),
    ("6", "mangle", "-m set --match-set s6 src"),
    ("46", "mangle", "-m socket --transparent"),
    ("46", "mangle", "-m state --state NEW"),
    ("46", "mangle", "-m statistic --mode nth --every 2 --packet 0"),
    ("46", "mangle", "-m string --algo bm --string x"),
    ("46", "mangle", "-m string --algo kmp --string x"),
    ("46", "mangle", "-p tcp --syn -m tcpmss --mss 1"),
    ("46", "mangle", "-m time --timestart 01:00 --timestop 02:00"),
    ("46", "mangle", "-m u32 --u32 0=1"),
    ("4", "mangle", "-p ah -m ah --ahspi 1"),
    ("6", "mangle", "-m ah --ahspi 1"),
    ("6", "mangle", "-m eui64"),
    ("6", "mangle", "-m frag --fragid 1"),
    ("6", "mangle", "-m hbh --hbh-len 8"),
    ("6", "mangle", "-m dst --dst-len 8"),
    ("6", "mangle", "-m ipv6header --header hop --soft"),
    ("6", "mangle", "-p mh -m mh --mh-type 1"),
    ("6", "mangle", "-m rt --rt-type 0"),
    ("6", "mangle", "-m srh --srh-next-hdr 6"),
    ("46", "mangle", "-p udp -j CHECKSUM --checksum-fill"),
    ("46", "mangle", "-j CLASSIFY --set-class 1:1"),
    ("46", "mangle", "-j CONNMARK --save-mark"),
    ("46", "raw", "-p udp --dport 53 -j CT --zone 1"),
    ("46", "raw", "-j CT --notrack"),
    ("46", "raw", "-p tcp -j CT --helper ftp"),
    ("46", "raw", "-j NOTRACK"),
    ("46", "mangle", "-j DSCP --set-dscp 1"),
    ("46", "mangle", "-j TOS --set-tos 0x10"),
    ("4", "mangle", "-j TTL --ttl-set 5"),
    ("6", "mangle", "-j HL --hl-set 5"),
    (
        "46",
        "mangle",
        "-j HMARK --hmark-tuple src,dst --hmark-mod 10 --hmark-offset 1 --hmark-rnd 7",
    ),
    ("46", "mangle", "-j LOG --log-prefix x"),
    ("46", "mangle", "-j MARK --set-mark 1"),
    ("46", "nat", "-j MASQUERADE"),
    ("4", "nat", "-j NETMAP --to 10.0.0.0/8"),
    ("6", "nat", "-j NETMAP --to fd00::/64"),
    ("46", "mangle", "-j NFLOG --nflog-group 1"),
    ("46", "mangle", "-j NFQUEUE --queue-num 1"),
    ("46", "nat", "-p tcp -j REDIRECT --to-ports 15001"),
    ("4", "nat", "-j SNAT --to-source 10.0.0.1"),
    ("4", "nat", "-j DNAT --to-destination 10.0.0.1"),
    ("6", "nat", "-j SNAT --to-source fd00::1"),
    ("6", "nat", "-j DNAT --to-destination fd00::1"),
    ("46", "filter", "-j REJECT"),
    ("4", "mangle", "-j SET --add-set s4 src"),
    ("6", "mangle", "-j SET --add-set s6 src"),
    ("46", "filter", "-p tcp -m conntrack --ctstate INVALID,UNTRACKED -j SYNPROXY --mss 1460"),
    ("46", "mangle", "-p tcp --syn -j TCPMSS --clamp-mss-to-pmtu"),
    ("46", "mangle", "-p tcp -j TCPOPTSTRIP --strip-options timestamp"),
    ("4", "mangle", "-j TEE --gateway 10.0.0.1"),
    ("6", "mangle", "-j TEE --gateway fd00::1"),
    ("46", "mangle", "-p tcp -j TPROXY --on-port 1"),
    ("46", "raw", "-j TRACE"),
    ("4", "mangle", "-p tcp -j ECN --ecn-tcp-remove"),
    ("6", "mangle", "-j SNPT --src-pfx fd00::/64 --dst-pfx fd01::/64"),
];

/// Table, and the rule with its chain.
const EBTABLES: &[(&str, &str)] = &[
    ("filter", "X -p LENGTH --802_3-sap 0x42 -j ACCEPT"),
    ("filter", "X --among-dst 02:00:00:00:00:01, -j ACCEPT"),
    ("filter", "X -p ARP --arp-op 1 -j ACCEPT"),
    ("filter", "X -p IPv4 --ip-src 10.0.0.1 -j ACCEPT"),
    ("filter", "X -p IPv6 --ip6-src fd00::1 -j ACCEPT"),
    ("filter", "X --limit 1/s -j ACCEPT"),
    ("filter", "X --mark 1 -j ACCEPT"),
    ("filter", "X --pkttype-type broadcast -j ACCEPT"),
    ("filter", "X -d BGA --stp-type 1 -j ACCEPT"),
    ("filter", "X -p 802_1Q --vlan-id 1 -j ACCEPT"),
    ("filter", "X --log --log-prefix x -j CONTINUE"),
    ("filter", "X --nflog-group 1 -j CONTINUE"),
    ("nat", "PREROUTING -p ARP --arp-op Request -j arpreply --arpreply-mac 02:00:00:00:00:01"),
    ("nat", "PREROUTING -j dnat --to-destination 02:00:00:00:00:01"),
    ("nat", "PREROUTING -j mark --mark-set 1"),
    ("nat", "PREROUTING -j redirect"),
    ("nat", "POSTROUTING -j snat --to-source 02:00:00:00:00:01"),
];

/// Chain and statement.
const NFTABLES: &[(&str, &str)] = &[
    ("inet t c", "ct state new counter"),
    ("inet t c", "ct mark set meta mark"),
    ("inet t c", "ct count over 5 drop"),
    ("inet t raw", "udp dport 53 ct zone set 1"),
    ("inet t raw", "notrack"),
    ("inet t c", "tcp dport 21 ct helper set \"ftp\""),
    ("inet t c", "ct timeout set \"short\""),
    ("inet t c", "ct expectation set \"e\""),
    ("inet t c", "limit rate 1/second"),
    ("inet t c", "quota over 1 mbytes drop"),
    ("inet t c", "log prefix \"x\""),
    ("inet t c", "log group 1"),
    ("inet t c", "queue num 1 bypass"),
    ("inet t c", "reject"),
    ("inet t c", "reject with tcp reset"),
    ("inet t post", "masquerade"),
    ("inet t pre", "tcp dport 1 redirect to :2"),
    ("inet t pre", "dnat ip to 10.0.0.1"),
    ("inet t post", "snat ip6 to fd00::1"),
    ("inet t transparent", "tcp dport 1 tproxy to :1"),
    ("inet t transparent", "socket transparent 1 mark set 1"),
    ("inet t c", "mark set numgen inc mod 2"),
    ("inet t c", "mark set jhash ip saddr mod 2"),
    ("inet t raw", "fib saddr oif missing drop"),
    ("inet t c", "osf name \"Linux\""),
    ("inet t c", "synproxy mss 1460"),
    ("inet t c", "synproxy name \"s\""),
    ("inet t through", "ip protocol tcp flow add @f"),
    ("inet t c", "ipsec in reqid 1"),
    ("ip t4 c", "dup to 10.0.0.1"),
    ("ip6 t6 c", "dup to fd00::1"),
    ("ip t4 c", "fib daddr type local"),
    ("arp t c", "arp operation request"),
    ("bridge t c", "ct state new"),
    ("bridge t c", "meta ibrname \"br0\""),
    ("bridge t c", "reject"),
    ("netdev t in", "dup to lo"),
    ("netdev t in", "fwd to lo"),
    ("netdev t in", "fib saddr oif missing"),
    ("netdev t in", "reject"),
    ("netdev t out", "drop"),
];

const IPSETS: &[&str] = &[
    "bitmap:ip range 10.0.0.0/24",
    "bitmap:ip,mac range 10.0.0.0/24",
    "bitmap:port range 1-100",
    "hash:ip",
    "hash:ip,mark",
    "hash:ip,port",
    "hash:ip,port,ip",
    "hash:ip,port,net",
    "hash:ip,mac",
    "hash:mac",
    "hash:net",
    "hash:net,net",
    "hash:net,port",
    "hash:net,port,net",
    "hash:net,iface",
    "list:set",
];

const FIREWALL: &[(&str, &str)] = &[
    ("conntrack by netlink", "conntrack -L && conntrack -S"),
    ("conntrack in zones", "conntrack -L --zone 1"),
    ("conntrack in procfs", "cat /proc/net/nf_conntrack"),
    ("helpers in the kernel", "for h in ftp tftp sip irc pptp amanda netbios-ns; do
        iptables-legacy -w -t raw -A X -p $(case $h in ftp|irc|pptp) echo tcp;; *) echo udp;; esac) \
            -j CT --helper $h; done"),
    ("hooks by netlink", "nft list hooks | grep -q nft || nft list hooks ip"),
];

fn network() -> Result<()> {
    let mut rows = Vec::new();
    for kind in LINKS {
        let name = kind.rsplit(" type ").next().unwrap_or_default();
        let kind = if kind.contains(" type ") {
            (*kind).to_owned()
        } else {
            format!("name x0 type {kind}")
        };
        let lines = format!("ip link add {kind}\nip link show x0\nip link del x0");
        rows.push(Row { what: format!("link: {name}"), lines });
    }
    for (place, spec) in TC {
        let lines = format!("tc {place} {spec}");
        rows.push(Row { what: format!("tc {place} {spec}"), lines });
    }
    rows.extend(NETWORK.iter().map(|(what, lines)| row(what, lines)));
    try_all(NETWORK_PRELUDE, &rows)
}

const NETWORK_PRELUDE: &str = "
node() { [ -e \"$1\" ] || { mkdir -p \"${1%/*}\"; mknod \"$1\" c \"$2\" \"$3\"; }; }
node /dev/net/tun 10 200
node /dev/ppp 108 0
ip link add d0 type dummy
ip addr add 10.8.0.1/24 dev d0
ip link set d0 up
tc qdisc add dev d0 root handle 1: prio
tc qdisc add dev d0 clsact
";

/// Kinds of links, each created as x0 and removed.
const LINKS: &[&str] = &[
    "bridge vlan_filtering 1",
    "dummy",
    "veth peer name x1",
    "link d0 name x0 type vlan id 5",
    "link d0 name x0 type macvlan mode bridge",
    "link d0 name x0 type macvtap mode bridge",
    "link d0 name x0 type ipvlan mode l2",
    "link d0 name x0 type ipvtap mode l2",
    "ifb",
    "vrf table 10",
    "vxlan id 5 dev d0 dstport 4789",
    "geneve id 5 remote 10.8.0.2",
    "ipip local 10.8.0.1 remote 10.8.0.2",
    "gre local 10.8.0.1 remote 10.8.0.2",
    "gretap local 10.8.0.1 remote 10.8.0.2",
    "erspan local 10.8.0.1 remote 10.8.0.2 seq key 1 erspan_ver 1 erspan 1",
    "sit local 10.8.0.1 remote 10.8.0.2",
    "ip6tnl mode any remote fd00::2",
    "ip6gre remote fd00::2",
    "vti local 10.8.0.1 remote 10.8.0.2 key 1",
    "vti6 remote fd00::2",
    "xfrm dev d0 if_id 5",
    "wireguard",
];

/// Arguments of tc in two parts. The device has the qdiscs `prio` (root) and `clsact`.
const TC: &[(&str, &str)] = &[
    ("qdisc replace dev lo root", "fq"),
    ("qdisc replace dev lo root", "fq_codel"),
    ("qdisc replace dev lo root", "tbf rate 1mbit burst 10k latency 50ms"),
    ("qdisc replace dev lo root", "netem delay 1ms loss 1%"),
    ("qdisc replace dev lo root", "sfq"),
    ("qdisc replace dev lo root", "cake bandwidth 10mbit"),
    ("qdisc replace dev lo root", "htb"),
    ("qdisc replace dev lo root", "noqueue"),
    ("filter add dev d0 parent 1: protocol ip prio 1", "u32 match ip dst 10.0.0.1 flowid 1:1"),
    ("filter add dev d0 parent 1: protocol all prio 2", "matchall classid 1:1"),
    ("filter add dev d0 parent 1: protocol ip prio 3", "flower dst_ip 10.0.0.1 classid 1:1"),
    ("filter add dev d0 parent 1: protocol ip prio 4 handle 1", "fw classid 1:1"),
    ("filter add dev d0 parent 1: protocol ip prio 5", "basic classid 1:1"),
    ("filter add dev d0 parent 1: protocol ip prio 6 handle 1:", "cgroup"),
    (
        "filter add dev d0 parent 1: protocol ip prio 7",
        "bpf bytecode '1,6 0 0 4294967295,' classid 1:1",
    ),
    ("filter add dev d0 ingress prio 1 matchall", "action mirred egress redirect dev lo"),
    ("filter add dev d0 ingress prio 2 matchall", "action police rate 1mbit burst 10k drop"),
    ("filter add dev d0 ingress prio 3 matchall", "action drop"),
    ("filter add dev d0 ingress prio 4 matchall", "action skbedit mark 1"),
    ("filter add dev d0 ingress prio 5 matchall", "action vlan push id 5"),
    ("filter add dev d0 ingress prio 6 protocol ip matchall", "action pedit ex munge ip ttl set 5"),
    ("filter add dev d0 ingress prio 7 protocol ip matchall", "action csum ip4h"),
    ("filter add dev d0 ingress prio 8 matchall", "action bpf bytecode '1,6 0 0 4294967295,'"),
];

const NETWORK: &[(&str, &str)] = &[
    ("no link but lo in a new network namespace", "[ $(unshare -n ip -o link | wc -l) = 1 ]"),
    ("tun", "ip tuntap add dev x0 mode tun && ip link del x0"),
    ("tap", "ip tuntap add dev x0 mode tap && ip link del x0"),
    (
        "wireguard, with keys",
        "umask 77; wg genkey > /tmp/key
        ip link add x0 type wireguard
        wg set x0 listen-port 51820 private-key /tmp/key \
            peer $(wg genkey | wg pubkey) allowed-ips 10.7.0.2/32
        ip addr add 10.7.0.1/24 dev x0; ip link set x0 up; wg show x0; ip link del x0",
    ),
    (
        "ESP with AES-GCM",
        "ip xfrm state add src 10.8.0.1 dst 10.8.0.2 proto esp spi 0x101 mode tunnel \
        aead 'rfc4106(gcm(aes))' 0x0123456789abcdef0123456789abcdef01234567 128",
    ),
    (
        "ESP with AES-CBC and HMAC",
        "ip xfrm state add src 10.8.0.1 dst 10.8.0.2 proto esp spi 0x102 \
        mode tunnel enc 'cbc(aes)' 0x0123456789abcdef0123456789abcdef \
        auth-trunc 'hmac(sha256)' 0x0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef 128",
    ),
    (
        "ESP with ChaCha20-Poly1305 over IPv6",
        "ip xfrm state add src fd00::1 dst fd00::2 proto esp \
        spi 0x103 mode tunnel aead 'rfc7539esp(chacha20,poly1305)' \
        0x0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef01234567 128",
    ),
    (
        "IPsec policies",
        "ip xfrm policy add src 10.6.0.0/24 dst 10.5.0.0/24 dir out \
        tmpl src 10.8.0.1 dst 10.8.0.2 proto esp mode tunnel; ip xfrm policy | grep -q 10.6.0.0",
    ),
    ("IPsec statistics", "grep -q XfrmInError /proc/net/xfrm_stat"),
    ("policy routing", "ip rule add fwmark 1 table 100; ip -6 rule add fwmark 1 table 100"),
    ("several next hops", "ip route add 10.4.0.0/24 nexthop via 10.8.0.2 nexthop via 10.8.0.3"),
    ("routes with encapsulation", "ip route add 10.3.0.0/24 encap ip id 5 dst 10.8.0.2 dev d0"),
    (
        "PPP",
        "perl -e 'open(F, \"+<\", \"/dev/ppp\") or die $!; my $unit = pack(\"i\", -1);
        ioctl(F, 0xc004743e, $unit) or die $!'",
    ),
    ("sockets of PPPoE", "perl -e 'socket(S, 24, 1, 0) or die $!'"),
    ("sockets of PPTP", "perl -e 'socket(S, 24, 1, 2) or die $!'"),
    ("sockets of L2TP over PPP", "perl -e 'socket(S, 24, 2, 1) or die $!'"),
    (
        "sockets of MPTCP",
        "perl -e 'socket(S, 2, 1, 262) or die $!; socket(T, 10, 1, 262) or die $!'",
    ),
    ("sockets of SCTP", "perl -e 'socket(S, 2, 1, 132) or die $!'"),
    ("sockets of AF_XDP", "perl -e 'socket(S, 44, 3, 0) or die $!'"),
    ("sockets of AF_PACKET", "perl -e 'socket(S, 17, 3, 0) or die $!'"),
    (
        "TLS in the kernel",
        "perl -e '
        use Socket; socket(L, 2, 1, 0) or die; bind(L, sockaddr_in(0, INADDR_LOOPBACK)) or die;
        listen(L, 1) or die; socket(C, 2, 1, 0) or die; connect(C, getsockname(L)) or die $!;
        setsockopt(C, 6, 31, \"tls\") or die $!;
        # TLS_TX, of TLS 1.2 with AES-GCM-128: version, cipher, then iv, key, salt and sequence.
        setsockopt(C, 282, 1, pack(\"SS\", 0x303, 51) . (\"x\" x 36)) or die $!'",
    ),
    (
        "TCP with MD5 signatures",
        "perl -e '
        use Socket; socket(S, 2, 1, 0) or die $!;
        my $peer = pack(\"a128\", pack_sockaddr_in(0, inet_aton(\"10.8.0.2\")));
        setsockopt(S, 6, 14, $peer . pack(\"CCSla80\", 0, 0, 3, 0, \"key\")) or die $!'",
    ),
    (
        "BBR and CUBIC",
        "perl -e 'socket(S, 2, 1, 0) or die; setsockopt(S, 6, 13, $_) or die \"$_: $!\"
        for qw(bbr cubic reno)'",
    ),
    (
        "socket diagnosis",
        "ss -tuwxa && ss -a -f netlink && ss -a -f link && ss -a -f xdp && ss -a -f vsock",
    ),
    ("receive work spread over CPUs", "[ -e /sys/class/net/lo/queues/rx-0/rps_cpus ]"),
    ("network block devices", "genl ctrl get name nbd | grep -q nbd"),
    (
        "tcpdump",
        "timeout 20 tcpdump -i lo -c 1 -w /tmp/pcap udp port 9 & sleep 2
        perl -e 'use Socket; socket(S, 2, 2, 0); my $to = sockaddr_in(9, INADDR_LOOPBACK);
            for (1 .. 10) { send(S, \"x\", 0, $to); select(undef, undef, undef, 0.2) }'
        wait $!; [ -s /tmp/pcap ]",
    ),
];

fn storage() -> Result<()> {
    try_all(
        STORAGE_PRELUDE,
        &STORAGE.iter().map(|(what, lines)| row(what, lines)).collect::<Vec<_>>(),
    )
}

/// `disk NAME MIB` creates a file in a tmpfs and prints its loop device; `dm NAME TABLE` creates a
/// mapping and prints its device. Device nodes are created if the container has none.
const STORAGE_PRELUDE: &str = r#"
mkdir -p /t /m && mount -t tmpfs -o size=800m none /t
node() { [ -e "$1" ] || { mkdir -p "${1%/*}"; mknod "$1" "$2" "$3" "$4"; }; }
misc() { node "$2" c 10 "$(sed -n "s/^ *\([0-9]*\) $1\$/\1/p" /proc/misc)"; }
misc loop-control /dev/loop-control
misc device-mapper /dev/mapper/control
misc fuse /dev/fuse
misc autofs /dev/autofs
block() { numbers=$(cat "/sys/block/$1/dev"); node "/dev/$1" b "${numbers%:*}" "${numbers#*:}"; }
disk() {
    truncate -s "$2M" "/t/$1"
    free=$(perl -e 'open(F, "+<", "/dev/loop-control") or die $!; print ioctl(F, 0x4c82, 0) + 0')
    block "loop$free"
    losetup "/dev/loop$free" "/t/$1"
    echo "/dev/loop$free"
}
dm() {
    dmsetup --noudevsync create "$1" --table "$2"
    number=$(dmsetup info -c --noheadings -o minor "$1")
    block "dm-$number"
    echo "/dev/dm-$number"
}
mounted() { mount "$@" /m && ls /m > /dev/null && umount /m; }
"#;

const STORAGE: &[(&str, &str)] = &[
    ("no devices made in advance", "[ -z \"$(ls /sys/block | grep -E '^(nbd|zram|ram)')\" ]"),
    ("ext4", "d=$(disk ext4 16); mkfs.ext4 -q $d; mounted $d"),
    ("ext4 with project quotas", "d=$(disk quota 16); mkfs.ext4 -q -O quota,project $d; mounted -o prjquota $d"),
    ("ext3", "d=$(disk ext3 16); mkfs.ext3 -q $d; mounted -t ext3 $d"),
    ("ext2", "d=$(disk ext2 16); mkfs.ext2 -q $d; mounted -t ext2 $d"),
    ("xfs", "d=$(disk xfs 320); mkfs.xfs -q $d; mounted -o prjquota $d"),
    ("vfat", "d=$(disk vfat 16); mkfs.vfat $d; mounted -o iocharset=utf8 $d"),
    ("squashfs", "for c in gzip lz4 lzo xz zstd; do
        mksquashfs /etc/passwd /t/s.$c -comp $c -quiet -no-progress
        d=$(disk s.$c 1); mounted -t squashfs $d; done"),
    ("iso9660", r#"perl -e '
        # ECMA-119: a primary volume descriptor, its terminator, a root directory of "." and "..".
        sub both { pack("V N", $_[0], $_[0]) } sub both16 { pack("v n", $_[0], $_[0]) }
        sub entry { pack("C C a8 a8 a7 C C C a4 C a", 34, 0, both(18), both(2048), "", 2, 0, 0, both16(1), 1, $_[0]) }
        my $pvd = pack("C a5 C C a32 a32 a8 a8 a32 a4 a4 a4 a8 a16 a34", 1, "CD001", 1, 0, "", "X", "",
            both(64), "", both16(1), both16(1), both16(2048), both(10), "", entry("\0"));
        my $root = entry("\0") . entry("\1");
        print "\0" x 32768, pack("a2048", $pvd), pack("a2048", "\xffCD001\1"), pack("a2048", $root), "\0" x 92160' > /t/iso
        d=$(disk iso 1); mounted -t iso9660 -o ro $d"#),
    ("erofs and overlayfs", "grep -q '^nodev.overlay$' /proc/filesystems; grep -q erofs /proc/filesystems
        mkdir /t/l /t/u /t/w; mounted -t overlay -o lowerdir=/t/l,upperdir=/t/u,workdir=/t/w none"),
    ("fuse", "exec 3<>/dev/fuse; mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 x /m; umount -l /m"),
    ("autofs", r#"perl -e '$^F = 255; setpgrp(0, 0); pipe(R, W); system("mount", "-i", "-t", "autofs", "-o", "fd=" . fileno(W) . ",pgrp=" . getpgrp() . ",minproto=5,maxproto=5,direct", "x", "/m") == 0 or die'; umount -l /m"#),
    ("binfmt_misc", "mounted -t binfmt_misc none"),
    ("nfs: a client that finds no server", "for v in 3 4.0 4.1 4.2; do
        ! timeout 30 mount -i -t nfs -o vers=$v,addr=127.0.0.1,mountaddr=127.0.0.1,mountport=1,port=1,mountproto=tcp,proto=tcp,nolock,soft,retrans=0,timeo=5,clientaddr=127.0.0.1 \
            127.0.0.1:/x /m 2> /t/nfs; cat /t/nfs; grep -qiE 'refused|timed out|timeout' /t/nfs; done"),
    ("cifs: a client that finds no server", "! timeout 60 mount -i -t cifs -o ip=127.0.0.1,port=1,user=u,pass=p //127.0.0.1/x /m 2> /t/cifs
        cat /t/cifs; grep -qiE 'refused|timed out|already mounted|down' /t/cifs"),
    ("mount -o loop", "mkfs.ext4 -q /t/loop.img 8M; d=$(disk spare 1); losetup -d $d; mounted -o loop /t/loop.img"),
    ("a loop device made by its number", "truncate -s 1M /t/number; node /dev/loop200 b 7 200
        losetup /dev/loop200 /t/number; losetup -d /dev/loop200"),
    ("partitions of a loop device", r#"d=$(disk parts 8); losetup -d $d
        perl -e 'print "\0" x 446, pack("C8 VV", 0, 0, 2, 0, 0x83, 0, 0, 0, 2048, 8192), "\0" x 48, "\x55\xaa"' |
            dd of=/t/parts conv=notrunc
        losetup -P $d /t/parts; [ -e /sys/block/${d#/dev/}/${d#/dev/}p1 ]"#),
    ("dm linear, striped, zero, error", "d=$(disk dm1 8); dm linear \"0 8192 linear $d 0\"
        dm striped \"0 8192 striped 2 16 $d 8192 $d 12288\"; dm zero '0 8192 zero'; dm error '0 8192 error'"),
    ("dm crypt", "d=$(disk crypt 8); c=$(dm crypt \"0 16384 crypt aes-xts-plain64 \
        0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde00123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef 0 $d 0\")
        mkfs.ext4 -q $c; mounted $c"),
    ("dm snapshot", "d=$(disk origin 8); c=$(disk cow 8); dm origin \"0 16384 snapshot-origin $d\"
        s=$(dm snap \"0 16384 snapshot $d $c P 8\"); dd if=/dev/zero of=$s bs=64k count=1 conv=fsync"),
    ("dm thin", "a=$(disk meta 8); d=$(disk data 16); p=$(dm pool \"0 32768 thin-pool $a $d 128 0 1 skip_block_zeroing\")
        dmsetup message pool 0 'create_thin 0'; t=$(dm thin \"0 65536 thin $p 0\"); mkfs.ext4 -q $t; mounted $t"),
    ("dm mirror", "a=$(disk m1 8); b=$(disk m2 8); dm mirror \"0 16384 mirror core 2 1024 nosync 2 $a 0 $b 0\""),
    ("dm delay, flakey, log-writes", "d=$(disk test 8); l=$(disk log 8); dm delay \"0 16384 delay $d 0 1\"
        dm flakey \"0 16384 flakey $d 0 10 1\"; dm log \"0 16384 log-writes $d $l\""),
    ("dm verity", "dmsetup targets | grep -q '^verity '"),
    ("zram", "n=$(cat /sys/class/zram-control/hot_add); for c in lzo-rle lz4 zstd; do echo $c > /sys/block/zram$n/comp_algorithm; done
        echo 16M > /sys/block/zram$n/disksize; block zram$n; mkswap /dev/zram$n; swapon /dev/zram$n; swapoff /dev/zram$n
        echo $n > /sys/class/zram-control/hot_remove"),
    ("nvme", "[ -d /sys/bus/pci/drivers/nvme ]"),
    ("swap on a file", "d=$(disk swap 8); mkswap $d; swapon $d; swapoff $d"),
];

fn tracing() -> Result<()> {
    try_all(
        TRACING_PRELUDE,
        &TRACING.iter().map(|(what, lines)| row(what, lines)).collect::<Vec<_>>(),
    )
}

/// `bpf TYPE [CODE]` loads `return 0` as a program of that type; then runs Perl code with its
/// descriptor in $p.
const TRACING_PRELUDE: &str = r#"
T=/sys/kernel/tracing
[ -e $T/events ] || mount -t tracefs none $T
cat > /bpf.pl <<'END'
my ($type, $code) = @ARGV;
my ($text, $license, $log) = (pack("CCsl CCsl", 0xb7, 0, 0, 0, 0x95, 0, 0, 0), "GPL\0", "\0" x 4096);
my $attribute = pack("LL Q Q LL Q L", $type, 2, unpack("Q", pack("P", $text)),
    unpack("Q", pack("P", $license)), 1, 4096, unpack("Q", pack("P", $log)), 0) . ("\0" x 80);
our $p = syscall(321, 5, $attribute, length($attribute));
die "type $type: $!: " . unpack("Z*", $log) if $p < 0;
eval "$code; 1" or die $@ if defined $code;
END
bpf() { perl /bpf.pl "$@"; }
"#;

const TRACING: &[(&str, &str)] = &[
    ("BPF has its JIT", "[ $(cat /proc/sys/net/core/bpf_jit_enable) = 1 ]"),
    ("BPF programs are machine code", "bpf 1 'open(K, \"/proc/kallsyms\"); grep(/ bpf_prog_/, <K>) or die \"no such symbol\"'"),
    // Of sockets, kprobes, tc, tracepoints, XDP, perf events, cgroups, sk_msg.
    ("types of BPF programs", "for type in 1 2 3 4 5 6 7 8 16 17; do bpf $type; done"),
    ("BPF on a kprobe", r#"echo 'p:by_bpf do_sys_openat2' >> $T/kprobe_events
        bpf 2 "open(I, '$T/events/kprobes/by_bpf/id'); my \$id = <I>;
            my \$e = pack('LLQ', 2, 112, \$id) . chr(0) x 96;
            my \$f = syscall(298, \$e, -1, 0, -1, 0); die \$! if \$f < 0;
            open(E, '+<&=', \$f); ioctl(E, 0x40042408, \$p) or die \$!; ioctl(E, 0x2400, 0) or die \$!"
        echo '-:by_bpf' >> $T/kprobe_events"#),
    ("kprobe events", "echo 'p:k do_sys_openat2' >> $T/kprobe_events; echo 1 > $T/events/kprobes/k/enable
        cat /etc/passwd > /dev/null; echo 0 > $T/events/kprobes/k/enable; grep -q 'k: (do_sys_openat2' $T/trace
        echo '-:k' >> $T/kprobe_events"),
    ("kretprobe events", "echo 'r:kr do_sys_openat2 $retval' >> $T/kprobe_events; echo '-:kr' >> $T/kprobe_events"),
    ("uprobe events", r#"at=$(perl -e 'open(F, "/usr/bin/true"); read(F, my $h, 64); print unpack("x24 Q", $h)')
        echo "p:u /usr/bin/true:$at" >> $T/uprobe_events; echo 1 > $T/events/uprobes/u/enable
        /usr/bin/true; echo 0 > $T/events/uprobes/u/enable; grep -q ' u: ' $T/trace; echo '-:u' >> $T/uprobe_events"#),
    ("tracepoints of system calls", "echo 1 > $T/events/syscalls/sys_enter_openat/enable; cat /etc/passwd > /dev/null
        echo 0 > $T/events/syscalls/sys_enter_openat/enable; grep -q 'sys_openat(' $T/trace"),
    ("tracepoints of the scheduler", "[ -e $T/events/sched/sched_switch/id ]"),
    ("software counters of perf", r#"perl -e 'my $e = pack("LLQ", 1, 112, 1) . "\0" x 96;
        my $f = syscall(298, $e, 0, -1, -1, 0); die $! if $f < 0; open(E, "<&=", $f);
        for (my $i = 0; $i < 1000000; $i++) {} sysread(E, my $n, 8) == 8 or die $!; unpack("Q", $n) > 0 or die "it counts nothing"'"#),
    ("strace", "strace -f -o /tmp/strace true; grep -q execve /tmp/strace"),
    ("strace with a seccomp filter", "strace -f --seccomp-bpf -e trace=openat -o /tmp/strace2 cat /etc/passwd > /dev/null; grep -q passwd /tmp/strace2"),
    ("the configuration", "zcat /proc/config.gz | grep -q '^CONFIG_IKCONFIG=y'"),
    ("pressure", "for r in cpu memory io; do grep -q avg10 /proc/pressure/$r; done; grep -q avg10 /sys/fs/cgroup/cpu.pressure"),
    ("multi-generational LRU", "[ $(($(cat /sys/kernel/mm/lru_gen/enabled) & 1)) = 1 ]"),
    ("Yama, off", "[ $(cat /proc/sys/kernel/yama/ptrace_scope) = 0 ]"),
    ("Landlock and Yama in the list of LSMs", "mount -t securityfs none /sys/kernel/security 2> /dev/null || true
        grep -q landlock,yama /sys/kernel/security/lsm"),
    ("delay accounting", "echo 1 > /proc/sys/kernel/task_delayacct; echo 0 > /proc/sys/kernel/task_delayacct"),
    ("checkpoint and restore", "ls /proc/self/map_files | grep -q -; [ -e /proc/self/timers ]"),
    ("all controllers in /proc/cgroups", "for c in cpuset cpu cpuacct blkio memory devices freezer net_cls perf_event net_prio hugetlb pids rdma misc; do
        grep -q \"^$c\\b\" /proc/cgroups || { echo $c; exit 1; }; done"),
    // By number: the C library has no wrapper for most of them. ENOSYS is 38.
    ("memfd_create", "perl -e 'my $n = \"x\\0\"; syscall(319, $n, 0) >= 0 or die $!'"),
    ("memfd_secret", "perl -e 'syscall(447, 0) >= 0 or die $!'"),
    ("modify_ldt", "perl -e 'my $b = \"\\0\" x 64; syscall(154, 0, $b, 64) >= 0 or die $!'"),
    ("set_mempolicy", "perl -e 'syscall(238, 0, 0, 0) == 0 or die $!'"),
    ("cachestat", "perl -e 'open(F, \"/etc/passwd\"); my ($r, $s) = (pack(\"QQ\", 0, 0), \"\\0\" x 40);
        syscall(451, fileno(F), $r, $s, 0) == 0 or die $!'"),
    ("kcmp", "perl -e 'my $p = $$; syscall(312, $p, $p, 0, 0, 0) == 0 or die $!'"),
    ("io_uring_setup", "perl -e 'my $p = \"\\0\" x 120; syscall(425, 4, $p) >= 0 or die $!'"),
    ("userfaultfd", "perl -e 'syscall(323, 0) >= 0 or die $!'"),
    ("landlock_create_ruleset", "perl -e 'syscall(444, 0, 0, 1) >= 1 or die $!'"),
    ("pidfd_open", "perl -e 'my $p = $$; syscall(434, $p, 0) >= 0 or die $!'"),
    ("no nested virtualization", "[ ! -e /sys/class/misc/kvm ]"),
];

fn row(what: &str, lines: &str) -> Row {
    Row { what: what.to_owned(), lines: lines.to_owned() }
}

/// Runs the rows, each in a shell of its own after the prelude, in a fresh pod.
fn try_all(prelude: &str, rows: &[Row]) -> Result<()> {
    let node = Node::start()?;
    let image = node.image("kernel-tools")?;
    let mut config = crate::client::pod("kernel", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = node.cri().run_pod(config)?;
    let mut config = container("c", &image, &["sleep", "1000"]);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let id = node.cri().run(&pod, config)?;
    let output = node.cri().exec_within(&id, &["sh", "-c", &script(prelude, rows)], LIMIT)?;
    let failures: Vec<&str> = output.stdout.lines().filter(|l| l.starts_with("FAILED")).collect();
    ensure!(failures.is_empty(), "{} of {}:\n{}", failures.len(), rows.len(), failures.join("\n"));
    let last = format!("tried {}", rows.len());
    ensure!(output.stdout.trim_end().ends_with(&last), "the script did not finish: {output:?}");
    node.finish()
}

/// `set -e` is in effect in a row's subshell, as its status is not checked in the same command.
const TRY: &str = r#"
try() {
    ( set -e; eval "$2" ) > /tmp/output 2>&1 < /dev/null
    code=$?
    [ $code = 0 ] || echo "FAILED $1: $(tail -n 3 /tmp/output | tr '\n' ' ')($code)"
}
"#;

fn script(prelude: &str, rows: &[Row]) -> String {
    let mut text = format!("exec 2>&1\nset -e\n{prelude}\nset +e\n{TRY}");
    for Row { what, lines } in rows {
        let _ = writeln!(text, "try {} {}", quoted(what), quoted(lines));
    }
    let _ = writeln!(text, "echo tried {}", rows.len());
    text
}

/// Quotes a word for the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
