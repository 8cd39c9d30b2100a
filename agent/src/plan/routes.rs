//! The routes of this node to the pods of others, and what becomes of packets to addresses that no pod has.
//!
//! A pod's own route (/32, /128) is longer than that of its node's range, so the range of this node itself leads
//! nowhere: what is for a pod that is gone does not go out by the default route, come back and go round.

use std::collections::BTreeMap;

use ferroflow_common::abi::tunnel::Tunnel;
use ferroflow_common::addr::Addr;

use crate::model::{Family, Node, Prefix, Routes, Way, World};

/// Who carries packets between nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Routing {
    /// Somebody else: the agent makes no route
    #[default]
    None,
    /// The network between the nodes: one route by each node that is on a link of this one; those that are not are the
    /// network's to route
    Native,
    /// The agents: packets are carried in UDP (VXLAN) from node to node, whatever the network between them knows
    Vxlan,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannedRoutes {
    pub routes: Routes,
    /// The addresses of the nodes that packets to them go to.
    pub ends: BTreeMap<Prefix, Addr>,
    /// Ranges without a route.
    pub problems: Vec<RouteProblem>,
}

/// Why a range of a Node object has no route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteProblem {
    #[error("Node {node}: {cidr} of spec.podCIDRs has no route: status.addresses has none of {}", .family.name())]
    NoAddress { node: Box<str>, cidr: Prefix, family: Family },
    #[error(
        "Node {node}: {cidr} of spec.podCIDRs has no route: its status.addresses have no family in common with this \
         node's"
    )]
    NoFamily { node: Box<str>, cidr: Prefix },
    #[error(
        "Node {node}: {cidr} of spec.podCIDRs has no route: {gateway} is on no link of this node; the network between \
         them must route the range"
    )]
    OffLink { node: Box<str>, cidr: Prefix, gateway: Addr },
    #[error(
        "Node {node}: {cidr} of spec.podCIDRs has no route: it is Node {other}'s; give each node a range of its own"
    )]
    Taken { node: Box<str>, cidr: Prefix, other: Box<str> },
    #[error(
        "Node {node}: {cidr} of spec.podCIDRs has no route: it contains {addr}, which packets go by; give the node a \
         range of pods alone"
    )]
    ContainsNode { node: Box<str>, cidr: Prefix, addr: Addr },
}

/// The routes as they are to be, all of them.
pub fn routes(world: &World, routing: Routing) -> PlannedRoutes {
    let mut planned = PlannedRoutes::default();
    if routing == Routing::None {
        return planned;
    }
    for cidr in own_ranges(world) {
        planned.routes.insert(cidr, Way::Unreachable);
    }
    for (name, node) in world.nodes().filter(|(name, _)| *name != world.own_name()) {
        for &cidr in &node.pod_cidrs {
            let usable = usable(world, (name, node), cidr, &planned.routes);
            let way = usable.and_then(|()| match routing {
                Routing::None | Routing::Native => native(world, (name, node), cidr),
                Routing::Vxlan => carried(world, (name, node), cidr),
            });
            match way {
                Ok((way, end)) => {
                    planned.routes.insert(cidr, way);
                    planned.ends.insert(cidr, end);
                }
                Err(problem) => planned.problems.push(problem),
            }
        }
    }
    planned
}

/// What the programs are told of the ways to other nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tunnels {
    /// To the pods of all nodes that there are routes to, by the ranges.
    pub pods: BTreeMap<Prefix, Tunnel>,
    /// To the other nodes themselves, where the network between them knows no pods.
    pub nodes: BTreeMap<Addr, Tunnel>,
}

/// `None` as long as the tunnel that there is to be is not there: then the tables stay as they are, which is empty at first,
/// and then packets go by the kernel's routes.
pub fn tunnels(world: &World, routing: Routing, vni: u32) -> Option<Tunnels> {
    let (device, room) = match routing {
        Routing::None | Routing::Native => (0, 0),
        Routing::Vxlan => world.tunnel().map(|link| (link.ifindex, link.mtu))?,
    };
    let to = |node| Tunnel { node, vni, device, room };
    let ends = routes(world, routing).ends.into_iter();
    let mut ways =
        Tunnels { pods: ends.map(|(cidr, node)| (cidr, to(node))).collect(), ..Tunnels::default() };
    if device == 0 {
        return Some(ways);
    }
    for (_, node) in world.nodes().filter(|(name, _)| *name != world.own_name()) {
        let Some(end) = end(world, node) else { continue };
        let primary = Family::ALL.into_iter().filter_map(|family| node.primary(family));
        ways.nodes.extend(primary.map(|addr| (addr, to(end))));
    }
    Some(ways)
}

/// How many bytes of a packet the tunnel takes: Ethernet, VXLAN, UDP and IP (RFC 7348 section 5).
pub fn overhead(world: &World) -> u32 {
    match world.own_node().and_then(|node| node.primary(Family::V4)) {
        Some(_) => 50,
        None => 70,
    }
}

/// But for those that are no ranges of pods: they would cut the host off.
fn own_ranges(world: &World) -> impl Iterator<Item = Prefix> {
    world.own_node().into_iter().flat_map(|node| {
        let of_pods = |cidr: &Prefix| !node.addresses.iter().any(|addr| cidr.contains(addr));
        node.pod_cidrs.iter().copied().filter(of_pods)
    })
}

/// Whether a range may have a route at all.
fn usable(
    world: &World,
    (name, node): (&str, &Node),
    cidr: Prefix,
    routes: &Routes,
) -> Result<(), RouteProblem> {
    let inside = |addr: &&Addr| cidr.contains(addr);
    if let Some(&addr) = world.local_addresses().keys().chain(&node.addresses).find(inside) {
        return Err(RouteProblem::ContainsNode { node: name.into(), cidr, addr });
    }
    if own_ranges(world).any(|own| own.contains(&cidr.addr()) && own.bits() <= cidr.bits()) {
        let other = world.own_name().into();
        return Err(RouteProblem::Taken { node: name.into(), cidr, other });
    }
    if routes.contains_key(&cidr) {
        let other = world.nodes().find(|(_, node)| node.pod_cidrs.contains(&cidr));
        let other = other.map_or(name, |(other, _)| other).into();
        return Err(RouteProblem::Taken { node: name.into(), cidr, other });
    }
    Ok(())
}

fn native(world: &World, (name, node): (&str, &Node), cidr: Prefix) -> Result<(Way, Addr), RouteProblem> {
    let family = cidr.family();
    let Some(gateway) = node.primary(family) else {
        return Err(RouteProblem::NoAddress { node: name.into(), cidr, family });
    };
    match link(world, &gateway) {
        Some(ifindex) => Ok((Way::Via { gateway, ifindex }, gateway)),
        None => Err(RouteProblem::OffLink { node: name.into(), cidr, gateway }),
    }
}

/// With the node's address; IPv4 where both have it.
fn carried(world: &World, (name, node): (&str, &Node), cidr: Prefix) -> Result<(Way, Addr), RouteProblem> {
    let end = end(world, node).ok_or_else(|| RouteProblem::NoFamily { node: name.into(), cidr })?;
    Ok((Way::Tunnel { source: own(world, cidr.family()) }, end))
}

/// The address by which packets are carried to a node; `None` where this one has none of the families that it has.
pub fn end(world: &World, node: &Node) -> Option<Addr> {
    Family::ALL.into_iter().find_map(|family| own(world, family).and(node.primary(family)))
}

/// This node's address of a family, where it has it.
fn own(world: &World, family: Family) -> Option<Addr> {
    let primary = world.own_node().and_then(|node| node.primary(family));
    primary.filter(|addr| world.local_addresses().contains_key(addr))
}

/// The interface of the smallest subnet that has the address.
fn link(world: &World, addr: &Addr) -> Option<u32> {
    let subnets = world.local_subnets().iter();
    let having = subnets.filter(|(subnet, _)| subnet.family() == Family::of(addr) && subnet.contains(addr));
    having.max_by_key(|(subnet, _)| subnet.bits()).map(|(_, ifindex)| *ifindex)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::{Change, TunnelLink};

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn prefix(text: &str) -> Prefix {
        let (addr, bits) = text.split_once('/').unwrap();
        Prefix::new(self::addr(addr), bits.parse().unwrap()).unwrap()
    }

    fn set(world: &mut World, name: &str, addresses: &[&str], cidrs: &[&str]) {
        let node = Node {
            addresses: addresses.iter().map(|text| addr(text)).collect(),
            pod_cidrs: cidrs.iter().map(|text| prefix(text)).collect(),
            ..Node::default()
        };
        world.apply(Change::Node(name.into(), Some(node)));
    }

    /// Nodes a (this one), b and c on 192.168.50.0/24 and fd50::/64 at interface 3.
    fn world() -> World {
        let mut world = World::new("a");
        for (name, number) in [("a", 1), ("b", 2), ("c", 3)] {
            let addresses = [format!("192.168.50.{number}"), format!("fd50::{number}")];
            let cidrs = [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")];
            set(&mut world, name, &addresses.each_ref().map(|it| &**it), &cidrs.each_ref().map(|it| &**it));
        }
        for own in ["192.168.50.1", "fd50::1"] {
            world.apply(Change::LocalAddress(addr(own), Some(3)));
        }
        for subnet in ["192.168.50.0/24", "fd50::/64"] {
            world.apply(Change::LocalSubnet(prefix(subnet), Some(3)));
        }
        world
    }

    fn native(world: &World) -> PlannedRoutes {
        routes(world, Routing::Native)
    }

    fn via(gateway: &str) -> Way {
        Way::Via { gateway: addr(gateway), ifindex: 3 }
    }

    #[test]
    fn native_routes_lead_to_every_other_node_and_the_own_range_nowhere() {
        let PlannedRoutes { routes, ends: _, problems } = native(&world());
        let expected = Routes::from([
            (prefix("10.244.1.0/24"), Way::Unreachable),
            (prefix("10.244.2.0/24"), via("192.168.50.2")),
            (prefix("10.244.3.0/24"), via("192.168.50.3")),
            (prefix("fd00:10:244:1::/64"), Way::Unreachable),
            (prefix("fd00:10:244:2::/64"), via("fd50::2")),
            (prefix("fd00:10:244:3::/64"), via("fd50::3")),
        ]);
        assert_eq!((routes, problems), (expected, Vec::new()));
        assert_eq!(super::routes(&world(), Routing::None), PlannedRoutes::default());
    }

    #[test]
    fn tunnels_lead_to_every_other_node_over_ipv4_where_they_can() {
        let vxlan = |world: &World| routes(world, Routing::Vxlan);
        let mut world = world();
        let planned = vxlan(&world);
        assert_eq!(planned.problems, []);
        let own = |text| Way::Tunnel { source: Some(addr(text)) };
        assert_eq!(planned.routes.get(&prefix("10.244.2.0/24")), Some(&own("192.168.50.1")));
        assert_eq!(planned.routes.get(&prefix("fd00:10:244:2::/64")), Some(&own("fd50::1")));
        assert_eq!(planned.routes.get(&prefix("10.244.1.0/24")), Some(&Way::Unreachable));
        assert_eq!(tunnels(&world, Routing::Vxlan, 7), None, "as they are");
        world.apply(Change::Tunnel(Some(TunnelLink { ifindex: 9, mtu: 1450 })));
        let rows = tunnels(&world, Routing::Vxlan, 7).unwrap().pods;
        let there = Tunnel { node: addr("192.168.50.2"), vni: 7, device: 9, room: 1450 };
        assert_eq!(rows.get(&prefix("fd00:10:244:2::/64")), Some(&there));
        let native = tunnels(&world, Routing::Native, 7).unwrap();
        assert_eq!((rows.len(), native.pods.len(), overhead(&world)), (4, 4, 50));
        assert!(native.nodes.is_empty() && native.pods.values().all(|it| it.device == 0));
        // Not on a link of this node, and of one family alone.
        set(&mut world, "b", &["fd99::2"], &["10.244.2.0/24"]);
        let planned = vxlan(&world);
        assert_eq!(planned.ends.get(&prefix("10.244.2.0/24")), Some(&addr("fd99::2")));
        set(&mut world, "a", &["192.168.50.1"], &["10.244.1.0/24"]);
        let planned = vxlan(&world);
        let said = planned.problems.first().unwrap().to_string();
        assert!(said.contains("no family in common") && planned.problems.len() == 1, "{said}");
        set(&mut world, "a", &["fd50::1"], &["10.244.1.0/24"]);
        let planned = vxlan(&world);
        assert_eq!(planned.routes.get(&prefix("10.244.2.0/24")), Some(&Way::Tunnel { source: None }));
        assert_eq!(overhead(&world), 70);
    }

    #[test]
    fn other_nodes_themselves_are_reached_by_the_tunnel() {
        let mut world = world();
        world.apply(Change::Tunnel(Some(TunnelLink { ifindex: 9, mtu: 1450 })));
        let nodes = |world: &World| tunnels(world, Routing::Vxlan, 7).unwrap().nodes;
        let way = |node| Tunnel { node: addr(node), vni: 7, device: 9, room: 1450 };
        let (b, c) = (way("192.168.50.2"), way("192.168.50.3"));
        let all = [("192.168.50.2", b), ("fd50::2", b), ("192.168.50.3", c), ("fd50::3", c)];
        assert_eq!(nodes(&world), all.map(|(node, way)| (addr(node), way)).into());
        // Without a family in common there is no way.
        set(&mut world, "a", &["192.168.50.1"], &["10.244.1.0/24"]);
        set(&mut world, "b", &["fd50::2"], &["10.244.2.0/24"]);
        assert!(!nodes(&world).contains_key(&addr("fd50::2")));
    }

    #[test]
    fn nodes_come_go_and_change() {
        let mut world = world();
        let seen = world.topology();
        set(&mut world, "b", &["192.168.50.9", "fd50::9"], &["10.244.7.0/24"]);
        assert_ne!(world.topology(), seen);
        let moved = native(&world);
        assert_eq!(moved.routes.get(&prefix("10.244.7.0/24")), Some(&via("192.168.50.9")));
        assert!(!moved.routes.contains_key(&prefix("10.244.2.0/24")));
        let seen = world.topology();
        world.apply(Change::Node("b".into(), None));
        assert_ne!(world.topology(), seen);
        assert_eq!(native(&world).routes.len(), 4);
        let seen = world.topology();
        world.apply(Change::Node("b".into(), None));
        world.apply(Change::LocalSubnet(prefix("fd50::/64"), Some(3)));
        assert_eq!(world.topology(), seen, "nothing has changed");
    }

    #[test]
    fn the_smallest_subnet_has_the_neighbour() {
        let mut world = world();
        world.apply(Change::LocalSubnet(prefix("192.168.50.0/29"), Some(4)));
        world.apply(Change::LocalSubnet(prefix("192.0.0.0/8"), Some(5)));
        let expected = Way::Via { gateway: addr("192.168.50.2"), ifindex: 4 };
        assert_eq!(native(&world).routes.get(&prefix("10.244.2.0/24")), Some(&expected));
    }

    #[test]
    fn what_has_no_route_is_said_and_costs_no_other_its_own() {
        let mut world = world();
        set(&mut world, "d", &["10.9.0.1"], &["10.244.4.0/24", "fd00:10:244:4::/64"]);
        set(&mut world, "e", &["192.168.50.5"], &["10.244.2.0/24", "10.244.1.128/25"]);
        set(&mut world, "f", &["192.168.50.6"], &["0.0.0.0/0", "192.168.50.0/29"]);
        let PlannedRoutes { routes, ends: _, problems } = native(&world);
        assert_eq!(routes, native(&self::world()).routes);
        let said: Vec<_> = problems.iter().map(|problem| problem.to_string()).collect();
        let expected = [
            "Node d: 10.244.4.0/24 of spec.podCIDRs has no route: 10.9.0.1 is on no link",
            "Node d: fd00:10:244:4::/64 of spec.podCIDRs has no route: status.addresses has none of IPv6",
            "Node e: 10.244.2.0/24 of spec.podCIDRs has no route: it is Node b's",
            "Node e: 10.244.1.128/25 of spec.podCIDRs has no route: it is Node a's",
            "Node f: 0.0.0.0/0 of spec.podCIDRs has no route: it contains 192.168.50.1",
            "Node f: 192.168.50.0/29 of spec.podCIDRs has no route: it contains 192.168.50.1",
        ];
        assert_eq!(said.len(), expected.len(), "{said:#?}");
        for (said, expected) in said.iter().zip(expected) {
            assert!(said.starts_with(expected), "{said}");
        }
    }

    #[test]
    fn an_own_range_of_every_address_is_no_route() {
        let mut world = world();
        set(&mut world, "a", &["192.168.50.1"], &["0.0.0.0/0"]);
        assert!(!native(&world).routes.values().any(|way| *way == Way::Unreachable));
    }
}
