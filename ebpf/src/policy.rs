//! Whether a new flow may pass: the class of its other end, what the pod's policy set says of that class, and what that
//! says of the port.
//!
//! The caller knows what policies are not about: replies, a pod's traffic with its own node, which is known by the path
//! it takes (rule 49), and a pod's traffic with itself.

use ferroflow_common::abi::policy::{
    Cause, Class, EndpointPolicy, PolicyKey, PortRange, Rules, Verdict, WORLD,
};
use ferroflow_common::addr::{Addr, Port, Proto};

/// The tables of policies.
pub trait Policies {
    /// The class of this very address.
    fn class(&self, addr: &Addr) -> Option<Class>;
    /// The class of the longest range that has the address.
    fn range_class(&self, addr: &Addr) -> Option<Class>;
    fn rules(&self, key: &PolicyKey) -> Option<Rules>;
    /// `None` past the end of the array.
    fn port_range(&self, row: u32) -> Option<PortRange>;

    /// The same number, of which the verifier knows no more than of `unknown`: see [`crate::packet::Packet::forget`].
    #[inline(always)]
    fn forget(&self, number: u32, unknown: u32) -> u32 {
        let _unknown = unknown;
        number
    }
}

/// What a packet asks of a policy set: its protocol and its destination's port, 0 where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub proto: Proto,
    pub port: Port,
}

impl Wanted {
    /// Where the port stands among those of all protocols.
    #[inline(always)]
    pub const fn place(self) -> u32 {
        place(self.proto, self.port.host())
    }

    /// The port at this place.
    #[inline(always)]
    pub const fn at(place: u32) -> Self {
        Self { proto: Proto { number: (place >> 16) as u8 }, port: Port::new(place as u16) }
    }
}

/// How policies see an address: after service translation the backend's, before masquerade the client's (rule 47).
#[inline(always)]
pub fn class_of(tables: &impl Policies, addr: &Addr) -> Class {
    match tables.class(addr) {
        Some(class) => class,
        None => tables.range_class(addr).unwrap_or(WORLD),
    }
}

/// What a set, which is one of [`EndpointPolicy`], says of a class of peers. A set of which the tables know nothing
/// lets nothing pass.
#[inline(always)]
pub fn allowed(tables: &impl Policies, set: u32, class: Class, wanted: Wanted) -> Verdict {
    decided(tables, set, class, wanted).0
}

/// The same, and which rule says so.
#[inline(always)]
pub fn decided(tables: &impl Policies, set: u32, class: Class, wanted: Wanted) -> (Verdict, Cause) {
    if set == EndpointPolicy::OPEN {
        return (Verdict::Allow, Cause::NONE);
    }
    if set == EndpointPolicy::CLOSED {
        return (Verdict::Deny, Cause::NONE);
    }
    let own = if class == WORLD { None } else { tables.rules(&PolicyKey { set, class }) };
    let rules = match own {
        Some(rules) => rules,
        None => match tables.rules(&PolicyKey { set, class: PolicyKey::OTHERS }) {
            Some(rules) => rules,
            None => return (Verdict::Deny, Cause::NONE),
        },
    };
    verdict(tables, &rules, wanted)
}

/// Halves the ranges until one has the port, or none is left.
#[inline(always)]
fn verdict(tables: &impl Policies, rules: &Rules, wanted: Wanted) -> (Verdict, Cause) {
    let sought = wanted.place();
    let (mut from, mut length) = (rules.offset, rules.length);
    for _ in 0..PortRange::STEPS {
        if length == 0 {
            break;
        }
        let half = length / 2;
        let middle = from.wrapping_add(half);
        let Some(range) = tables.port_range(middle) else { return (Verdict::Deny, Cause::NONE) };
        let unknown = place(range.proto, range.first);
        if sought < place(range.proto, range.first) {
            length = half;
        } else if sought > place(range.proto, range.last) {
            from = middle.wrapping_add(1);
            length -= half + 1;
        } else {
            return (Verdict::from_row(u32::from(range.verdict)), Cause(range.cause));
        }
        // Whichever half it is, what follows is followed once.
        (from, length) = (tables.forget(from, unknown), tables.forget(length, unknown));
    }
    (rules.verdict(), rules.cause())
}

/// Where a port stands among those of all protocols.
#[inline(always)]
const fn place(proto: Proto, port: u16) -> u32 {
    (proto.number as u32) << 16 | port as u32
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::policy::RangeKey;

    use super::*;
    use crate::tables::fake::FakePolicies;

    fn range(proto: Proto, first: u16, last: u16, verdict: Verdict) -> PortRange {
        PortRange { first, last, proto, verdict: verdict as u8, cause: 0 }
    }

    fn ask(tables: &FakePolicies, class: Class, proto: Proto, port: u16) -> Verdict {
        allowed(tables, 7, class, Wanted { proto, port: Port::new(port) })
    }

    #[test]
    fn a_class_without_rules_of_its_own_has_those_of_the_others() {
        let mut tables = FakePolicies::default();
        assert_eq!(ask(&tables, 1, Proto::TCP, 80), Verdict::Deny, "the set is not in the tables");
        tables.lay(7, PolicyKey::OTHERS, Verdict::Deny, &[range(Proto::TCP, 80, 80, Verdict::Allow)]);
        tables.lay(7, 1, Verdict::Allow, &[]);
        for (class, port, verdict) in [
            (WORLD, 80, Verdict::Allow),
            (WORLD, 81, Verdict::Deny),
            (2, 80, Verdict::Allow),
            (2, 81, Verdict::Deny),
            (1, 81, Verdict::Allow),
        ] {
            assert_eq!(ask(&tables, class, Proto::TCP, port), verdict, "class {class} port {port}");
        }
        let wanted = Wanted { proto: Proto::TCP, port: Port::new(80) };
        assert_eq!(allowed(&tables, EndpointPolicy::OPEN, 1, wanted), Verdict::Allow);
        assert_eq!(allowed(&tables, EndpointPolicy::CLOSED, 1, wanted), Verdict::Deny);
    }

    #[test]
    fn rule_45_every_port_is_found_and_no_other_protocol_is_taken_for_it() {
        let odd = (1..=65535).step_by(2);
        let ranges: Vec<_> = [Proto::TCP, Proto::UDP, Proto::SCTP]
            .into_iter()
            .flat_map(|proto| odd.clone().map(move |port| range(proto, port, port, Verdict::Allow)))
            .collect();
        let mut tables = FakePolicies::default();
        tables.lay(7, PolicyKey::OTHERS, Verdict::Deny, &ranges);
        for port in 0..=65535 {
            let verdict = if port % 2 == 1 { Verdict::Allow } else { Verdict::Deny };
            for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
                assert_eq!(ask(&tables, WORLD, proto, port), verdict, "{proto} {port}");
            }
        }
        assert_eq!(ask(&tables, WORLD, Proto::ICMP, 0), Verdict::Deny, "it has no ports");
        assert!(tables.steps.get() <= u64::from(PortRange::STEPS) * (3 * 65536 + 1));
    }

    #[test]
    fn ranges_have_ends_and_verdicts_of_their_own() {
        let mut tables = FakePolicies::default();
        let ranges = [
            range(Proto::TCP, 10, 20, Verdict::Allow),
            range(Proto::TCP, 21, 30, Verdict::WouldDeny),
            range(Proto::UDP, 0, 65535, Verdict::Allow),
        ];
        tables.lay(7, PolicyKey::OTHERS, Verdict::Deny, &ranges);
        for (proto, port, verdict) in [
            (Proto::TCP, 9, Verdict::Deny),
            (Proto::TCP, 10, Verdict::Allow),
            (Proto::TCP, 20, Verdict::Allow),
            (Proto::TCP, 21, Verdict::WouldDeny),
            (Proto::TCP, 31, Verdict::Deny),
            (Proto::UDP, 0, Verdict::Allow),
            (Proto::UDP, 65535, Verdict::Allow),
            (Proto::SCTP, 15, Verdict::Deny),
        ] {
            assert_eq!(ask(&tables, WORLD, proto, port), verdict, "{proto} {port}");
        }
    }

    #[test]
    fn rule_47_an_address_without_a_row_has_the_class_of_its_range() {
        let mut tables = FakePolicies::default();
        let at = |last| Addr::v4([10, 0, 0, last]);
        tables.ranges.insert(RangeKey { bits: 96 + 24, addr: at(0) }, 1);
        tables.ranges.insert(RangeKey { bits: 96 + 31, addr: at(8) }, 2);
        tables.classes.insert(at(9), 3);
        for (addr, class) in [(at(7), 1), (at(8), 2), (at(9), 3), (Addr::v4([10, 0, 1, 0]), WORLD)] {
            assert_eq!(class_of(&tables, &addr), class, "{addr}");
        }
    }
}
