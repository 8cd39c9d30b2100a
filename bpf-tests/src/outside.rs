//! The world around a cluster: a machine at the end of the nodes' default routes that knows no pod, and plain sockets of
//! whoever talks to it.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cluster::{Cluster, Family},
    netns::{End, Inside, Netns, Prefix, Route},
    patience::stretched,
    pod::{Outcome, Progress, Ready},
    traffic::{Ask, Client, pod_command},
};

/// A machine with servers.
#[derive(Debug)]
pub struct Outside {
    /// Dropped first.
    _server: Client<Ready>,
    pub netns: Netns,
}

const NAME: &str = "world";
impl Outside {
    /// On the switch of the nodes, whose default routes lead to it. Its servers answer as `world`.
    pub fn beside(cluster: &Cluster) -> Result<Self> {
        let netns = Netns::new(NAME)?;
        let port = End { name: NAME.into(), mac: [2, 0, 0, 0xff, 0, 0] };
        let eth0 = End { name: "eth0".into(), mac: [2, 0, 0, 0xff, 0, 1] };
        cluster.plug(&port, &netns, &eth0)?;
        netns.run(|inside| {
            Family::BOTH.into_iter().try_for_each(|family| {
                inside.address("eth0", around(family, ip(family)))?;
                inside.route(link(nodes(family)))
            })
        })??;
        for node in cluster.nodes() {
            node.netns.run(|inside| Family::BOTH.into_iter().try_for_each(|it| lead_to(inside, it)))??;
        }
        let args = ["serve", "--name", NAME].map(str::to_owned);
        let mut command = pod_command();
        command.args(args);
        let server = Client::start(command, |command| netns.spawn(command))?;
        server.wait_until(Duration::from_secs(5), |lines: &[Ready]| !lines.is_empty())?;
        Ok(Self { _server: server, netns })
    }

    /// Makes the requests one after the other, and waits for the last.
    pub fn ask(&self, ask: &Ask) -> Result<Vec<Outcome>> {
        self.client(&ask.args())?.finish(ask.limit())
    }

    /// Goes on until the client is stopped.
    pub fn keep_asking(&self, ask: &Ask) -> Result<Client<Outcome>> {
        self.client(&ask.clone().count(0).args())
    }

    /// A transfer that goes on until the client is stopped; the target is an echo server.
    pub fn stream(&self, target: SocketAddr) -> Result<Client<Progress>> {
        self.client(&["stream".to_owned(), target.to_string()])
    }

    fn client<T: DeserializeOwned + Clone + Send + 'static>(&self, args: &[String]) -> Result<Client<T>> {
        let mut command = pod_command();
        command.args(args);
        Client::start(command, |command| self.netns.spawn(command))
    }

    /// A UDP socket of the machine at its own address.
    pub fn udp(&self, family: Family, port: u16) -> Result<UdpSocket> {
        udp(&self.netns, (ip(family), port).into())
    }
}

/// The machine's own address: 203.0.113.1 or 2001:db8::1, which are for examples (RFC 5737, RFC 3849).
pub fn ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 1).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// Makes a node's routes to the machine, the default route among them.
pub fn lead_to(inside: &Inside, family: Family) -> Result<()> {
    let [network, any] = targets(family);
    inside.route(link(network))?;
    inside.route(Route { to: any, via: Some(ip(family)), dev: "eth0" })
}

/// Lets those routes lead out of another interface, by an address of the machine's network.
pub fn turn_to(inside: &Inside, addr: IpAddr, dev: &str) -> Result<()> {
    let family = Family::of(addr);
    let [network, any] = targets(family);
    inside.remove_route(any)?;
    inside.remove_route(network)?;
    inside.address(dev, Prefix { addr, len: network.len })?;
    inside.route(Route { to: any, via: Some(ip(family)), dev })
}

/// The machine's network, and everything.
fn targets(family: Family) -> [Prefix; 2] {
    let (network, any): (IpAddr, IpAddr) = match family {
        Family::V4 => (Ipv4Addr::new(203, 0, 113, 0).into(), Ipv4Addr::UNSPECIFIED.into()),
        Family::V6 => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).into(), Ipv6Addr::UNSPECIFIED.into()),
    };
    [around(family, network), Prefix { addr: any, len: 0 }]
}

/// The nodes' own network.
fn nodes(family: Family) -> Prefix {
    let addr = match family {
        Family::V4 => Ipv4Addr::new(192, 168, 50, 0).into(),
        Family::V6 => Ipv6Addr::new(0xfd50, 0, 0, 0, 0, 0, 0, 0).into(),
    };
    around(family, addr)
}

fn around(family: Family, addr: IpAddr) -> Prefix {
    Prefix { addr, len: if family == Family::V4 { 24 } else { 64 } }
}

fn link(to: Prefix) -> Route<'static> {
    Route { to, via: None, dev: "eth0" }
}

/// A UDP socket in a namespace; it stays there whoever uses it.
pub fn udp(netns: &Netns, bind: SocketAddr) -> Result<UdpSocket> {
    let deadline = Instant::now() + stretched(Duration::from_secs(5));
    let socket = loop {
        match netns.run(move |_| UdpSocket::bind(bind))? {
            // A new address of IPv6 is looked for on the link first (RFC 4862 section 5.4).
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            bound => break bound.with_context(|| format!("bind to {bind}"))?,
        }
    };
    socket.set_read_timeout(Some(stretched(Duration::from_secs(5))))?;
    Ok(socket)
}

/// The next datagram and its sender.
pub fn receive(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let mut bytes = vec![0; 65_536];
    let (length, from) = socket.recv_from(&mut bytes).context("no datagram came")?;
    bytes.truncate(length);
    Ok((bytes, from))
}

/// Whether an ICMP error is reported on a connected socket: somebody refused what it sent.
pub fn is_refused(socket: &UdpSocket) -> Result<()> {
    let mut bytes = [0; 16];
    match socket.recv(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error).context("nobody refused the datagram"),
        Ok(length) => bail!("{length} bytes came, and no error"),
    }
}

/// Asks for an ICMP echo of so many bytes with this identifier, and waits for the answer.
pub fn ping(netns: &Netns, to: IpAddr, identifier: u16, length: usize) -> Result<()> {
    netns
        .run(move |_| echo(to, identifier, length))?
        .with_context(|| format!("ping {to} {length} {identifier}"))
}

/// Types of a request and a reply (RFC 792, RFC 4443).
const ECHO_V4: (u8, u8) = (8, 0);
const ECHO_V6: (u8, u8) = (128, 129);

fn echo(to: IpAddr, identifier: u16, length: usize) -> Result<()> {
    let (domain, protocol, (request, reply)) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, ECHO_V4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, ECHO_V6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("open a raw socket")?;
    socket.set_read_timeout(Some(stretched(Duration::from_secs(5))))?;
    let [i0, i1] = identifier.to_be_bytes();
    let mut message = vec![request, 0, 0, 0, i0, i1, 0, 1];
    message.extend((0..length).map(|at| at as u8));
    if to.is_ipv4() {
        // The kernel computes the other family's.
        let sum = ferroflow_common::csum::bytes(&message).finish();
        message[2..4].copy_from_slice(&sum);
    }
    socket.send_to(&message, &SocketAddr::new(to, 0).into()).context("send")?;
    let mut socket = socket;
    let mut bytes = vec![0; 65_536];
    loop {
        let length = io::Read::read(&mut socket, &mut bytes).context("no answer came")?;
        // A raw socket of IPv4 has the IP header.
        let skip = if to.is_ipv4() { 20 } else { 0 };
        let answer = bytes.get(skip..length).unwrap_or_default();
        if answer.get(4..8) == Some(&message[4..8]) && answer.first() == Some(&reply) {
            ensure!(answer[8..] == message[8..], "another payload came back");
            return Ok(());
        }
    }
}
