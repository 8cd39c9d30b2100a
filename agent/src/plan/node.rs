//! What the programs know of this node: its addresses, and which of them serve NodePorts.

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::abi::node::{Masquerade, NodeAddress, ServiceRange, Settings};
use ferroflow_common::addr::Addr;

use super::masquerade::{self, Exits};
use super::relay::{self, RelayRows};
use super::routes::{self, Tunnels};
use super::{Config, MasqueradeScope};
use crate::model::{Family, KubeProxy, Prefix, World};

/// Which of the node's addresses serve NodePorts (rule 24).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The first of each family in the Node object.
    #[default]
    Primary,
    /// Every address that the host has.
    All,
    /// Those in these ranges; all of a family of which there is no range.
    Ranges(Box<[Prefix]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRows {
    pub addresses: BTreeMap<Addr, NodeAddress>,
    pub masquerade: Masquerade,
    pub settings: Settings,
    /// The ways to other nodes; `None`: as they are.
    pub tunnels: Option<Tunnels>,
    /// How pods leave the node.
    pub exits: Exits,
    /// `None`: as it is.
    pub relay: Option<RelayRows>,
    /// Ranges of cluster IPs for which there was no room.
    pub surplus: Vec<Prefix>,
}

/// An address that stands for this node and that the host does not have: one of the two has changed, and the other is to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Node {node}: {addr}, the first {} address of status.addresses, is on no interface of this host: NodePorts, and what comes \
     from other nodes, wait for one that both know (the kubelet says it again by itself, or by its --node-ip)",
    .family.name()
)]
pub struct Absent {
    node: Box<str>,
    addr: Addr,
    family: Family,
}

/// Of each family.
pub fn absent(world: &World) -> Vec<Absent> {
    let primary = |family| Some((family, world.own_node()?.primary(family)?));
    let absent = Family::ALL.into_iter().filter_map(primary);
    let absent = absent.filter(|(_, addr)| !world.local_addresses().contains_key(addr));
    absent.map(|(family, addr)| Absent { node: world.own_name().into(), addr, family }).collect()
}

/// Every address that the host has at present; the Node object alone says nothing of what is configured.
pub fn rows(world: &World, config: &Config) -> NodeRows {
    let served = &config.node_ports;
    let row = |addr: &Addr| {
        let flags = if serves(world, served, addr) { NodeAddress::NODE_PORTS } else { 0 };
        (*addr, NodeAddress { flags })
    };
    let own = |family| {
        let primary = world.own_node().and_then(|node| node.primary(family));
        primary.filter(|addr| world.local_addresses().contains_key(addr)).unwrap_or(Addr::UNSPECIFIED)
    };
    let (settings, surplus) = settings(world, config);
    NodeRows {
        addresses: world.local_addresses().keys().map(row).collect(),
        masquerade: Masquerade { v4: own(Family::V4), v6: own(Family::V6) },
        settings,
        exits: masquerade::exits(world, &config.world),
        relay: relay::rows(world, config),
        tunnels: routes::tunnels(world, config.routing, config.vni),
        surplus,
    }
}

/// What the programs are told, and the ranges that they have no room for.
fn settings(world: &World, config: &Config) -> (Settings, Vec<Prefix>) {
    let mut ranges: Vec<Prefix> =
        config.service_ranges.iter().copied().chain(world.service_ranges()).collect();
    ranges.sort_unstable_by_key(|it| (it.bits(), *it));
    let mut apart: Vec<Prefix> = Vec::new();
    for range in ranges {
        if !apart.iter().any(|it| it.family() == range.family() && it.contains(&range.addr())) {
            apart.push(range);
        }
    }
    let surplus = apart.split_off(apart.len().min(Settings::RANGES));
    let mut settings = Settings::NONE;
    for (row, range) in settings.ranges.iter_mut().zip(apart) {
        *row = ServiceRange::new(&range.addr(), range.bits());
    }
    settings.flags = match config.masquerade {
        MasqueradeScope::Outside => 0,
        MasqueradeScope::All => Settings::MASQUERADE_ALL,
    } | match world.kube_proxy() {
        KubeProxy::Absent => 0,
        KubeProxy::Present => Settings::MIGRATING,
    };
    (settings, surplus)
}

fn serves(world: &World, served: &NodePortAddresses, addr: &Addr) -> bool {
    let family = Family::of(addr);
    match served {
        NodePortAddresses::Primary => {
            world.own_node().and_then(|node| node.primary(family)).as_ref() == Some(addr)
        }
        NodePortAddresses::All => true,
        NodePortAddresses::Ranges(ranges) => {
            let mut same = ranges.iter().filter(|range| range.family() == family).peekable();
            same.peek().is_none() || same.any(|range| range.contains(addr))
        }
    }
}

/// The interfaces that carry the node's addresses of the Node object: where traffic from outside arrives.
pub fn devices(world: &World) -> BTreeSet<u32> {
    let addresses = world.own_node().into_iter().flat_map(|node| &node.addresses);
    addresses.filter_map(|addr| world.local_addresses().get(addr).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, Node};

    const PRIMARY: Addr = Addr::v4([192, 168, 5, 1]);
    const SECOND: Addr = Addr::v4([10, 9, 0, 1]);

    fn world() -> World {
        let mut world = World::new("here");
        let node = Node { addresses: Box::new([PRIMARY, SECOND]), ..Node::default() };
        world.apply(Change::Node("here".into(), Some(node)));
        world.apply(Change::LocalAddress(PRIMARY, Some(3)));
        world.apply(Change::LocalAddress(SECOND, Some(4)));
        world
    }

    fn served(world: &World, which: &NodePortAddresses) -> Vec<Addr> {
        let rows = rows(world, &Config { node_ports: which.clone(), ..Config::default() });
        rows.addresses.into_iter().filter(|(_, row)| row.flags != 0).map(|(addr, _)| addr).collect()
    }

    #[test]
    fn rule_24_node_ports_are_on_the_primary_addresses_by_default() {
        let world = world();
        let range = |text: [u8; 4], bits| Prefix::new(Addr::v4(text), bits).unwrap();
        assert_eq!(served(&world, &NodePortAddresses::default()), [PRIMARY]);
        assert_eq!(served(&world, &NodePortAddresses::All), [SECOND, PRIMARY]);
        let ranges = NodePortAddresses::Ranges(Box::new([range([10, 0, 0, 0], 8)]));
        assert_eq!(served(&world, &ranges), [SECOND]);
        let six = Prefix::new(Addr::v6([0xfd; 16]), 128).unwrap();
        let of_the_other_family = NodePortAddresses::Ranges(Box::new([six]));
        assert_eq!(served(&world, &of_the_other_family), [SECOND, PRIMARY]);
    }

    #[test]
    fn rule_25_addresses_come_and_go() {
        let mut world = world();
        assert_eq!(devices(&world), BTreeSet::from([3, 4]));
        assert_eq!(rows(&world, &Config::default()).masquerade.v4, PRIMARY);
        world.apply(Change::LocalAddress(PRIMARY, None));
        assert_eq!(devices(&world), BTreeSet::from([4]));
        let gone = rows(&world, &Config::default());
        assert_eq!((gone.addresses.len(), gone.masquerade.v4), (1, Addr::UNSPECIFIED));
    }

    #[test]
    fn rule_25_an_address_that_the_host_does_not_have_is_said() {
        let mut world = world();
        assert_eq!(absent(&world), []);
        world.apply(Change::LocalAddress(SECOND, None));
        assert_eq!(absent(&world), [], "clouds have more addresses for a node than the node has");
        world.apply(Change::LocalAddress(PRIMARY, None));
        let said = absent(&world).pop().unwrap().to_string();
        assert!(said.starts_with("Node here: 192.168.5.1, the first IPv4 address"), "{said}");
        world.apply(Change::Node("here".into(), None));
        assert_eq!(absent(&world), []);
    }

    #[test]
    fn rule_19_ranges_of_objects_and_of_the_flag_are_told_to_the_programs() {
        let range = |text: [u8; 4], bits| Prefix::new(Addr::v4(text), bits).unwrap();
        let mut world = world();
        let config = Config { service_ranges: Box::new([range([10, 96, 0, 0], 16)]), ..Config::default() };
        let is = |world: &World, addr| rows(world, &config).settings.is_service_address(&Addr::v4(addr));
        assert!(is(&world, [10, 96, 1, 1]) && !is(&world, [10, 97, 1, 1]));
        let more: Box<[Prefix]> = Box::new([range([10, 97, 0, 0], 24), range([10, 96, 7, 0], 24)]);
        world.apply(Change::ServiceCidr("more".into(), Some(more)));
        assert!(is(&world, [10, 96, 1, 1]) && is(&world, [10, 97, 0, 1]) && !is(&world, [10, 97, 1, 1]));
        let used = rows(&world, &config).settings.ranges.iter().filter(|it| it.used == 1).count();
        assert_eq!(used, 2, "what is in another takes no room");
        let many: Box<[Prefix]> = (0..9).map(|n| range([10, 200, n, 0], 24)).collect();
        world.apply(Change::ServiceCidr("many".into(), Some(many)));
        assert_eq!(rows(&world, &config).surplus.len(), 3, "11 of 8");
        assert!(is(&world, [10, 97, 0, 1]), "the shortest stay");
        world.apply(Change::ServiceCidr("many".into(), None));
        world.apply(Change::ServiceCidr("more".into(), None));
        assert!(!is(&world, [10, 97, 0, 1]) && rows(&world, &config).surplus.is_empty());
    }

    #[test]
    fn flags_and_kube_proxy_are_told_to_the_programs() {
        let mut world = world();
        let flags = |world: &World, masquerade| {
            rows(world, &Config { masquerade, ..Config::default() }).settings.flags
        };
        assert_eq!(flags(&world, MasqueradeScope::Outside), 0);
        assert_eq!(flags(&world, MasqueradeScope::All), Settings::MASQUERADE_ALL, "rule 26 e");
        world.apply(Change::KubeProxy(KubeProxy::Present));
        assert_eq!(flags(&world, MasqueradeScope::Outside), Settings::MIGRATING);
    }
}
