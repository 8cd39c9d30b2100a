//! What may come into a local pod, and what may go out of it: a packet's other end has a class, a policy set and a
//! class have rules, and rules name ranges of ports.
//!
//! ```text
//!   peer's address ──ipcache──▶ class ─┐
//!        (longest range, where the     ├─▶ policy ──▶ rules ──▶ port_ranges, by halves ──▶ verdict
//!         address has no row)          │
//!   pod ──endpoints──▶ policy set ─────┘
//! ```
//!
//! A first packet costs two or three hash lookups a direction and a few array reads, however many policies there are;
//! a trie of all rules would have a step, and a cache miss, for every bit in which keys differ. Rules are complete: the
//! first row that is found decides, and nothing has to be combined in the kernel. That is why deny rules and tiers
//! (`ClusterNetworkPolicy`) need no more than other verdicts: the plan lays the tiers over each other and writes what
//! comes out, port range by port range.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::{Addr, Proto};
use crate::tcp::{Direction, Flags, State};

/// A class of peers: addresses that all policies of this node's pods see alike.
pub type Class = u32;

/// The class of an address that no policy of this node's pods means: it has no row in `ipcache`.
pub const WORLD: Class = 0;

/// A range of addresses and its class: a key of the LPM trie `ipcache_ranges`, which wants the number of significant
/// bits first and compares the address from its first byte on. That is network order, in which a prefix is a prefix.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RangeKey {
    /// 96 more than the prefix says where it is of IPv4.
    pub bits: u32,
    pub addr: Addr,
}

impl RangeKey {
    pub const EVERY_BIT: u32 = 128;
}

/// What applies to a local pod, in its row of `endpoints`.
///
/// A set is what several policies say of one direction: pods that the same policies select have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EndpointPolicy {
    /// What may come in; [`EndpointPolicy::OPEN`] where no policy isolates the pod that way.
    pub ingress: u32,
    /// What may go out; likewise.
    pub egress: u32,
    /// Until this second of `CLOCK_MONOTONIC` a connection that nobody has tracked, since no policy isolated the pod when
    /// it began, goes on as if it had been (rule 52). 0 where the pod was isolated from its start.
    pub adopts_until: u32,
    /// [`EndpointPolicy::FINISH`] or [`EndpointPolicy::CUT`].
    pub live: u32,
}

impl EndpointPolicy {
    /// How long connections are adopted, in seconds: as long as one that is tracked may be idle.
    pub const ADOPTION: u32 = State::NEW.after(Flags::NONE, Direction::Reply).lifetime(Proto::TCP);
    /// What is established goes on, whatever policies say of it by now.
    pub const FINISH: u32 = 0;
    /// A live flow is judged again when policies have changed, and dropped where they do not allow it any more.
    pub const CUT: u32 = 1;
    /// Not isolated.
    pub const OPEN: u32 = 0;
    /// Nothing passes: the pod's policies have no room in the tables, or are not in them yet. No set has this number.
    pub const CLOSED: u32 = u32::MAX;
}

/// A key of the hash table `policy`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PolicyKey {
    pub set: u32,
    /// Or [`PolicyKey::OTHERS`].
    pub class: Class,
}

impl PolicyKey {
    /// The row for every class without one of its own. A set that is in the tables has it.
    pub const OTHERS: Class = u32::MAX;
}

/// What a set says of a class: the verdict of the port range that has the packet's port, or else `otherwise`. Replaced
/// as a whole, so a program sees the old rules or the new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Rules {
    /// First row in `port_ranges`.
    pub offset: u32,
    /// How many rows.
    pub length: u32,
    /// A [`Verdict`], also of what has no ports, and from bit 16 on the [`Cause`] of that.
    pub otherwise: u32,
}

impl Rules {
    #[inline(always)]
    pub const fn verdict(&self) -> Verdict {
        Verdict::from_row(self.otherwise & 0xffff)
    }

    pub const fn cause(&self) -> Cause {
        Cause((self.otherwise >> 16) as u16)
    }
}

/// Which rule of a set decides: the policy's place among those of the set, and the rule's in the policy. For eyes: the
/// programs do not look at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cause(pub u16);

impl Cause {
    /// No rule: the pod is isolated, or it is not.
    pub const NONE: Self = Self(0);
    /// A rule whose place has no room here.
    pub const UNNAMED: Self = Self(1);
    const RULES: usize = 512;
    const POLICIES: usize = 127;

    /// The rule at this place of the policy at that place.
    pub const fn new(policy: usize, rule: usize) -> Self {
        if policy >= Self::POLICIES || rule >= Self::RULES {
            return Self::UNNAMED;
        }
        Self(((policy + 1) * Self::RULES + rule) as u16)
    }

    /// The places of the policy and of the rule in it.
    pub const fn places(self) -> Option<(usize, usize)> {
        let number = self.0 as usize;
        match (number / Self::RULES).checked_sub(1) {
            Some(policy) => Some((policy, number % Self::RULES)),
            None => None,
        }
    }
}

/// From the first port of a protocol to the last, both included. The ranges of one row of rules are sorted by protocol
/// and port, and no two have a port in common.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortRange {
    /// In the host's order, in which ranges are compared.
    pub first: u16,
    pub last: u16,
    pub proto: Proto,
    /// A [`Verdict`].
    pub verdict: u8,
    /// Which rule of the set says so, for eyes: a [`Cause`].
    pub cause: u16,
}

impl PortRange {
    /// As many as there can be of the three protocols with ports, each of one port, are found in so many steps.
    pub const STEPS: u32 = 18;
}

/// What becomes of a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Verdict {
    Deny = 0,
    Allow = 1,
    /// It passes, and is told: a policy in dry run would drop it.
    WouldDeny = 2,
}

impl Verdict {
    /// What is none of them denies.
    #[inline(always)]
    pub const fn from_row(number: u32) -> Self {
        match number {
            1 => Self::Allow,
            2 => Self::WouldDeny,
            _ => Self::Deny,
        }
    }
}

/// What a number of a set or a class stands for, for the agent that comes next and for eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Meaning {
    /// The same after a restart, and different for everything else.
    pub fingerprint: [u8; 16],
    /// The names of policies, or what a peer is selected by; cut where the field ends.
    pub text: [u8; 240],
}

impl Meaning {
    pub fn new(fingerprint: [u8; 16], text: &str) -> Self {
        let mut bytes = [0; 240];
        for (to, from) in bytes.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Self { fingerprint, text: bytes }
    }

    /// The text as far as it is UTF-8.
    pub fn as_str(&self) -> &str {
        let end = self.text.iter().position(|&byte| byte == 0).unwrap_or(self.text.len());
        let text = self.text.get(..end).unwrap_or_default();
        match core::str::from_utf8(text) {
            Ok(text) => text,
            Err(error) => {
                core::str::from_utf8(text.get(..error.valid_up_to()).unwrap_or_default()).unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meaning_is_cut_between_characters() {
        let long = core::str::from_utf8(&[b'a'; 239]).unwrap();
        let mut text = [b'a'; 241];
        text[239..].copy_from_slice("\u{e9}".as_bytes());
        assert_eq!(Meaning::new([0; 16], core::str::from_utf8(&text).unwrap()).as_str(), long);
        assert_eq!(Meaning::new([1; 16], "shop/deny").as_str(), "shop/deny");
    }

    #[test]
    fn a_cause_names_a_rule_or_none() {
        for (policy, rule) in [(0, 0), (0, 511), (126, 511), (3, 7)] {
            assert_eq!(Cause::new(policy, rule).places(), Some((policy, rule)));
        }
        assert_eq!((Cause::NONE.places(), Cause::UNNAMED.places()), (None, None));
        assert_eq!((Cause::new(127, 0), Cause::new(0, 512)), (Cause::UNNAMED, Cause::UNNAMED));
    }

    #[test]
    fn only_known_verdicts_let_pass() {
        for verdict in [Verdict::Deny, Verdict::Allow, Verdict::WouldDeny] {
            assert_eq!(Verdict::from_row(verdict as u32), verdict);
        }
        assert_eq!(Verdict::from_row(3), Verdict::Deny);
    }
}
