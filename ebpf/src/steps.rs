//! The steps that a packet's way is made of.
//!
//! In the kernel each is a function of its own that the verifier follows once, whoever calls it and however often: it
//! takes a packet and numbers, and gives a number. Here they are plain calls.

use crate::conntrack;
use crate::device;
use crate::fragment::{self, Part};
use crate::icmp::{self, Changes, Errors, Quote};
use crate::judge::{self, Judges};
use crate::masquerade::{self, Exits};
use crate::packet::Reshape;
use crate::pod;
use crate::reject::Answer;
use crate::relay;
use crate::service::{self, Origin, Outcome, Way};
use crate::source::Senders;
use crate::tables::{Datagrams, Tables};

/// What [`service::in_steps`] and [`service::routed`] call, one after the other.
pub trait Steps<F: Answer + Errors, P: Reshape>:
    Tables<F> + Datagrams<P> + Judges + Exits<P> + Senders<P> + Sized
{
    /// A packet of a flow that is known, or of no service.
    #[inline(always)]
    fn known(&self, packet: &mut P, origin: Origin, way: Way) -> Outcome {
        Outcome::of(match origin {
            Origin::Pod => pod::leave::<F, P, Self>(packet, self, way),
            Origin::Outside | Origin::Tunnel | Origin::Relay => {
                device::arrive::<F, P, Self>(packet, self, way, origin)
            }
            Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => {
                pod::enter::<F, P, Self>(packet, self, way, origin)
            }
        })
    }

    /// See [`judge::judge`].
    #[inline(always)]
    fn judge(&self, packet: &mut P, flow: Outcome, origin: Origin) -> Outcome {
        Outcome::of(judge::judge::<F, P, Self>(packet, self, flow, origin))
    }

    /// See [`judge::track`].
    #[inline(always)]
    fn track_plain(&self, packet: &mut P, admitted: Outcome) -> Outcome {
        Outcome::of(judge::track::<F, P, Self>(packet, self, admitted))
    }

    /// See [`judge::portless`].
    #[inline(always)]
    fn portless(&self, packet: &mut P, origin: Origin) -> Outcome {
        Outcome::of(judge::portless::<F, P, Self>(packet, self, origin))
    }

    /// See [`conntrack::mend`].
    #[inline(always)]
    fn mend(&self, packet: &mut P) {
        conntrack::mend::<F, P, Self>(packet, self);
    }

    /// See [`service::choose`] and [`relay::choose`].
    #[inline(always)]
    fn choose(&self, packet: &mut P, origin: Origin) -> Outcome {
        Outcome::of(match origin {
            Origin::Relay => relay::choose::<F, P, Self>(packet, self),
            Origin::Tunnel => service::choose::<F, P, Self>(packet, self, Origin::Outside),
            Origin::Pod | Origin::Outside | Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => {
                service::choose::<F, P, Self>(packet, self, origin)
            }
        })
    }

    /// See [`service::track`].
    #[inline(always)]
    fn track_flow(&self, packet: &mut P, chosen: Outcome) -> Outcome {
        Outcome::of(service::track::<F, P, Self>(packet, self, chosen))
    }

    /// See [`masquerade::open`].
    #[inline(always)]
    fn masquerade_flow(&self, packet: &mut P) -> Outcome {
        Outcome::of(masquerade::open::<F, P, Self>(packet, self))
    }

    /// See [`masquerade::known_echo`].
    #[inline(always)]
    fn known_echo(&self, packet: &mut P, origin: Origin) -> Outcome {
        Outcome::of(masquerade::known_echo::<F, P, Self>(packet, self, origin))
    }

    /// Turns the packet into its own refusal.
    #[inline(always)]
    fn refuse(&self, packet: &mut P) -> Outcome {
        Outcome::of(service::refuse::<F, P>(packet))
    }

    /// See [`icmp::find`].
    #[inline(always)]
    fn find_error(&self, packet: &mut P) -> Quote {
        icmp::find::<F, P>(packet)
    }

    /// See [`icmp::deliver`].
    #[inline(always)]
    fn deliver_error(&self, packet: &mut P, quote: Quote, origin: Origin) -> Outcome {
        Outcome::of(icmp::deliver::<F, P, Self>(packet, self, quote, origin))
    }

    /// See [`icmp::requote`].
    #[inline(always)]
    fn requote_error(&self, packet: &mut P, quote: Quote) -> Changes {
        icmp::requote::<F, P, Self>(packet, self, quote)
    }

    /// See [`icmp::mend`]; a drop, or any other outcome.
    #[inline(always)]
    fn mend_error(&self, packet: &mut P, quote: Quote, changes: Changes) -> Outcome {
        Outcome::of(icmp::mend::<F, P>(packet, quote, changes).map(|()| Outcome::STACK))
    }

    /// See [`fragment::find`].
    #[inline(always)]
    fn find_fragment(&self, packet: &mut P) -> Part {
        fragment::find::<F, P>(packet)
    }

    /// See [`fragment::first`].
    #[inline(always)]
    fn first_fragment(&self, packet: &mut P, part: Part, origin: Origin) -> Outcome {
        Outcome::of(fragment::first::<F, P, Self>(packet, self, part, origin))
    }

    /// See [`fragment::later`].
    #[inline(always)]
    fn later_fragment(&self, packet: &mut P, part: Part, origin: Origin) -> Outcome {
        Outcome::of(fragment::later::<F, P, Self>(packet, self, part, origin))
    }

    /// See [`fragment::remember`].
    #[inline(always)]
    fn remember_fragment(&self, packet: &mut P, outcome: Outcome, origin: Origin) {
        fragment::remember::<F, P, Self>(packet, self, outcome, origin);
    }
}
