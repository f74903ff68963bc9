//! Synchronous rtnetlink(7) client with the requests needed to connect taps. It operates on the
//! network namespace of the thread that opened it.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType, RouteVia,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::cidr::Cidr;

/// All protocols (linux/if_ether.h), VLAN-tagged frames included.
const ETH_P_ALL: u16 = 0x0003;
/// Any fixed value, as there is one filter on an interface.
const FILTER_PRIORITY: u16 = 1;

#[derive(Debug, thiserror::Error)]
pub enum RtnlError {
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    #[error("netlink: cannot {what}")]
    Request { what: String, source: io::Error },
    #[error("netlink: invalid reply to {what}: {problem}")]
    Answer { what: String, problem: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub up: bool,
    /// Created by the tun driver.
    pub tun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkAddress {
    pub link: u32,
    pub address: Cidr,
    pub link_local: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkRoute {
    pub link: u32,
    pub destination: Cidr,
    pub gateway: Option<IpAddr>,
    /// Added by the kernel for an address.
    pub connected: bool,
    pub metric: u32,
}

pub struct Rtnl {
    socket: Socket,
    sequence: u32,
}

impl Rtnl {
    pub fn open() -> Result<Self, RtnlError> {
        let socket = Socket::new(NETLINK_ROUTE).map_err(RtnlError::Open)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(RtnlError::Open)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Ethernet links only.
    pub fn links(&mut self) -> Result<Vec<Link>, RtnlError> {
        let answers =
            self.dump("list links", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewLink(m) => link(&m),
                _ => None,
            })
            .collect())
    }

    pub fn addresses(&mut self) -> Result<Vec<LinkAddress>, RtnlError> {
        let answers = self
            .dump("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewAddress(m) => address(&m),
                _ => None,
            })
            .collect())
    }

    /// Unicast routes of the main table.
    pub fn routes(&mut self) -> Result<Vec<LinkRoute>, RtnlError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.dump("list routes", RouteNetlinkMessage::GetRoute(message))?;
            routes.extend(answers.into_iter().filter_map(|m| match m {
                RouteNetlinkMessage::NewRoute(m) => route(&m),
                _ => None,
            }));
        }
        Ok(routes)
    }

    pub fn set_up(&mut self, index: u32) -> Result<(), RtnlError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(&format!("bring link {index} up"), RouteNetlinkMessage::SetLink(message), 0)
    }

    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), RtnlError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        let what = format!("set the MTU of link {index} to {mtu}");
        self.change(&what, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Redirects every frame that arrives on `from` to `to`. The ingress hook runs before protocol
    /// handlers, packet filters and bridges.
    pub fn redirect(&mut self, from: u32, to: u32) -> Result<(), RtnlError> {
        let create = NLM_F_CREATE | NLM_F_EXCL;
        let mut qdisc = TcMessage::with_index(from as i32);
        qdisc.header.parent = TcHandle::INGRESS;
        qdisc.header.handle = TcHandle { major: 0xffff, minor: 0 };
        qdisc.attributes.push(TcAttribute::Kind("ingress".into()));
        self.change(
            &format!("add an ingress qdisc to link {from} (kernel option NET_SCH_INGRESS)"),
            RouteNetlinkMessage::NewQueueDiscipline(qdisc),
            create,
        )?;
        let mut filter = TcMessage::with_index(from as i32);
        filter.header.parent = TcHandle { major: 0xffff, minor: 0 };
        filter.header.info = TcHandle { major: FILTER_PRIORITY, minor: ETH_P_ALL.to_be() }.into();
        filter.attributes.push(TcAttribute::Kind(TcFilterU32::KIND.into()));
        filter.attributes.push(TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(match_all())),
            TcOption::U32(TcFilterU32Option::Action(vec![redirect_to(to)])),
        ]));
        self.change(
            &format!(
                "redirect link {from} to link {to} \
                 (kernel options NET_CLS_U32, NET_CLS_ACT, NET_ACT_MIRRED)"
            ),
            RouteNetlinkMessage::NewTrafficFilter(filter),
            create,
        )
    }

    /// Deletes a link.
    pub fn delete_link(&mut self, index: u32) -> Result<(), RtnlError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.change(&format!("delete link {index}"), RouteNetlinkMessage::DelLink(message), 0)
    }

    /// Deletes the ingress qdisc with its filters.
    pub fn delete_ingress(&mut self, index: u32) -> Result<(), RtnlError> {
        let mut qdisc = TcMessage::with_index(index as i32);
        qdisc.header.parent = TcHandle::INGRESS;
        qdisc.header.handle = TcHandle { major: 0xffff, minor: 0 };
        let what = format!("delete the ingress qdisc of link {index}");
        self.change(&what, RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0)
    }

    /// Indices of the links to which frames arriving on `from` are redirected.
    pub fn redirects(&mut self, from: u32) -> Result<Vec<u32>, RtnlError> {
        let mut message = TcMessage::with_index(from as i32);
        message.header.parent = TcHandle { major: 0xffff, minor: 0 };
        let answers = self.dump("list filters", RouteNetlinkMessage::GetTrafficFilter(message))?;
        Ok(answers
            .iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewTrafficFilter(m) => Some(&m.attributes),
                _ => None,
            })
            .flatten()
            .flat_map(targets)
            .collect())
    }

    fn change(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), RtnlError> {
        self.request(what, message, NLM_F_ACK | flags).map(|_| ())
    }

    fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, RtnlError> {
        self.request(what, message, NLM_F_DUMP)
    }

    fn request(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, RtnlError> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let failed = |source| RtnlError::Request { what: what.to_owned(), source };
        self.socket.send(&bytes, 0).map_err(failed)?;
        let mut answers = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(failed)?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| answer(what, &e.to_string()))?;
                let length = message.header.length as usize;
                if length == 0 || length > rest.len() {
                    return Err(answer(what, "invalid message length"));
                }
                if message.header.sequence_number == self.sequence {
                    match message.payload {
                        NetlinkPayload::InnerMessage(m) => answers.push(m),
                        NetlinkPayload::Done(_) => return Ok(answers),
                        NetlinkPayload::Error(e) if e.code.is_some() => {
                            return Err(failed(e.to_io()));
                        }
                        NetlinkPayload::Error(_) => return Ok(answers),
                        _ => {}
                    }
                }
                // NLMSG_ALIGN: messages start at multiples of four.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

fn answer(what: &str, problem: &str) -> RtnlError {
    RtnlError::Answer { what: what.to_owned(), problem: problem.to_owned() }
}

fn match_all() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    // One key with an empty mask: matches every frame.
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

fn redirect_to(index: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = index;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}

fn targets(attribute: &TcAttribute) -> Vec<u32> {
    let TcAttribute::Options(options) = attribute else { return Vec::new() };
    let mut found = Vec::new();
    for option in options {
        let TcOption::U32(TcFilterU32Option::Action(actions)) = option else { continue };
        for attribute in actions.iter().flat_map(|a| &a.attributes) {
            let TcActionAttribute::Options(options) = attribute else { continue };
            found.extend(options.iter().filter_map(|o| match o {
                TcActionOption::Mirror(TcActionMirrorOption::Parms(m)) => Some(m.ifindex),
                _ => None,
            }));
        }
    }
    found
}

fn link(message: &LinkMessage) -> Option<Link> {
    if message.header.link_layer_type != LinkLayerType::Ether {
        return None;
    }
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        tun: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(info) => {
                link.tun = info.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Tun)));
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn address(message: &AddressMessage) -> Option<LinkAddress> {
    // On IPv4 point-to-point links Address is the peer and Local the own address.
    let pick = |requested: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(requested)
    };
    let ip = pick(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None }).or_else(
        || pick(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None }),
    )?;
    Some(LinkAddress {
        link: message.header.index,
        address: Cidr::new(ip, message.header.prefix_len)?,
        link_local: message.header.scope == AddressScope::Link,
    })
}

fn route(message: &RouteMessage) -> Option<LinkRoute> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let (mut destination, mut gateway, mut link, mut metric) = (any, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Destination(a) => destination = ip(a)?,
            RouteAttribute::Gateway(a) => gateway = Some(ip(a)?),
            RouteAttribute::Via(RouteVia::Inet(a)) => gateway = Some((*a).into()),
            RouteAttribute::Via(RouteVia::Inet6(a)) => gateway = Some((*a).into()),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(p) => metric = *p,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.kind != RouteType::Unicast {
        return None;
    }
    Some(LinkRoute {
        link: link?,
        destination: Cidr::new(destination, header.destination_prefix_length)?,
        gateway,
        connected: header.protocol == RouteProtocol::Kernel,
        metric,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}
