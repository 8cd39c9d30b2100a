//! What must become of a packet of no service: it goes on as it came, unless policies have a say in it (rules 43 to 49,
//! 52). Then it is dropped, or its flow is known from then on.
//!
//! ```text
//!   to or from a pod ─▶ a pod of an end isolated? ─▶ the node's own, or a pod to itself? ─▶ goes on, known
//!                                             └──▶ the policies of both ends ─▶ goes on, known
//!                                                                        └──▶ amid a connection: as an answer?
//! ```

use std::net::IpAddr;

use super::cluster::Socket;
use super::flow::{Direction, Flow, Signal, State, connects};
use super::isolation::{First, Reason};
use super::oracle::{From, Judgement, Observed, Oracle, Sent, To};
use super::refusal::dropped;
use super::wire::{Body, Packet};

/// The ends by which a packet's flow is known, and whether it has ports. An echo is known by its identifier in place of the
/// port of who asks; every other message between the same two is of one flow.
pub(super) fn ends(packet: &Packet) -> (Socket, Socket) {
    let (src, dst) = match (&packet.body, packet.ports()) {
        (_, Some(ports)) => (ports.src, ports.dst),
        (Body::Icmp { kind, rest: [high, low, ..], .. }, None) => {
            let identifier = u16::from_be_bytes([*high, *low]);
            match echo(*kind, packet.src) {
                Some(Echo::Request) => (identifier, 0),
                Some(Echo::Reply) => (0, identifier),
                None => (0, 0),
            }
        }
        _ => (0, 0),
    };
    ((packet.src, src), (packet.dst, dst))
}

fn is_message(packet: &Packet) -> bool {
    matches!(packet.body, Body::Icmp { .. })
}

pub(super) fn is_echo(packet: &Packet) -> bool {
    matches!(&packet.body, Body::Icmp { kind, .. } if echo(*kind, packet.src).is_some())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Request,
    Reply,
}

/// RFC 792, RFC 4443 section 4.
pub(super) fn echo(kind: u8, like: IpAddr) -> Option<Echo> {
    match (kind, like.is_ipv4()) {
        (8, true) | (128, false) => Some(Echo::Request),
        (0, true) | (129, false) => Some(Echo::Reply),
        _ => None,
    }
}

impl Oracle {
    /// A packet without ports. A node without policies does not look at it.
    pub(super) fn portless(&mut self, observed: &Observed<'_>) -> Result<(), Judgement> {
        let Sent { from, packet, .. } = observed.sent;
        let judged = self.isolation.is_in_session() && self.passes_a_pod(*from, packet);
        if !judged && !self.passes_a_device(*from, packet) {
            return self.plain(packet, observed);
        }
        match self.known(packet, ends(packet), observed.now)? {
            // The flow of an echo of the identifier 0 has the tuple of all other messages, which are none of it.
            Some(_) if is_message(packet) && !is_echo(packet) => self.goes(packet, observed),
            Some(rewritten) => self.goes_on(&rewritten, observed),
            None => self.plain(packet, observed),
        }
    }

    fn passes_a_pod(&self, from: From, packet: &Packet) -> bool {
        matches!(from, From::Pod(_)) || matches!(To::of(&self.cluster, packet.dst), To::Pod(_))
    }

    /// A packet of no known flow and of no service.
    pub(super) fn plain(&mut self, packet: &Packet, observed: &Observed<'_>) -> Result<(), Judgement> {
        let (from, (src, dst)) = (observed.sent.from, ends(packet));
        let sends = matches!(from, From::Pod(_)) && self.isolation.isolates(src.0);
        let concerned = self.isolation.isolates(dst.0) || sends;
        if !concerned || !self.passes_a_pod(from, packet) {
            return self.leaves(packet, observed);
        }
        let middle = connects(packet.proto()) && !Signal::of(packet).synchronizes;
        let first = First { from: src.0, to: dst, proto: packet.proto(), middle };
        let direction = match self.isolation.verdict(first) {
            // Rule 49: the node's own processes always may.
            _ if from == From::Host => Direction::Forward,
            Ok(()) => Direction::Forward,
            Err(_) if middle && self.isolation.verdict(first.turned(src.1)).is_ok() => Direction::Reply,
            Err(reason) => return dropped(observed.seen, &[reason]),
        };
        if self.is_taken(&(packet.proto(), dst, src), (src, dst), observed.now)? {
            return dropped(observed.seen, &["tuple-collision"]);
        }
        let (client, server) = if direction == Direction::Forward { (src, dst) } else { (dst, src) };
        let mut flow = Flow::plain(packet.proto(), client, server, observed.now);
        // What the stack hands to a pod is looked at once.
        if matches!(from, From::Pod(_)) && packet.ports().is_some() {
            flow.note(Signal::of(packet), direction, observed.now);
        }
        // Known as it is, even where it is not let out then.
        self.enter(flow);
        self.leaves(packet, observed)
    }

    /// Whether policies let the client reach a backend; why not.
    pub(super) fn admits(&self, packet: &Packet, client: IpAddr, backend: Socket) -> Result<(), Reason> {
        self.isolation.verdict(First { from: client, to: backend, proto: packet.proto(), middle: false })
    }
}

impl Flow {
    /// A flow that stays what it is.
    pub(super) fn plain(proto: u8, client: Socket, server: Socket, now: u64) -> Self {
        Self {
            client,
            frontend: server,
            backend: server,
            seen: client,
            proto,
            port_name: None,
            life: 0,
            masqueraded: false,
            state: State::default(),
            last: now,
        }
    }
}
