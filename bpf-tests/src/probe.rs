//! Many first packets at once, and which of them got an answer: what policies let through.
//!
//! TCP and UDP have sockets of their kind. What opens an association of SCTP is made here and sent over raw sockets, since
//! hosts seldom have SCTP; and so are ICMP echoes, which the other kernel answers.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use ferroflow_common::{addr::Addr, tcp::chunk};
use ferroflow_ebpf::frame::Frame;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{netns::Netns, patience::stretched};

/// A first packet, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub transport: Transport,
    pub target: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
    /// What opens an association, and what accepts that.
    Sctp,
    /// An ICMP echo, which has no port: that of the target is 0.
    Echo,
}

impl Transport {
    pub const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];
    /// Those that have ports.
    pub const WITH_PORTS: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// As the Kubernetes API calls it; of an echo, which that has no name for, a name that is none of its.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Echo => "ICMP",
        }
    }
}

/// How long an answer may take that comes.
const ANSWER: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(2);

/// Sends all probes from the namespace, and says which were answered. What is dropped costs all of them one wait.
///
/// # Errors
/// Where a socket cannot be made, or somebody refuses: there is nobody who listens.
pub fn answered(from: &Netns, probes: &[Probe]) -> Result<Vec<bool>> {
    let probes = probes.to_vec();
    let mut pending =
        from.run(move |_| probes.into_iter().map(Pending::send).collect::<Result<Vec<_>>>())??;
    let deadline = Instant::now() + stretched(ANSWER);
    while Instant::now() < deadline && !pending.iter().all(|it| it.answered) {
        for it in pending.iter_mut().filter(|it| !it.answered) {
            it.look().with_context(|| format!("{:?}", it.probe))?;
        }
        thread::sleep(TICK);
    }
    Ok(pending.into_iter().map(|it| it.answered).collect())
}

struct Pending {
    probe: Probe,
    socket: Socket,
    /// What an answer is known by: the port or the identifier of who asks, where the kernel does not know it.
    tag: u16,
    answered: bool,
}

impl Pending {
    fn send(probe: Probe) -> Result<Self> {
        let socket = probe.socket().with_context(|| format!("make a socket: {probe:?}"))?;
        socket.set_nonblocking(true)?;
        let tag = TAGS.start + NEXT_TAG.fetch_add(1, Ordering::Relaxed) % (TAGS.end - TAGS.start);
        match socket.connect(&SocketAddr::new(probe.target.ip(), probe.port()).into()) {
            Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => {
                return Err(error).with_context(|| format!("connect: {probe:?}"));
            }
            _ => {}
        }
        if let Some(packet) = probe.packet(tag) {
            socket.send(&packet).with_context(|| format!("send: {probe:?}"))?;
        }
        Ok(Self { probe, socket, tag, answered: false })
    }

    fn look(&mut self) -> Result<()> {
        if self.probe.transport == Transport::Tcp {
            match self.socket.take_error()? {
                None => self.answered = self.socket.peer_addr().is_ok(),
                Some(error) if is_unreachable(&error) => {}
                Some(error) => bail!("{error}"),
            }
            return Ok(());
        }
        let mut bytes = [0; 128];
        loop {
            match (&self.socket).read(&mut bytes) {
                Ok(length) => self.answered |= self.probe.is_answered_by(&bytes[..length], self.tag),
                Err(error) if error.kind() == ErrorKind::WouldBlock || is_unreachable(&error) => {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What asks has one of its own, or a flow that was allowed would let the next probe pass. Those of clients.
const TAGS: std::ops::Range<u16> = 32_768..60_000;
static NEXT_TAG: AtomicU16 = AtomicU16::new(0);

impl Probe {
    fn socket(self) -> std::io::Result<Socket> {
        let of_ip = Protocol::from(if self.target.is_ipv4() { 1 } else { 58 });
        let (kind, protocol) = match self.transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
            Transport::Sctp => (Type::RAW, Protocol::SCTP),
            Transport::Echo => (Type::RAW, of_ip),
        };
        Socket::new(Domain::for_address(self.target), kind, Some(protocol))
    }

    /// A raw socket has none: to IPv6 it would be a protocol.
    fn port(self) -> u16 {
        match self.transport {
            Transport::Tcp | Transport::Udp => self.target.port(),
            Transport::Sctp | Transport::Echo => 0,
        }
    }

    /// What is sent once the socket is connected; nothing for TCP, which has done so then.
    fn packet(self, tag: u16) -> Option<Vec<u8>> {
        let (addr, port) = (Addr::from(self.target.ip()), self.target.port());
        match self.transport {
            Transport::Tcp => None,
            Transport::Udp => Some(b"probe".to_vec()),
            Transport::Sctp => Some(behind_headers(&Frame::sctp((addr, tag), (addr, port), chunk::INIT))),
            Transport::Echo => {
                let echo = if addr.is_v4() { ECHO_V4 } else { ECHO_V6 };
                // The kernel mends the checksum of IPv6 (RFC 3542 section 3.1), which is about addresses, too.
                Some(behind_headers(&Frame { src_port: tag, ..Frame::icmp(addr, addr, echo, 0) }))
            }
        }
    }

    /// Whether a packet that came from the target answers the one with the tag. Over IPv4 the packet's header comes first.
    fn is_answered_by(self, bytes: &[u8], tag: u16) -> bool {
        let [tag_high, tag_low] = tag.to_be_bytes();
        let [port_high, port_low] = self.target.port().to_be_bytes();
        let (version, reply) = if self.target.is_ipv4() { (4, ECHO_REPLY_V4) } else { (6, ECHO_REPLY_V6) };
        match self.transport {
            Transport::Tcp => false,
            Transport::Udp => true,
            Transport::Sctp => {
                behind_ip(bytes, version).starts_with(&[port_high, port_low, tag_high, tag_low])
            }
            Transport::Echo => match behind_ip(bytes, version) {
                [kind, _code, _, _, high, low, ..] => (*kind, *high, *low) == (reply, tag_high, tag_low),
                _ => false,
            },
        }
    }
}

const ECHO_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// What a raw socket gets (raw(7), RFC 3542 section 3), from the header of the protocol on.
fn behind_ip(bytes: &[u8], version: u8) -> &[u8] {
    let length = if version == 4 { bytes.first().map_or(0, |first| usize::from(first & 15) * 4) } else { 0 };
    bytes.get(length..).unwrap_or_default()
}

/// Of a frame, what a raw socket sends. The checksum of SCTP covers no addresses.
fn behind_headers(frame: &Frame) -> Vec<u8> {
    frame.build()[if frame.src.is_v4() { 34 } else { 54 }..].to_vec()
}

/// Nobody has the address (yet).
fn is_unreachable(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)
}

/// Answers probes to all addresses of a namespace, on these ports of TCP, UDP and SCTP. Connections are echoed.
#[derive(Debug)]
pub struct Answering {
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Answering {
    /// # Errors
    /// Where a port cannot be had.
    pub fn start(at: &Netns, ports: &[u16]) -> Result<Self> {
        let mut it = Self { ended: Arc::default(), threads: Vec::new() };
        for &port in ports {
            let any: (IpAddr, u16) = (Ipv6Addr::UNSPECIFIED.into(), port);
            let sockets =
                at.run(move |_| Ok::<_, std::io::Error>((TcpListener::bind(any)?, UdpSocket::bind(any)?)));
            let (listener, datagrams) = sockets?.with_context(|| format!("listen on {port}"))?;
            listener.set_nonblocking(true)?;
            datagrams.set_nonblocking(true)?;
            it.spawn(&format!("port {port}"), move |ended| answer(&listener, &datagrams, ended))?;
        }
        let sockets = at.run(|_| [Domain::IPV4, Domain::IPV6].map(raw_sctp))?;
        let [v4, v6] = sockets.map(|socket| socket.context("listen for SCTP"));
        let (sockets, ports) = ([v4?, v6?], ports.to_owned());
        it.spawn("sctp", move |ended| accept(&sockets, &ports, ended))?;
        Ok(it)
    }

    fn spawn(&mut self, name: &str, answer: impl FnOnce(&AtomicBool) + Send + 'static) -> Result<()> {
        let ended = self.ended.clone();
        self.threads.push(thread::Builder::new().name(name.into()).spawn(move || answer(&ended))?);
        Ok(())
    }
}

/// A socket is what the kernel says it is: this one receives and sends packets of SCTP.
fn raw_sctp(domain: Domain) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::SCTP))?;
    let any: IpAddr =
        if domain == Domain::IPV4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    socket.bind(&SocketAddr::new(any, 0).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Accepts associations that nobody goes on with.
fn accept(sockets: &[UdpSocket; 2], ports: &[u16], ended: &AtomicBool) {
    let mut bytes = [0; 2048];
    while !ended.load(Ordering::Relaxed) {
        for (socket, version) in sockets.iter().zip([4, 6]) {
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let packet = behind_ip(&bytes[..length], version);
                let [a, b, c, d, _, _, _, _, _, _, _, _, chunk::INIT, ..] = *packet else { continue };
                let (from_port, to_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                if ports.contains(&to_port) {
                    let to = Addr::from(from.ip());
                    let answer = Frame::sctp((to, to_port), (to, from_port), chunk::INIT_ACK);
                    let answer = behind_headers(&answer);
                    let _lost = socket.send_to(&answer, SocketAddr::new(from.ip(), 0));
                }
            }
        }
        thread::sleep(TICK);
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

fn answer(listener: &TcpListener, datagrams: &UdpSocket, ended: &AtomicBool) {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut bytes = [0; 2048];
    while !ended.load(Ordering::Relaxed) {
        while let Ok((stream, _from)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                streams.push(stream);
            }
        }
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            let _lost = datagrams.send_to(&bytes[..length], from);
        }
        streams.retain_mut(|stream| match stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(length) => stream.write_all(&bytes[..length]).is_ok(),
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
        thread::sleep(TICK);
    }
}
