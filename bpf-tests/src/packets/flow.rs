//! A flow as the oracle knows it: its ends, what was seen of it, and how long it lives.

use super::cluster::Socket;
use super::wire::{ACK, Body, FIN, Packet, RST, SCTP, SYN, Segment, TCP};

#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) client: Socket,
    pub(super) frontend: Socket,
    pub(super) backend: Socket,
    /// What the backend takes for the client.
    pub(super) seen: Socket,
    pub(super) proto: u8,
    /// A pod's to the world, by an address of the node.
    pub(super) masqueraded: bool,
    /// The service port through which it goes; none where it is of no service.
    pub(super) port_name: Option<String>,
    pub(super) life: u32,
    pub(super) state: State,
    /// Second of the last packet.
    pub(super) last: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is seen for itself")]
pub(super) struct State {
    pub(super) replied: bool,
    pub(super) closed_by_client: bool,
    pub(super) closed_by_backend: bool,
    pub(super) reset: bool,
}

impl State {
    pub(super) fn is_over(self) -> bool {
        self.reset || (self.closed_by_client && self.closed_by_backend)
    }

    /// Seconds without a packet after which the flow is forgotten; kube-proxy's and the kernel's defaults.
    pub(super) fn lifetime(self, proto: u8) -> u64 {
        match proto {
            _ if !connects(proto) && self.replied => 120,
            _ if !connects(proto) => 30,
            _ if self.is_over() => 10,
            SCTP if self.replied => 210,
            _ if self.closed_by_client || self.closed_by_backend => 3_600,
            _ if self.replied => 86_400,
            _ => 60,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    Alive,
    Expired,
    /// Within the seconds by which clocks and lazy writes may differ.
    Unsure,
}

/// By so many seconds two clocks may differ.
pub(super) const CLOCKS: u64 = 3;

impl Flow {
    /// Takes a packet of it in.
    pub(super) fn note(&mut self, signal: Signal, direction: Direction, now: u64) {
        self.last = now;
        self.state.reset |= signal.resets;
        match direction {
            Direction::Forward => self.state.closed_by_client |= signal.closes,
            Direction::Reply => {
                self.state.replied = true;
                self.state.closed_by_backend |= signal.closes;
            }
        }
    }

    /// A busy flow is written seldom: it may be forgotten early by an eighth of its lifetime, at most a minute.
    pub(super) fn age(&self, now: u64) -> Age {
        let lifetime = self.state.lifetime(self.proto);
        let idle = now.saturating_sub(self.last);
        if idle + CLOCKS + (lifetime / 8).min(60) < lifetime {
            Age::Alive
        } else if idle > lifetime + CLOCKS {
            Age::Expired
        } else {
            Age::Unsure
        }
    }
}

/// Whether a protocol has connections.
pub(super) fn connects(proto: u8) -> bool {
    matches!(proto, TCP | SCTP)
}

/// What a packet says of its connection.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a packet may say all of them")]
pub(super) struct Signal {
    pub(super) opens: bool,
    /// It is the first packet, or the answer to that.
    pub(super) synchronizes: bool,
    pub(super) closes: bool,
    pub(super) resets: bool,
}

impl Signal {
    pub(super) fn of(packet: &Packet) -> Self {
        let flags = match &packet.body {
            Body::Tcp(Segment { flags, .. }) => *flags,
            // RFC 9260 section 3.2: INIT, INIT ACK, ABORT, SHUTDOWN, SHUTDOWN ACK, SHUTDOWN COMPLETE.
            Body::Sctp { chunks, .. } => match chunks.first() {
                Some(1) => SYN,
                Some(2) => SYN | ACK,
                Some(6 | 14) => RST,
                Some(7 | 8) => FIN | ACK,
                Some(_) | None => ACK,
            },
            Body::Udp { .. } | Body::Icmp { .. } | Body::Other { .. } => 0,
        };
        Self {
            opens: flags & (SYN | ACK | RST) == SYN,
            synchronizes: flags & SYN != 0,
            closes: flags & FIN != 0,
            resets: flags & RST != 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Reply,
}
