//! Many new connections and datagrams at once, and which of them got an answer: what policies let through.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
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
}

impl Transport {
    pub const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];

    /// As the Kubernetes API calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
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
    answered: bool,
}

impl Pending {
    fn send(probe: Probe) -> Result<Self> {
        let domain = Domain::for_address(probe.target);
        let (kind, protocol) = match probe.transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let socket = Socket::new(domain, kind, Some(protocol)).context("make a socket")?;
        socket.set_nonblocking(true)?;
        match socket.connect(&probe.target.into()) {
            Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => {
                return Err(error).with_context(|| format!("connect: {probe:?}"));
            }
            _ => {}
        }
        if probe.transport == Transport::Udp {
            socket.send(b"probe").with_context(|| format!("send: {probe:?}"))?;
        }
        Ok(Self { probe, socket, answered: false })
    }

    fn look(&mut self) -> Result<()> {
        match self.probe.transport {
            Transport::Tcp => match self.socket.take_error()? {
                None => self.answered = self.socket.peer_addr().is_ok(),
                Some(error) if is_unreachable(&error) => {}
                Some(error) => bail!("{error}"),
            },
            Transport::Udp => match (&self.socket).read(&mut [0; 16]) {
                Ok(_length) => self.answered = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock || is_unreachable(&error) => {}
                Err(error) => return Err(error.into()),
            },
        }
        Ok(())
    }
}

/// Nobody has the address (yet).
fn is_unreachable(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)
}

/// Answers probes to all addresses of a namespace, on these ports of both transports. Connections are echoed.
#[derive(Debug)]
pub struct Answering {
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Answering {
    /// # Errors
    /// Where a port cannot be had.
    pub fn start(at: &Netns, ports: &[u16]) -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for &port in ports {
            let any: (IpAddr, u16) = (Ipv6Addr::UNSPECIFIED.into(), port);
            let sockets =
                at.run(move |_| Ok::<_, std::io::Error>((TcpListener::bind(any)?, UdpSocket::bind(any)?)));
            let (listener, datagrams) = sockets?.with_context(|| format!("listen on {port}"))?;
            listener.set_nonblocking(true)?;
            datagrams.set_nonblocking(true)?;
            let ended = ended.clone();
            let answer = move || answer(&listener, &datagrams, &ended);
            threads.push(thread::Builder::new().name(format!("port {port}")).spawn(answer)?);
        }
        Ok(Self { ended, threads })
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
