//! How pods reach the world: by which address they leave the node, and where they keep their own.

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::abi::node::Masquerade;
use ferroflow_common::addr::Addr;

use super::node;
use crate::model::{Family, Prefix, World as Model};

/// Whether the world knows the way back to pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum World {
    /// It does, or somebody else sees to it.
    Known,
    /// It does not, but for these ranges and the cluster's own.
    Unknown { kept: Box<[Prefix]> },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// What pods leave by, by interface.
    pub addresses: BTreeMap<u32, Masquerade>,
    /// Where they keep their own addresses.
    pub kept: BTreeSet<Prefix>,
}

/// Pods keep their addresses to each other and to the nodes, all of which know where each node's pods are; and where
/// nobody could answer the node either, to groups and to a link's own addresses.
pub fn exits(model: &Model, world: &World) -> Exits {
    let World::Unknown { kept } = world else { return Exits::default() };
    let of_node = |(_, node): (&str, &crate::model::Node)| {
        let addresses = node.addresses.iter().filter_map(|addr| Prefix::mapped(*addr, 128));
        addresses.chain(node.pod_cidrs.iter().copied()).collect::<Vec<_>>()
    };
    let inside = model.nodes().flat_map(of_node).chain(kept.iter().copied());
    let addresses = devices(model, world).into_iter().map(|device| (device, addresses(model, device)));
    Exits { addresses: addresses.collect(), kept: inside.chain(nowhere()).collect() }
}

/// The interfaces that pods' packets leave the node by: its devices, and wherever its default routes lead.
pub fn devices(model: &Model, world: &World) -> BTreeSet<u32> {
    match world {
        World::Known => BTreeSet::new(),
        World::Unknown { .. } => node::devices(model).union(model.uplinks()).copied().collect(),
    }
}

/// Multicast, the broadcast address, and the link-local addresses of IPv6 (RFC 5771, RFC 919, RFC 4291 sections 2.5.6 and
/// 2.7). Those of IPv4 are masqueraded: clouds answer the nodes at 169.254.169.254.
fn nowhere() -> impl Iterator<Item = Prefix> {
    let six = |first: [u8; 2]| {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&first);
        Addr::v6(bytes)
    };
    let ranges = [
        (Addr::v4([224, 0, 0, 0]), 4),
        (Addr::v4([255; 4]), 32),
        (six([0xff, 0]), 8),
        (six([0xfe, 0x80]), 10),
    ];
    ranges.into_iter().filter_map(|(addr, length)| Prefix::new(addr, length))
}

/// What stands in for pods on this device.
fn addresses(model: &Model, device: u32) -> Masquerade {
    let of = |family| address(model, device, family).unwrap_or(Addr::UNSPECIFIED);
    Masquerade { v4: of(Family::V4), v6: of(Family::V6) }
}

/// The Node object's first address that is on the device, or else any that is; where the device has none of the family,
/// the node's own, for answers to it come by another device.
fn address(model: &Model, device: u32, family: Family) -> Option<Addr> {
    let here = model.local_addresses();
    let own = || model.own_node().into_iter().flat_map(|node| node.addresses.iter().copied());
    let is = |addr: &Addr| Family::of(addr) == family;
    let mut on_device = own().filter(|addr| is(addr) && here.get(addr) == Some(&device));
    let any = || here.iter().find(|(addr, at)| is(addr) && **at == device).map(|(addr, _)| *addr);
    on_device.next().or_else(any).or_else(|| own().find(|addr| is(addr) && here.contains_key(addr)))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::{Change, Node};

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn prefix(text: &str) -> Prefix {
        let (addr, bits) = text.split_once('/').unwrap();
        Prefix::new(self::addr(addr), bits.parse().unwrap()).unwrap()
    }

    /// This node has 192.168.50.1 and fd50::1 on interface 3; both nodes have pods.
    fn model() -> Model {
        let mut model = Model::new("a");
        for (name, number) in [("a", 1), ("b", 2)] {
            let node = Node {
                addresses: Box::new([
                    addr(&format!("192.168.50.{number}")),
                    addr(&format!("fd50::{number}")),
                ]),
                pod_cidrs: Box::new([prefix(&format!("10.244.{number}.0/24"))]),
                ..Node::default()
            };
            model.apply(Change::Node(name.into(), Some(node)));
        }
        for own in ["192.168.50.1", "fd50::1"] {
            model.apply(Change::LocalAddress(addr(own), Some(3)));
        }
        model
    }

    fn unknown(kept: &[Prefix]) -> World {
        World::Unknown { kept: kept.into() }
    }

    #[test]
    fn pods_keep_their_addresses_inside_the_cluster_and_where_it_is_said() {
        let exits = exits(&model(), &unknown(&[prefix("10.0.0.0/8")]));
        let keeps = |to: &str| {
            let to = addr(to);
            exits.kept.iter().any(|range| range.family() == Family::of(&to) && range.contains(&to))
        };
        for inside in
            ["10.244.1.9", "10.244.2.9", "192.168.50.2", "fd50::2", "10.9.9.9", "224.0.0.1", "fe80::1"]
        {
            assert!(keeps(inside), "{inside}");
        }
        for world in ["192.168.50.9", "8.8.8.8", "fd50::9", "2001:db8::1", "169.254.169.254", "172.16.0.1"] {
            assert!(!keeps(world), "{world}");
        }
    }

    #[test]
    fn where_the_world_is_known_nothing_is_said() {
        assert_eq!(exits(&model(), &World::Known), Exits::default());
    }

    #[test]
    fn pods_leave_by_the_address_of_the_device_as_long_as_it_has_one() {
        let mut model = model();
        let leave = |model: &Model| exits(model, &unknown(&[])).addresses;
        let by = |v4: &str, v6: &str| Masquerade { v4: addr(v4), v6: addr(v6) };
        assert_eq!(leave(&model), BTreeMap::from([(3, by("192.168.50.1", "fd50::1"))]));
        // The Node object's, though another one is smaller.
        model.apply(Change::LocalAddress(addr("10.0.0.1"), Some(3)));
        assert_eq!(leave(&model), BTreeMap::from([(3, by("192.168.50.1", "fd50::1"))]));
        // A device of its own for IPv6: what leaves by it over IPv4 has the other's address.
        model.apply(Change::LocalAddress(addr("fd50::1"), Some(4)));
        let two = BTreeMap::from([(3, by("192.168.50.1", "fd50::1")), (4, by("192.168.50.1", "fd50::1"))]);
        assert_eq!(leave(&model), two);
        model.apply(Change::LocalAddress(addr("10.7.0.1"), Some(4)));
        assert_eq!(leave(&model)[&4], by("10.7.0.1", "fd50::1"), "its own, where it has one");
        // The default route leads out of another one.
        model.apply(Change::Uplink { ifindex: 5, leads: true });
        model.apply(Change::LocalAddress(addr("10.0.2.15"), Some(5)));
        assert_eq!(leave(&model)[&5], by("10.0.2.15", "fd50::1"));
        model.apply(Change::Uplink { ifindex: 5, leads: false });
        for gone in ["192.168.50.1", "fd50::1"] {
            model.apply(Change::LocalAddress(addr(gone), None));
        }
        assert_eq!(leave(&model), BTreeMap::new());
    }
}
