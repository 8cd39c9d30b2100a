//! Sockets of this network namespace by netlink (sock_diag(7)): which are connected datagram sockets, and how they are
//! taken from their peer.
//!
//! `SOCK_DESTROY` (4.5) makes a datagram socket what it was before it was connected: whoever waits at it is told
//! ECONNABORTED, and whoever sends EDESTADDRREQ until it is connected again. It needs a kernel with `CONFIG_INET_DIAG_DESTROY`, as distributions have it, and the
//! capability NET_ADMIN.

use std::io;

use ferroflow_common::addr::{Addr, Port, Proto};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{Socket, SocketAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A connected datagram socket.
#[derive(Clone, Copy, Debug)]
pub struct Connected {
    /// The kernel's name of the socket, which no other socket ever has.
    pub cookie: u64,
    pub peer: Addr,
    pub port: Port,
    family: u8,
    id: SocketId,
}

impl Connected {
    /// One of nobody's, for tests.
    #[cfg(test)]
    pub(crate) fn of(cookie: u64, peer: Addr, port: Port) -> Self {
        Self { cookie, peer, port, family: 0, id: SocketId::ANY }
    }
}

/// Every connected datagram socket.
///
/// # Errors
/// The kernel's refusal, or an answer that makes no sense.
pub fn connected() -> io::Result<Vec<Connected>> {
    let socket = open()?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6].map(|family| family as u8) {
        let request = Request { states: 1 << ESTABLISHED, ..Request::new(family, SocketId::ANY) };
        send(&socket, BY_FAMILY, (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16, &request)?;
        answers(&socket, |payload| found.extend(parse(payload)))?;
    }
    Ok(found)
}

/// Takes the socket from its peer; that it is gone by now is no error.
///
/// # Errors
/// The kernel's refusal: EOPNOTSUPP without `CONFIG_INET_DIAG_DESTROY`, EPERM without the capability NET_ADMIN.
pub fn disconnect(connected: &Connected) -> io::Result<()> {
    let socket = open()?;
    let request = Request { states: 1 << ESTABLISHED, ..Request::new(connected.family, connected.id) };
    send(&socket, DESTROY, (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16, &request)?;
    match answers(&socket, |_payload| {}) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn send(socket: &Socket, kind: u16, flags: u16, request: &Request) -> io::Result<()> {
    let length = size_of::<Header>() + size_of::<Request>();
    let header = Header { length: length as u32, kind, flags, sequence: 1, sender: 0 };
    socket.send(&[header.as_bytes(), request.as_bytes()].concat(), 0).map(drop)
}

/// Reads to the end of the answer.
fn answers(socket: &Socket, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    loop {
        let (bytes, _kernel) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (header, _) = Header::read_from_prefix(rest).map_err(|_short| senseless())?;
            let length = header.length as usize;
            let payload = rest.get(size_of::<Header>()..length).ok_or_else(senseless)?;
            match i32::from(header.kind) {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => {
                    let (errno, _) = i32::read_from_prefix(payload).map_err(|_short| senseless())?;
                    return if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-errno)) };
                }
                _ => each(payload),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn senseless() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an answer of the kernel's about sockets makes no sense")
}

fn parse(payload: &[u8]) -> Option<Connected> {
    let (Found { family, id, .. }, _attributes) = Found::read_from_prefix(payload).ok()?;
    let peer = if i32::from(family) == libc::AF_INET {
        let [a, b, c, d, ..] = id.peer;
        Addr::v4([a, b, c, d])
    } else {
        Addr::v6(id.peer)
    };
    let [low, high] = id.cookie.map(u64::from);
    Some(Connected { cookie: high << 32 | low, peer, port: Port { be: id.peer_port }, family, id })
}

/// `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    sender: u32,
}

/// `struct inet_diag_sockid`: the ports and the addresses in network order, an IPv4 address in the first four bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SocketId {
    own_port: [u8; 2],
    peer_port: [u8; 2],
    own: [u8; 16],
    peer: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

impl SocketId {
    const ANY: Self = Self {
        own_port: [0; 2],
        peer_port: [0; 2],
        own: [0; 16],
        peer: [0; 16],
        interface: 0,
        cookie: [u32::MAX; 2],
    };
}

/// `struct inet_diag_req_v2`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Request {
    family: u8,
    protocol: u8,
    extensions: u8,
    reserved: u8,
    states: u32,
    id: SocketId,
}

impl Request {
    const fn new(family: u8, id: SocketId) -> Self {
        Self { family, protocol: Proto::UDP.number, extensions: 0, reserved: 0, states: 0, id }
    }
}

/// `struct inet_diag_msg`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Found {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    numbers: [u32; 5],
}

/// Messages of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// `TCP_ESTABLISHED`, the state of every socket that is connected.
const ESTABLISHED: u32 = 1;

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, UdpSocket};

    use super::*;

    const PEER: [u8; 4] = [10, 244, 1, 2];

    fn answer(family: i32, peer: &[u8]) -> Vec<u8> {
        let mut id = SocketId { peer_port: [0x14, 0xe9], cookie: [7, 1], ..SocketId::ANY };
        id.peer[..peer.len()].copy_from_slice(peer);
        let found = Found { family: family as u8, state: 1, timer: 0, retransmits: 0, id, numbers: [0; 5] };
        // Attributes follow.
        [found.as_bytes(), &[5, 0, 8, 0, 0, 0, 0, 0]].concat()
    }

    #[test]
    fn what_the_kernel_says_of_a_socket_is_read() {
        for whole in [answer(libc::AF_INET, &PEER), answer(libc::AF_INET6, &Addr::v4(PEER).bytes)] {
            let Connected { cookie, peer, port, .. } = parse(&whole).unwrap();
            assert_eq!((cookie, peer, port), (1 << 32 | 7, Addr::v4(PEER), Port::new(5353)));
            assert!(parse(&whole[..71]).is_none(), "one byte is missing");
        }
    }

    #[test]
    fn this_kernel_lists_a_socket_while_it_is_connected() {
        for loopback in [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1u16])] {
            let (socket, peer) =
                (UdpSocket::bind((loopback, 0)).unwrap(), UdpSocket::bind((loopback, 0)).unwrap());
            let to = peer.local_addr().unwrap();
            let is_listed = || {
                connected().unwrap().iter().any(|it| (it.peer.ip(), it.port.host()) == (to.ip(), to.port()))
            };
            assert!(!is_listed());
            socket.connect(to).unwrap();
            assert!(is_listed());
        }
    }

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!((size_of::<Header>(), size_of::<Request>(), size_of::<Found>()), (16, 56, 72));
    }
}
