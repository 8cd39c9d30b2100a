//! `ferroflow policy`: which policies apply to the pods of this node, and what they say of a flow. The answer is found
//! in the pinned maps by the function that the programs run.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use ferroflow_common::abi::policy::{
    Class, EndpointPolicy, Meaning, PolicyKey, PortRange, RangeKey, Rules, Verdict, WORLD,
};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_ebpf::policy::{Policies, Wanted, allowed, class_of};
use serde::Serialize;

use super::table::table;
use super::{Answer, CliError};
use crate::config::Query;
use crate::maps::kernel::KernelMaps;
use crate::maps::{
    Endpoints, Ipcache, IpcacheRanges, MapError, Maps as _, PeerClasses, Policy, PolicySets, PortRanges,
};

/// Which flow is asked about.
#[derive(Args, Debug)]
pub struct Question {
    /// The address of a pod of this node
    pod: IpAddr,
    /// The other end and the receiver's port: 10.0.0.1:80, 10.0.0.1:53/UDP, [fd00::1]:80/TCP
    peer: PeerPort,
    /// Seen from the pod; both, where it is not said
    #[arg(long)]
    direction: Option<Direction>,
    #[command(flatten)]
    pub(super) query: Query,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Ingress,
    Egress,
}

/// `10.0.0.1:80/UDP`; TCP where no protocol is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PeerPort {
    addr: SocketAddr,
    proto: Proto,
}

impl FromStr for PeerPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (addr, proto) = text.split_once('/').unwrap_or((text, "TCP"));
        let proto = [Proto::TCP, Proto::UDP, Proto::SCTP]
            .into_iter()
            .find(|it| it.name().is_some_and(|name| name.eq_ignore_ascii_case(proto)))
            .ok_or_else(|| format!("`{proto}` is not TCP, UDP or SCTP"))?;
        let addr = addr.parse().map_err(|error| format!("`{addr}`: {error}: write ADDRESS:PORT"))?;
        Ok(Self { addr, proto })
    }
}

/// The maps, read once.
struct View {
    endpoints: HashMap<Addr, EndpointPolicy>,
    classes: HashMap<Addr, Class>,
    ranges: Vec<(RangeKey, Class)>,
    rules: BTreeMap<PolicyKey, Rules>,
    port_ranges: Vec<PortRange>,
    sets: BTreeMap<u32, Meaning>,
    meanings: HashMap<Class, Meaning>,
}

impl View {
    fn read(maps: &KernelMaps) -> Result<Self, MapError> {
        let rows = 0..maps.len::<PortRanges>();
        let endpoints = maps.dump::<Endpoints>()?.into_iter().map(|(addr, row)| (addr, row.policy));
        let mut ranges = maps.dump::<IpcacheRanges>()?;
        ranges.sort_unstable_by_key(|(key, _)| std::cmp::Reverse(key.bits));
        Ok(Self {
            endpoints: endpoints.collect(),
            classes: maps.dump::<Ipcache>()?.into_iter().collect(),
            ranges,
            rules: maps.dump::<Policy>()?.into_iter().collect(),
            port_ranges: rows.map(|row| maps.read::<PortRanges>(row)).collect::<Result<_, _>>()?,
            sets: maps.dump::<PolicySets>()?.into_iter().collect(),
            meanings: maps.dump::<PeerClasses>()?.into_iter().collect(),
        })
    }

    fn set_text(&self, set: u32) -> String {
        match set {
            EndpointPolicy::OPEN => "not isolated".into(),
            EndpointPolicy::CLOSED => "closed: its policies have no room, or are not in the maps yet".into(),
            set => self.sets.get(&set).map_or_else(|| format!("#{set}"), |it| it.as_str().to_owned()),
        }
    }

    fn class_text(&self, class: Class) -> String {
        match class {
            WORLD => "nothing that these policies mention".into(),
            class => {
                self.meanings.get(&class).map_or_else(|| format!("#{class}"), |it| it.as_str().to_owned())
            }
        }
    }
}

impl Policies for View {
    fn class(&self, addr: &Addr) -> Option<Class> {
        self.classes.get(addr).copied()
    }

    fn range_class(&self, addr: &Addr) -> Option<Class> {
        let bits = |addr: &Addr| u128::from_be_bytes(addr.bytes);
        let has = |key: &RangeKey| (bits(&key.addr) ^ bits(addr)).leading_zeros() >= key.bits;
        self.ranges.iter().find(|(key, _)| has(key)).map(|(_, class)| *class)
    }

    fn rules(&self, key: &PolicyKey) -> Option<Rules> {
        self.rules.get(key).copied()
    }

    fn port_range(&self, row: u32) -> Option<PortRange> {
        self.port_ranges.get(usize::try_from(row).ok()?).copied()
    }
}

#[derive(Serialize)]
struct SetRow {
    set: u32,
    policies: String,
    pods: Vec<IpAddr>,
    /// How many classes of peers it says something of, the others counted as one.
    classes: usize,
}

pub(super) fn list(maps: &KernelMaps) -> Result<Answer, CliError> {
    let view = View::read(maps)?;
    let rows = view.sets.keys().map(|set| {
        let has = |policy: &EndpointPolicy| policy.ingress == *set || policy.egress == *set;
        let pods = view.endpoints.iter().filter(|(_, policy)| has(policy)).map(|(addr, _)| addr.ip());
        let mut pods: Vec<_> = pods.collect();
        pods.sort_unstable();
        let classes = view.rules.keys().filter(|key| key.set == *set).count();
        SetRow { set: *set, policies: view.set_text(*set), pods, classes }
    });
    let rows: Vec<_> = rows.collect();
    let lines = rows.iter().map(|row| {
        let pods: Vec<_> = row.pods.iter().map(IpAddr::to_string).collect();
        [row.set.to_string(), row.policies.clone(), row.classes.to_string(), pods.join(" ")]
    });
    let table = table(["SET", "POLICIES", "CLASSES", "PODS"], lines);
    Ok(Answer { table, json: serde_json::to_value(&rows)? })
}

#[derive(Serialize)]
struct Finding {
    direction: Direction,
    verdict: &'static str,
    policies: String,
    peer: String,
}

pub(super) fn explain(maps: &KernelMaps, question: &Question) -> Result<Answer, CliError> {
    let view = View::read(maps)?;
    let Some(policy) = view.endpoints.get(&Addr::from(question.pod)) else {
        return Err(CliError::NoPod { addr: question.pod });
    };
    let both = [(Direction::Ingress, policy.ingress), (Direction::Egress, policy.egress)];
    let asked = both.into_iter().filter(|(it, _)| question.direction.is_none_or(|asked| asked == *it));
    let findings: Vec<_> =
        asked.map(|(direction, set)| finding(&view, direction, set, question.peer)).collect();
    let lines = findings.iter().map(|it| {
        let direction = match it.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        [direction.to_owned(), it.verdict.to_owned(), it.policies.clone(), it.peer.clone()]
    });
    let table = table(["DIRECTION", "VERDICT", "POLICIES", "PEER"], lines);
    Ok(Answer { table, json: serde_json::to_value(&findings)? })
}

fn finding(view: &View, direction: Direction, set: u32, peer: PeerPort) -> Finding {
    let class = class_of(view, &Addr::from(peer.addr.ip()));
    let wanted = Wanted { proto: peer.proto, port: Port::new(peer.addr.port()) };
    let verdict = match allowed(view, set, class, wanted) {
        Verdict::Allow => "allowed",
        Verdict::Deny => "denied",
        Verdict::WouldDeny => "allowed; denied but for dry run",
    };
    Finding { direction, verdict, policies: view.set_text(set), peer: view.class_text(class) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_an_address_a_port_and_maybe_a_protocol() {
        let parsed = |text: &str| text.parse::<PeerPort>().map(|it| (it.addr.to_string(), it.proto));
        assert_eq!(parsed("10.0.0.1:80"), Ok(("10.0.0.1:80".into(), Proto::TCP)));
        assert_eq!(parsed("[fd00::1]:53/udp"), Ok(("[fd00::1]:53".into(), Proto::UDP)));
        assert_eq!(parsed("10.0.0.1:80/ICMP"), Err("`ICMP` is not TCP, UDP or SCTP".into()));
        let error = parsed("10.0.0.1").unwrap_err();
        assert!(error.ends_with("write ADDRESS:PORT"), "{error}");
    }

    #[test]
    fn a_finding_says_verdict_policies_and_peer() {
        let addr = Addr::v4([10, 0, 0, 1]);
        let port = PortRange { first: 80, last: 81, proto: Proto::TCP, verdict: 1, reserved: [0; 2] };
        let row = |length| Rules { offset: 0, length, otherwise: Verdict::Deny as u32 };
        let key = |class| PolicyKey { set: 5, class };
        let view = View {
            endpoints: HashMap::new(),
            classes: [(addr, 7)].into(),
            ranges: vec![(RangeKey { bits: 96 + 8, addr: Addr::v4([10, 0, 0, 0]) }, 8)],
            rules: [(key(7), row(1)), (key(PolicyKey::OTHERS), row(0))].into(),
            port_ranges: vec![port],
            sets: [(5, Meaning::new([0; 16], "ingress shop/web"))].into(),
            meanings: [(7, Meaning::new([0; 16], "pods app=client in shop"))].into(),
        };
        for (set, peer, verdict, policies, class) in [
            (5, "10.0.0.1:80", "allowed", "ingress shop/web", "pods app=client in shop"),
            (5, "10.0.0.1:82", "denied", "ingress shop/web", "pods app=client in shop"),
            (5, "10.0.0.2:80", "denied", "ingress shop/web", "#8"),
            (5, "11.0.0.2:80", "denied", "ingress shop/web", "nothing that these policies mention"),
            (0, "11.0.0.2:80", "allowed", "not isolated", "nothing that these policies mention"),
        ] {
            let found = finding(&view, Direction::Ingress, set, peer.parse().unwrap());
            assert_eq!((found.verdict, &*found.policies, &*found.peer), (verdict, policies, class), "{peer}");
        }
    }
}
