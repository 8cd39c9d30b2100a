//! The states of a tracked connection and how long an idle one is kept.

use crate::addr::Proto;

/// TCP flags as they stand in byte 13 of the header, and what SCTP says by chunks in the same words
/// ([`Flags::of_chunk`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub u8);

impl Flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
    /// What a packet of another protocol has.
    pub const NONE: Self = Self(0);

    /// What a packet's first chunk does to its association (RFC 9260 section 3.2). Those that open and close one are
    /// alone in their packet, or first in it.
    #[inline(always)]
    pub const fn of_chunk(kind: u8) -> Self {
        Self(match kind {
            chunk::INIT => Self::SYN,
            chunk::INIT_ACK => Self::SYN | Self::ACK,
            chunk::ABORT | chunk::SHUTDOWN_COMPLETE => Self::RST,
            chunk::SHUTDOWN | chunk::SHUTDOWN_ACK => Self::FIN | Self::ACK,
            _ => Self::ACK,
        })
    }

    /// The first packet of a connection: SYN and not ACK.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }
}

/// Numbers of SCTP's chunks.
pub mod chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN: u8 = 7;
    pub const SHUTDOWN_ACK: u8 = 8;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// Which way a packet goes relative to the one that opened its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Reply,
}

/// What a connection has been seen to do, as a set of bits that only grow until it is opened again. UDP uses
/// [`State::REPLIED`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u8);

impl State {
    pub const NEW: Self = Self(0);
    /// A packet came back.
    pub const REPLIED: u8 = 1;
    pub const FIN_FORWARD: u8 = 2;
    pub const FIN_REPLY: u8 = 4;
    pub const RESET: u8 = 8;

    /// The state after one more packet.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, flags: Flags, direction: Direction) -> Self {
        let mut bits = self.0;
        let fin = match direction {
            Direction::Forward => Self::FIN_FORWARD,
            Direction::Reply => {
                bits |= Self::REPLIED;
                Self::FIN_REPLY
            }
        };
        if flags.0 & Flags::FIN != 0 {
            bits |= fin;
        }
        if flags.0 & Flags::RST != 0 {
            bits |= Self::RESET;
        }
        Self(bits)
    }

    /// The state of a flow of which this direction alone is seen, where `alone` is 1: a packet that opens nothing shows that
    /// the other end has answered. Computed, not decided: the programs' verifier would follow both ways.
    #[inline(always)]
    #[must_use]
    pub const fn answered(self, alone: u8, flags: Flags) -> Self {
        let opening = (flags.0 & (Flags::SYN | Flags::ACK | Flags::RST)) ^ Flags::SYN;
        let continues = ((opening as u16 + 0xff) >> 8) as u8;
        Self(self.0 | (alone & continues & Self::REPLIED))
    }

    /// Both sides are done: a SYN on the same tuple is a new connection (rule 35).
    #[inline(always)]
    pub const fn closed(self) -> bool {
        let fins = Self::FIN_FORWARD | Self::FIN_REPLY;
        self.0 & Self::RESET != 0 || self.0 & fins == fins
    }

    pub const fn name(self, proto: Proto) -> &'static str {
        match (proto.connects(), self.0 & Self::REPLIED != 0) {
            (true, _) if self.closed() => "closed",
            (true, _) if self.0 & (Self::FIN_FORWARD | Self::FIN_REPLY) != 0 => "closing",
            (true, true) => "established",
            (true, false) => "opening",
            (false, true) => "replied",
            (false, false) => "unreplied",
        }
    }

    /// How many seconds an idle flow in this state is kept: kube-proxy's defaults where it sets one (24 h
    /// established, 1 h half closed: `conntrack.tcpEstablishedTimeout`, `tcpCloseWaitTimeout`), the kernel's
    /// `nf_conntrack_*_timeout` elsewhere. An SCTP association probes its idle paths every 30 seconds (RFC 9260
    /// section 16), so it need not be kept for a day.
    #[inline(always)]
    pub const fn lifetime(self, proto: Proto) -> u32 {
        let replied = self.0 & Self::REPLIED != 0;
        if proto.connects() {
            let sctp = proto.number == Proto::SCTP.number;
            if self.closed() {
                10
            } else if sctp && replied {
                210
            } else if self.0 & (Self::FIN_FORWARD | Self::FIN_REPLY) != 0 {
                3_600
            } else if replied {
                86_400
            } else {
                60
            }
        } else if replied {
            120
        } else {
            30
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::vec::Vec;

    fn run(packets: &[(u8, Direction)]) -> State {
        packets.iter().fold(State::NEW, |state, &(flags, direction)| state.after(Flags(flags), direction))
    }

    #[test]
    fn a_connection_opens_lives_and_closes() {
        use Direction::{Forward, Reply};
        let opening = run(&[(Flags::SYN, Forward)]);
        assert_eq!((opening.name(Proto::TCP), opening.lifetime(Proto::TCP)), ("opening", 60));
        let established =
            run(&[(Flags::SYN, Forward), (Flags::SYN | Flags::ACK, Reply), (Flags::ACK, Forward)]);
        assert_eq!((established.name(Proto::TCP), established.lifetime(Proto::TCP)), ("established", 86_400));
        let half = established.after(Flags(Flags::FIN | Flags::ACK), Forward);
        assert_eq!((half.name(Proto::TCP), half.lifetime(Proto::TCP)), ("closing", 3_600));
        let closed = half.after(Flags(Flags::FIN | Flags::ACK), Reply);
        assert_eq!((closed.closed(), closed.lifetime(Proto::TCP)), (true, 10));
        assert!(established.after(Flags(Flags::RST), Reply).closed());
    }

    #[test]
    fn only_a_bare_syn_opens() {
        assert!(Flags(Flags::SYN).opens());
        assert!(Flags(Flags::SYN | 0xc0).opens(), "ECN bits do not matter");
        assert!(!Flags(Flags::SYN | Flags::ACK).opens());
        assert!(!Flags(Flags::SYN | Flags::RST).opens());
        assert!(!Flags(Flags::ACK).opens());
    }

    #[test]
    fn an_association_opens_lives_and_closes() {
        use Direction::{Forward, Reply};
        let chunks = |chunks: &[(u8, Direction)]| {
            let flags = chunks.iter().map(|&(kind, direction)| (Flags::of_chunk(kind).0, direction));
            run(&flags.collect::<Vec<_>>())
        };
        let said = |state: State| (state.name(Proto::SCTP), state.lifetime(Proto::SCTP));
        let opening = [(chunk::INIT, Forward)];
        assert_eq!(said(chunks(&opening)), ("opening", 60));
        let established = [(chunk::INIT, Forward), (chunk::INIT_ACK, Reply), (chunk::DATA, Forward)];
        assert_eq!(said(chunks(&established)), ("established", 210));
        let closed = [(chunk::INIT_ACK, Reply), (chunk::SHUTDOWN, Reply), (chunk::SHUTDOWN_ACK, Forward)];
        assert_eq!(said(chunks(&closed[..2])), ("closing", 210));
        for close in [&closed[..], &[(chunk::ABORT, Reply)], &[(chunk::SHUTDOWN_COMPLETE, Forward)]] {
            assert_eq!(said(chunks(close)), ("closed", 10));
        }
        assert!(Flags::of_chunk(chunk::INIT).opens());
        assert!(!Flags::of_chunk(chunk::INIT_ACK).opens());
    }

    #[test]
    fn one_direction_shows_that_the_other_answers() {
        for flags in 0..=u8::MAX {
            let flags = Flags(flags);
            let answered = State::NEW.answered(1, flags);
            assert_eq!(answered.0 & State::REPLIED == 0, flags.opens(), "{flags:?}");
            assert_eq!(State(State::RESET).answered(0, flags).0, State::RESET);
        }
    }

    #[test]
    fn udp_lives_longer_once_answered() {
        assert_eq!(State::NEW.lifetime(Proto::UDP), 30);
        assert_eq!(State::NEW.after(Flags::NONE, Direction::Reply).lifetime(Proto::UDP), 120);
    }
}
