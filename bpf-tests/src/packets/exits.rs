//! What must become of pods' packets to the world where the node stands in for them: each flow leaves by the node's address,
//! from a port of its own, and an echo with an identifier of its own.

use std::net::IpAddr;

use super::cluster::{Configuration, Socket};
use super::flow::{Direction, Flow, Signal, connects};
use super::oracle::{CHOSEN_PORTS, From, Judgement, Observed, Oracle, Seen, Sent, To};
use super::plain::{Echo, echo, ends, is_echo};
use super::refusal::dropped;
use super::wire::{Body, Packet};

impl Oracle {
    /// Rule 26 for the world: nobody out there knows the way back to a pod.
    pub(super) fn is_masqueraded(&self, from: From, dst: IpAddr) -> bool {
        self.configuration == Configuration::Masquerading
            && matches!(from, From::Pod(_))
            && To::of(&self.cluster, dst) == To::Wire
            && !self.cluster.is_near(dst)
    }

    /// Whether a pod sends from an address that is not its own.
    pub(super) fn is_spoofed(&self, sent: &Sent) -> bool {
        let From::Pod(pod) = sent.from else { return false };
        self.configuration == Configuration::Masquerading && !self.cluster.are_one_pods(pod, sent.packet.src)
    }

    /// Whether a packet without ports is looked at where it leaves the node, or comes to it.
    pub(super) fn passes_a_device(&self, from: From, packet: &Packet) -> bool {
        self.configuration == Configuration::Masquerading
            && is_echo(packet)
            && (from == From::Wire || To::of(&self.cluster, packet.dst) == To::Wire)
    }

    /// A packet of no known flow that may leave by the node's address.
    pub(super) fn leaves(&mut self, packet: &Packet, observed: &Observed<'_>) -> Result<(), Judgement> {
        if !self.is_masqueraded(observed.sent.from, packet.dst) {
            return self.goes(packet, observed);
        }
        let opens = match &packet.body {
            Body::Icmp { kind, .. } => echo(*kind, packet.src) == Some(Echo::Request),
            Body::Other { .. } => return dropped(observed.seen, &["not-masqueradable"]),
            Body::Tcp(_) | Body::Sctp { .. } => Signal::of(packet).opens,
            Body::Udp { .. } => true,
        };
        // Somebody may know the way back: the packet is of a flow that another node opened, or an answer to an echo.
        if !opens {
            return self.goes(packet, observed);
        }
        let Some(own) = self.cluster.primary(packet.dst) else {
            return dropped(observed.seen, &["no-masquerade-address"]);
        };
        let (src, dst) = ends(packet);
        let went = if let Seen::Went(_, went) = observed.seen { Some(ends(went).0.1) } else { None };
        let port = went.filter(|port| CHOSEN_PORTS.contains(port));
        let Some(seen) = port.map(|port| (own, port)) else {
            return Err(Judgement::Wrong(format!("from {own}, and a port that the node has chosen")));
        };
        if self.is_taken(&(packet.proto(), dst, seen), (src, dst), observed.now)? {
            return Err(Judgement::Wrong(format!("from a free port of {own}")));
        }
        self.goes(&known_as(packet, seen, dst), observed)?;
        let plain = Flow::plain(packet.proto(), src, dst, observed.now);
        let mut flow = Flow { seen, masqueraded: true, ..plain };
        flow.note(Signal::of(packet), Direction::Forward, observed.now);
        self.enter(flow);
        Ok(())
    }
}

/// The packet between other ends, one of which is the identifier of an echo.
pub(super) fn known_as(packet: &Packet, src: Socket, dst: Socket) -> Packet {
    let mut packet = packet.between(src, dst);
    let (from, to) = (src.1, dst.1);
    if let Body::Icmp { kind, rest, .. } = &mut packet.body
        && let Some(direction) = echo(*kind, packet.src)
    {
        let identifier = if direction == Echo::Request { from } else { to };
        rest[..2].copy_from_slice(&identifier.to_be_bytes());
    }
    packet
}

/// Whether a connection that is over begins anew: to the world it is the same for as long as it may be.
pub(super) fn begins_anew(packet: &Packet, flow: &Flow) -> bool {
    connects(packet.proto()) && Signal::of(packet).opens && flow.state.is_over()
}
