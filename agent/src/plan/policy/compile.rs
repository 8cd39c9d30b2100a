//! From the rules of several policies to one verdict for every port.

use ferroflow_common::abi::policy::{PortRange, Verdict};
use ferroflow_common::addr::{Port, Proto};

use super::element::ElementId;
use crate::model::policy::Mode;

/// What a set says of a class: of each port range its verdict, and of everything else the one of `otherwise`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdicts {
    pub otherwise: Verdict,
    /// Sorted, and no two overlap.
    pub ranges: Box<[PortRange]>,
}

/// A rule of a policy, with numbers for what it mentions.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Compiled {
    /// Any of these, or everybody.
    pub(super) peers: Option<Box<[ElementId]>>,
    /// Any of these, or everything, also what has no ports (rule 45).
    pub(super) ports: Option<Box<[Ports]>>,
}

#[derive(Debug, PartialEq, Eq)]
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

/// What the rules say of peers that mean `signature`. Policies only add to each other (rule 48): whatever any of them
/// lets through passes.
pub(super) fn compile<'a>(
    rules: impl Iterator<Item = &'a Compiled>,
    signature: &[(ElementId, Port)],
    mode: Mode,
) -> Verdicts {
    let mut allowed = Vec::new();
    for rule in rules.filter(|rule| rule.has(signature)) {
        let Some(list) = &rule.ports else {
            return Verdicts { otherwise: Verdict::Allow, ranges: Box::default() };
        };
        for it in list {
            match it {
                Ports::Range(proto, first, last) => allowed.push((*proto, first.host(), last.host())),
                Ports::OfPeer(element, proto) => {
                    let numbers = ports(signature, *element).map(|port| port.host());
                    allowed.extend(numbers.map(|number| (*proto, number, number)));
                }
            }
        }
    }
    let otherwise = match mode {
        Mode::Enforce => Verdict::Deny,
        Mode::DryRun => Verdict::WouldDeny,
    };
    Verdicts { otherwise, ranges: merged(allowed) }
}

/// The ports with which the signature means an element.
fn ports(signature: &[(ElementId, Port)], element: ElementId) -> impl Iterator<Item = Port> {
    let from = signature.partition_point(|(other, _)| *other < element);
    signature[from..].iter().take_while(move |(other, _)| *other == element).map(|(_, port)| *port)
}

/// As few ranges as say the same.
fn merged(mut allowed: Vec<(Proto, u16, u16)>) -> Box<[PortRange]> {
    allowed.sort_unstable();
    let mut ranges: Vec<PortRange> = Vec::new();
    for (proto, first, last) in allowed {
        match ranges.last_mut() {
            Some(before) if before.proto == proto && u32::from(first) <= u32::from(before.last) + 1 => {
                before.last = before.last.max(last);
            }
            Some(_) | None => {
                let verdict = Verdict::Allow as u8;
                ranges.push(PortRange { first, last, proto, verdict, reserved: [0; 2] });
            }
        }
    }
    ranges.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_and_protocols_stay_apart() {
        let ranges = merged(vec![
            (Proto::TCP, 90, 100),
            (Proto::UDP, 80, 80),
            (Proto::TCP, 1, 80),
            (Proto::TCP, 50, 60),
            (Proto::TCP, 81, 85),
            (Proto::UDP, 65535, 65535),
            (Proto::UDP, 0, 65534),
        ]);
        let said: Vec<_> = ranges.iter().map(|it| (it.proto, it.first, it.last)).collect();
        assert_eq!(said, [(Proto::TCP, 1, 85), (Proto::TCP, 90, 100), (Proto::UDP, 0, 65535)]);
    }

    #[test]
    fn rule_48_rules_add_to_each_other() {
        let port = |number| Some(Box::from([Ports::Range(Proto::TCP, Port::new(number), Port::new(number))]));
        let rules = [
            Compiled { peers: Some(Box::new([1])), ports: port(80) },
            Compiled { peers: Some(Box::new([2, 3])), ports: port(90) },
            Compiled { peers: None, ports: port(100) },
            Compiled { peers: Some(Box::new([4])), ports: None },
        ];
        let said = |elements: &[ElementId]| {
            let signature: Vec<_> = elements.iter().map(|id| (*id, Port::ZERO)).collect();
            let Verdicts { otherwise, ranges } = compile(rules.iter(), &signature, Mode::Enforce);
            (otherwise == Verdict::Allow, ranges.iter().map(|it| it.first).collect::<Vec<_>>())
        };
        assert_eq!(said(&[]), (false, vec![100]));
        assert_eq!(said(&[1]), (false, vec![80, 100]));
        assert_eq!(said(&[1, 2, 3]), (false, vec![80, 90, 100]));
        assert_eq!(said(&[1, 4]), (true, vec![]));
        let dry = compile(rules[..1].iter(), &[], Mode::DryRun);
        assert_eq!(dry, Verdicts { otherwise: Verdict::WouldDeny, ranges: Box::default() });
    }
}
