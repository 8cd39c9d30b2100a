//! From the rules of several policies to one verdict for every port.
//!
//! ```text
//!   Admin        the first rule that means the flow: accept, deny, or pass it on
//!   namespaces   where a policy isolates the pod: what any rule lets through passes (rule 48), all else does not
//!   Baseline     the first rule that means the flow
//!                and what nobody said anything of passes
//! ```

use std::collections::BTreeSet;

use ferroflow_common::abi::policy::{Cause, PortRange, Verdict};
use ferroflow_common::addr::{Port, Proto};

use super::element::ElementId;
use crate::model::tier::Action;

/// What a set says of a class: of each port range its verdict, and of everything else the one of `otherwise`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdicts {
    pub otherwise: Verdict,
    /// The rule that says so.
    pub cause: Cause,
    /// Sorted, and no two overlap.
    pub ranges: Box<[PortRange]>,
}

/// A rule of a policy, with numbers for what it mentions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compiled {
    pub(super) layer: Layer,
    pub(super) action: Action,
    pub(super) cause: Cause,
    /// Any of these, or everybody.
    pub(super) peers: Option<Box<[ElementId]>>,
    /// Any of these, or everything, also what has no ports (rule 45).
    pub(super) ports: Option<Box<[Ports]>>,
}

/// In the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    Admin,
    /// NetworkPolicies.
    Namespaced,
    Baseline,
}

/// What NetworkPolicies make of a pod in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isolation {
    None,
    Enforced,
    /// All of them are in dry run.
    Tried,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    Range(Proto, Port, Port),
    /// What the peer calls so (rule 46).
    OfPeer(ElementId, Proto),
}

impl Compiled {
    fn has(&self, signature: &[(ElementId, Port)]) -> bool {
        let means = |element: &ElementId| ports(signature, *element).next().is_some();
        self.peers.as_ref().is_none_or(|peers| peers.iter().any(means))
    }
}

/// What the rules, which are sorted by layer and then by precedence, say of peers that mean `signature`.
pub(super) fn compile(rules: &[Compiled], signature: &[(ElementId, Port)], isolation: Isolation) -> Verdicts {
    let mut active = Active { rules, ranks: BTreeSet::new(), isolation };
    let mut edges = Vec::new();
    for (rank, rule) in rules.iter().enumerate().filter(|(_, rule)| rule.has(signature)) {
        let Some(list) = &rule.ports else {
            active.ranks.insert((rule.layer, rank));
            continue;
        };
        for (first, last) in merged(list, signature) {
            edges.push((first, Edge::Begins, rank));
            edges.push((last + 1, Edge::Ends, rank));
        }
    }
    let (otherwise, cause) = active.decision();
    edges.sort_unstable();
    let mut ranges: Vec<PortRange> = Vec::new();
    for (index, (place, edge, rank)) in edges.iter().enumerate() {
        let key = (rules[*rank].layer, *rank);
        match edge {
            Edge::Begins => active.ranks.insert(key),
            Edge::Ends => active.ranks.remove(&key),
        };
        let Some((next, ..)) = edges.get(index + 1).filter(|(next, ..)| next > place) else { continue };
        let (verdict, by) = active.decision();
        // What is denied says by which rule, also where all else is denied.
        if verdict != otherwise || verdict == Verdict::Deny && by != cause {
            push(&mut ranges, (*place, next - 1), verdict, by);
        }
    }
    Verdicts { otherwise, cause, ranges: ranges.into() }
}

/// Rules that mean what is looked at.
struct Active<'a> {
    rules: &'a [Compiled],
    ranks: BTreeSet<(Layer, usize)>,
    isolation: Isolation,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Edge {
    Begins,
    Ends,
}

impl Active<'_> {
    /// The first rule of a layer.
    fn first(&self, layer: Layer) -> Option<&Compiled> {
        let (_, rank) = self.ranks.range((layer, 0)..=(layer, usize::MAX)).next()?;
        self.rules.get(*rank)
    }

    fn decision(&self) -> (Verdict, Cause) {
        let decided = |rule: &Compiled| match rule.action {
            Action::Accept => Some((Verdict::Allow, rule.cause)),
            Action::Deny => Some((Verdict::Deny, rule.cause)),
            Action::Pass => None,
        };
        if let Some(decided) = self.first(Layer::Admin).and_then(decided) {
            return decided;
        }
        let lets = self.first(Layer::Namespaced).and_then(decided);
        if self.isolation == Isolation::Enforced {
            return lets.unwrap_or((Verdict::Deny, Cause::NONE));
        }
        let last = self.first(Layer::Baseline).and_then(decided).unwrap_or((Verdict::Allow, Cause::NONE));
        let told = self.isolation == Isolation::Tried && lets.is_none() && last.0 == Verdict::Allow;
        if told { (Verdict::WouldDeny, Cause::NONE) } else { last }
    }
}

/// The ports with which the signature means an element.
fn ports(signature: &[(ElementId, Port)], element: ElementId) -> impl Iterator<Item = Port> {
    let from = signature.partition_point(|(other, _)| *other < element);
    signature[from..].iter().take_while(move |(other, _)| *other == element).map(|(_, port)| *port)
}

/// Where a port stands among those of all protocols.
fn place(proto: Proto, port: Port) -> u32 {
    u32::from(proto.number) << 16 | u32::from(port.host())
}

/// The places that a rule's ports mean, as few ranges as say the same.
fn merged(list: &[Ports], signature: &[(ElementId, Port)]) -> Vec<(u32, u32)> {
    let mut meant: Vec<(u32, u32)> = Vec::new();
    for it in list {
        match it {
            Ports::Range(proto, first, last) => meant.push((place(*proto, *first), place(*proto, *last))),
            Ports::OfPeer(element, proto) => {
                meant.extend(
                    ports(signature, *element).map(|port| (place(*proto, port), place(*proto, port))),
                );
            }
        }
    }
    meant.sort_unstable();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for (first, last) in meant {
        match ranges.last_mut() {
            Some(before) if before.0 >> 16 == first >> 16 && first <= before.1 + 1 => {
                before.1 = before.1.max(last)
            }
            Some(_) | None => ranges.push((first, last)),
        }
    }
    ranges
}

/// Adds a range, to the one before where that says the same of what is next to it.
fn push(ranges: &mut Vec<PortRange>, (from, to): (u32, u32), verdict: Verdict, cause: Cause) {
    let proto = Proto { number: (from >> 16) as u8 };
    let (first, last) = (from as u16, to as u16);
    match ranges.last_mut() {
        Some(before)
            if before.proto == proto
                && u32::from(first) == u32::from(before.last) + 1
                && (before.verdict, before.cause) == (verdict as u8, cause.0) =>
        {
            before.last = last;
        }
        Some(_) | None => {
            ranges.push(PortRange { first, last, proto, verdict: verdict as u8, cause: cause.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(
        layer: Layer,
        action: Action,
        peers: &[ElementId],
        ports: Option<&[(Proto, u16, u16)]>,
    ) -> Compiled {
        let range = |(proto, first, last): &(Proto, u16, u16)| {
            Ports::Range(*proto, Port::new(*first), Port::new(*last))
        };
        Compiled {
            layer,
            action,
            cause: Cause::NONE,
            peers: (!peers.is_empty()).then(|| peers.into()),
            ports: ports.map(|ports| ports.iter().map(range).collect()),
        }
    }

    fn lets(peers: &[ElementId], ports: Option<&[(Proto, u16, u16)]>) -> Compiled {
        rule(Layer::Namespaced, Action::Accept, peers, ports)
    }

    /// `TCP 80-90 allow`, one after the other, and what is said of all else.
    fn said(rules: &[Compiled], elements: &[ElementId], isolation: Isolation) -> (Verdict, Vec<String>) {
        let signature: Vec<_> = elements.iter().map(|id| (*id, Port::ZERO)).collect();
        let Verdicts { otherwise, ranges, .. } = compile(rules, &signature, isolation);
        let range = |it: &PortRange| {
            format!("{} {}-{} {:?}", it.proto, it.first, it.last, Verdict::from_row(it.verdict.into()))
        };
        (otherwise, ranges.iter().map(range).collect())
    }

    const TCP: Proto = Proto::TCP;
    const UDP: Proto = Proto::UDP;

    #[test]
    fn ranges_that_touch_are_one_and_protocols_stay_apart() {
        let ports = [
            (TCP, 90, 100),
            (UDP, 80, 80),
            (TCP, 1, 80),
            (TCP, 50, 60),
            (TCP, 81, 85),
            (UDP, 65535, 65535),
            (UDP, 0, 65534),
        ];
        let (_, ranges) = said(&[lets(&[], Some(&ports))], &[], Isolation::Enforced);
        assert_eq!(ranges, ["TCP 1-85 Allow", "TCP 90-100 Allow", "UDP 0-65535 Allow"]);
    }

    #[test]
    fn rule_48_rules_add_to_each_other() {
        let port = |number| [(TCP, number, number)];
        let rules = [
            lets(&[1], Some(&port(80))),
            lets(&[2, 3], Some(&port(90))),
            lets(&[], Some(&port(100))),
            lets(&[4], None),
        ];
        let said = |elements: &[ElementId]| said(&rules, elements, Isolation::Enforced);
        let deny = |ports: &[u16]| {
            (Verdict::Deny, ports.iter().map(|it| format!("TCP {it}-{it} Allow")).collect::<Vec<_>>())
        };
        assert_eq!(said(&[]), deny(&[100]));
        assert_eq!(said(&[1]), deny(&[80, 100]));
        assert_eq!(said(&[1, 2, 3]), deny(&[80, 90, 100]));
        assert_eq!(said(&[1, 4]), (Verdict::Allow, vec![]));
        let tried = compile(&rules[..1], &[], Isolation::Tried);
        assert_eq!((tried.otherwise, tried.ranges.len()), (Verdict::WouldDeny, 0));
    }

    #[test]
    fn tiers_are_asked_one_after_the_other() {
        let rules = [
            rule(Layer::Admin, Action::Pass, &[1], Some(&[(TCP, 10, 19)])),
            rule(Layer::Admin, Action::Accept, &[1], Some(&[(TCP, 15, 29)])),
            rule(Layer::Admin, Action::Deny, &[1], Some(&[(TCP, 0, 99)])),
            lets(&[1], Some(&[(TCP, 12, 13), (TCP, 50, 120)])),
            rule(Layer::Baseline, Action::Accept, &[], Some(&[(TCP, 18, 18)])),
            rule(Layer::Baseline, Action::Deny, &[1], None),
        ];
        let (otherwise, ranges) = said(&rules, &[1], Isolation::Enforced);
        assert_eq!(otherwise, Verdict::Deny);
        assert_eq!(ranges, ["TCP 12-13 Allow", "TCP 20-29 Allow", "TCP 100-120 Allow"]);
        let (otherwise, ranges) = said(&[&rules[..3], &rules[4..]].concat(), &[1], Isolation::None);
        assert_eq!(otherwise, Verdict::Deny);
        assert_eq!(
            ranges,
            ["TCP 18-18 Allow", "TCP 20-29 Allow"],
            "nobody isolates it, so Baseline is asked"
        );
        assert_eq!(said(&rules, &[], Isolation::None), (Verdict::Allow, vec![]), "nobody says anything");
        assert_eq!(said(&rules[3..], &[1], Isolation::Tried).0, Verdict::Deny, "what is tried adds nothing");
        assert_eq!(said(&rules[..4], &[1], Isolation::Tried).0, Verdict::WouldDeny);
    }

    #[test]
    fn the_rule_that_decides_is_named() {
        let mut rules = [lets(&[], Some(&[(TCP, 80, 80)])), lets(&[], Some(&[(TCP, 81, 90)]))];
        for (index, rule) in rules.iter_mut().enumerate() {
            rule.cause = Cause::new(index, 0);
        }
        let Verdicts { cause, ranges, .. } = compile(&rules, &[], Isolation::Enforced);
        assert_eq!(cause, Cause::NONE);
        let causes: Vec<_> = ranges.iter().map(|it| (it.first, Cause(it.cause).places())).collect();
        assert_eq!(causes, [(80, Some((0, 0))), (81, Some((1, 0)))]);
    }
}
