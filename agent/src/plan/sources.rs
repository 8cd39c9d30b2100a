//! Who may use the load balancer's addresses (rule 22).

use std::collections::BTreeSet;

use ferroflow_common::abi::lb::{SourceRange, SourceRangeKey};
use ferroflow_common::addr::Addr;

use crate::model::{Exposure, Family, Prefix};

/// A row of `source_ranges`, but for the service's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub prefix: Prefix,
    pub verdict: SourceRange,
}

/// The rows of a Service, sorted. `node` are this node's addresses.
pub fn sources(exposure: &Exposure, node: &[Addr]) -> Vec<Source> {
    let ranges = &exposure.source_ranges;
    let mut allowed: BTreeSet<Prefix> = ranges.iter().copied().collect();
    // What this node sends to such an address may have that address for its own.
    for addr in &exposure.load_balancer_ips {
        let family = Family::of(addr);
        let mine = node.iter().filter(|it| Family::of(it) == family);
        if mine
            .into_iter()
            .any(|it| ranges.iter().any(|range| range.family() == family && range.contains(it)))
        {
            allowed.extend(Prefix::new(*addr, if family == Family::V4 { 32 } else { 128 }));
        }
    }
    // A short IPv6 range also contains the mapped IPv4 addresses, which it is not about.
    let every_v4 = Prefix::around(Addr::v4([0; 4]), 0);
    let mapped = every_v4.filter(|all| {
        !allowed.contains(all)
            && allowed.iter().any(|it| it.family() == Family::V6 && it.contains(&Addr::v4([0; 4])))
    });
    let allow = |prefix| Source { prefix, verdict: SourceRangeKey::ALLOW };
    let deny = |prefix| Source { prefix, verdict: SourceRangeKey::DENY };
    let mut sources: Vec<_> = allowed.into_iter().map(allow).chain(mapped.map(deny)).collect();
    sources.sort_unstable();
    sources
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    fn prefix(text: &str) -> Prefix {
        let (at, length) = text.split_once('/').unwrap();
        Prefix::new(addr(at), length.parse().unwrap()).unwrap()
    }

    fn said(ranges: &[&str], node: &[&str]) -> Vec<String> {
        let exposure = Exposure {
            load_balancer_ips: Box::new([addr("192.0.2.1"), addr("2001:db8::1")]),
            source_ranges: ranges.iter().map(|text| prefix(text)).collect(),
            ..Exposure::default()
        };
        let node: Vec<_> = node.iter().map(|text| addr(text)).collect();
        let sources = sources(&exposure, &node);
        let mut texts: Vec<_> = sources
            .iter()
            .map(|it| format!("{}{}", if it.verdict == 0 { "!" } else { "" }, it.prefix))
            .collect();
        texts.sort();
        texts
    }

    #[test]
    fn rule_22_the_nodes_own_address_in_a_range_lets_the_balancers_address_in() {
        assert_eq!(said(&["10.0.0.0/8"], &["192.168.1.1"]), ["10.0.0.0/8"]);
        assert_eq!(said(&["10.0.0.0/8"], &["10.1.1.1", "fd00::1"]), ["10.0.0.0/8", "192.0.2.1/32"]);
        assert_eq!(said(&["fd00::/8"], &["10.1.1.1", "fd00::1"]), ["2001:db8::1/128", "fd00::/8"]);
        assert_eq!(said(&[], &["10.1.1.1"]), [""; 0]);
    }

    #[test]
    fn rule_22_an_ipv6_range_is_not_about_ipv4_clients() {
        assert_eq!(said(&["::/0", "10.0.0.0/8"], &[]), ["!0.0.0.0/0", "10.0.0.0/8", "::/0"]);
        assert_eq!(said(&["::/0", "0.0.0.0/0"], &[]), ["0.0.0.0/0", "::/0"]);
        assert_eq!(said(&["fd00::/8", "10.0.0.0/8"], &[]), ["10.0.0.0/8", "fd00::/8"]);
    }
}
