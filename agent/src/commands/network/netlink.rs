//! Interfaces and addresses as the kernel dumps them (rtnetlink(7)).
//!
//! ```text
//!   datagram = message…    message = nlmsghdr body attribute…    attribute = rtattr data
//! ```
//!
//! Everything is in the machine's byte order and padded to multiples of four.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// The link-layer address; absent where there is none.
    pub(super) address: Option<Vec<u8>>,
    /// `struct rtnl_link_stats64`'s beginning, in its order.
    pub(super) statistics: Option<[u64; STATISTICS]>,
}

/// An interface's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// The interface's index.
    pub(super) link: u32,
    pub(super) ip: IpAddr,
    pub(super) prefix: u8,
    /// The name it was given with, which for IPv4 may be an alias of the interface's.
    pub(super) label: Option<String>,
}

/// rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped.
pub(super) const STATISTICS: usize = 8;

// Linux include/uapi/linux/netlink.h and rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_STATS64: u16 = 23;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;

const HEADER: usize = 16;
/// A header and a `struct rtgenmsg`, padded.
const REQUEST: u8 = 20;
/// `struct ifinfomsg` and `struct ifaddrmsg`.
const IFINFO: usize = 16;
const IFADDR: usize = 8;
/// The kernel fills datagrams of at most this size.
const DATAGRAM: usize = 32 << 10;
/// Most bytes of a dump.
const DUMPED: usize = 4 << 20;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// Every interface.
pub(super) fn links() -> io::Result<Vec<Link>> {
    dump(RTM_GETLINK, |kind, body| (kind == RTM_NEWLINK).then(|| link(body)).flatten())
}

/// Every IPv4 and IPv6 address.
pub(super) fn addresses() -> io::Result<Vec<Address>> {
    dump(RTM_GETADDR, |kind, body| (kind == RTM_NEWADDR).then(|| address(body)).flatten())
}

/// Asks for everything of a kind.
fn dump<T>(request: u16, parse: impl Fn(u16, &[u8]) -> Option<T>) -> io::Result<Vec<T>> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    send(&socket, &dump_request(request), SendFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; DATAGRAM];
    let mut total = 0;
    while total < DUMPED {
        let (count, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        total += count.max(HEADER);
        for (kind, body) in messages(&buffer[..count]) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return Err(refusal(body)),
                _ => found.extend(parse(kind, body)),
            }
        }
    }
    Ok(found)
}

/// A header and a `struct rtgenmsg` that asks for all families.
fn dump_request(kind: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(u32::from(REQUEST).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(DUMP.to_ne_bytes());
    bytes.resize(REQUEST.into(), 0);
    bytes
}

fn refusal(body: &[u8]) -> io::Error {
    let code = u32_at(body, 0).map_or(0, u32::cast_signed);
    io::Error::from_raw_os_error(code.saturating_neg())
}

/// Types and bodies of a datagram's messages; ends at the first that is cut short.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 4)?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Types and data of attributes; ends at the first that is cut short.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let data = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, data))
    })
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn link(body: &[u8]) -> Option<Link> {
    let index = u32_at(body, 4)?;
    let mut link = Link { index, name: String::new(), address: None, statistics: None };
    for (kind, data) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(data),
            IFLA_ADDRESS if !data.is_empty() => link.address = Some(data.to_vec()),
            IFLA_STATS64 => link.statistics = statistics(data),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn statistics(data: &[u8]) -> Option<[u64; STATISTICS]> {
    let mut counters = [0; STATISTICS];
    for (counter, bytes) in counters.iter_mut().zip(data.chunks_exact(8)) {
        *counter = u64::from_ne_bytes(bytes.try_into().ok()?);
    }
    (data.len() >= STATISTICS * 8).then_some(counters)
}

fn address(body: &[u8]) -> Option<Address> {
    let (prefix, link) = (*body.get(1)?, u32_at(body, 4)?);
    let mut address = None;
    let mut local = None;
    let mut label = None;
    for (kind, data) in attributes(body.get(IFADDR..)?) {
        match kind {
            IFA_ADDRESS => address = ip(data),
            // On a link between two points the other address is the peer's.
            IFA_LOCAL => local = ip(data),
            IFA_LABEL => label = Some(text(data)),
            _ => {}
        }
    }
    Some(Address { link, ip: local.or(address)?, prefix, label })
}

fn ip(data: &[u8]) -> Option<IpAddr> {
    let ipv4 = <[u8; 4]>::try_from(data).map(IpAddr::from);
    ipv4.or_else(|_| <[u8; 16]>::try_from(data).map(IpAddr::from)).ok()
}

/// A string up to its NUL.
fn text(data: &[u8]) -> String {
    let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    String::from_utf8_lossy(&data[..end]).into_owned()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len() + 4).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), data].concat();
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + HEADER).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat();
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn eth0() -> Vec<u8> {
        let counters: Vec<u8> = (1..=24_u64).flat_map(u64::to_ne_bytes).collect();
        [
            &[0, 0, 1, 0, 2, 0, 0, 0][..],
            &[0; 8],
            &attribute(IFLA_IFNAME, b"eth0\0"),
            &attribute(99, b"whatever"),
            &attribute(IFLA_ADDRESS, &[0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            &attribute(IFLA_STATS64, &counters),
        ]
        .concat()
    }

    #[test]
    fn a_link_has_its_name_address_and_counters() {
        let expected = Link {
            index: 2,
            name: "eth0".into(),
            address: Some(vec![0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            statistics: Some([1, 2, 3, 4, 5, 6, 7, 8]),
        };
        assert_eq!(link(&eth0()), Some(expected));
    }

    #[test]
    fn the_local_address_counts_and_not_the_peers() {
        let body = [
            &[2, 24, 0, 0, 7, 0, 0, 0][..],
            &attribute(IFA_ADDRESS, &[10, 0, 0, 2]),
            &attribute(IFA_LOCAL, &[10, 0, 0, 1]),
            &attribute(IFA_LABEL, b"ppp0:1\0"),
        ]
        .concat();
        let expected =
            Address { link: 7, ip: [10, 0, 0, 1].into(), prefix: 24, label: Some("ppp0:1".into()) };
        assert_eq!(address(&body), Some(expected));
        let mut ip = [0; 16];
        ip[15] = 1;
        let body = [&[10, 128, 0, 0, 1, 0, 0, 0][..], &attribute(IFA_ADDRESS, &ip)].concat();
        assert_eq!(address(&body), Some(Address { link: 1, ip: ip.into(), prefix: 128, label: None }));
    }

    #[test]
    fn messages_cut_short_anywhere_do_no_harm() {
        let datagram = [message(RTM_NEWLINK, &eth0()), message(NLMSG_DONE, &[0; 4])].concat();
        let kinds: Vec<u16> = messages(&datagram).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [RTM_NEWLINK, NLMSG_DONE]);
        for end in 0..datagram.len() {
            for (_, body) in messages(&datagram[..end]) {
                link(body);
                address(body);
            }
        }
        let whole = eth0();
        for end in 0..whole.len() {
            link(&whole[..end]);
            address(&whole[..end]);
        }
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        for length in [0, 1, 3, 15, 1000, u32::MAX] {
            let mut datagram = message(RTM_NEWLINK, &eth0());
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
        for length in [0, 3, 200, u16::MAX] {
            let mut bytes = attribute(IFLA_IFNAME, b"eth0\0");
            bytes[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&bytes).count(), 0, "{length}");
        }
    }

    #[test]
    fn every_machine_has_a_loopback_interface() {
        let links = links().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!(lo.address.as_ref().map(Vec::len), Some(6));
        assert!(lo.statistics.is_some());
        assert!(
            addresses().unwrap().iter().all(|address| links.iter().any(|link| link.index == address.link))
        );
    }
}
