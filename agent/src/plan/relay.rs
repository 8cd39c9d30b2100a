//! Direct server return: which node has a backend, by which address packets are relayed to it, and who may relay here.

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::abi::relay::{NodeNumber, Relay};
use ferroflow_common::addr::Addr;

use super::{Config, routes};
use crate::model::World;
use crate::model::weight::Label;

/// How clients from outside reach a backend on another node, with `externalTrafficPolicy: Cluster`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadBalancerMode {
    /// By this node's address: answers come back by here
    #[default]
    Snat,
    /// By their own address: their packets are carried to the backend's node in the tunnel (--vxlan-port), which answers
    /// them by itself, from the address that they asked
    Dsr,
}

/// What the programs are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayRows {
    pub relay: Relay,
    /// By which address packets are relayed to a node.
    pub nodes: BTreeMap<NodeNumber, Addr>,
    /// Addresses that packets may be relayed from.
    pub peers: BTreeMap<Addr, NodeNumber>,
}

/// `None` as long as the tunnel is not there: then the tables stay as they are, which is empty at first, and then clients
/// are masqueraded.
pub fn rows(world: &World, config: &Config) -> Option<RelayRows> {
    match config.mode {
        LoadBalancerMode::Snat => return Some(RelayRows::default()),
        LoadBalancerMode::Dsr => {}
    }
    let link = world.tunnel()?;
    let relay = Relay { device: link.ifindex, room: link.mtu, vni: config.vni };
    let mut rows = RelayRows { relay, ..RelayRows::default() };
    let (mut seen, mut shared) = (BTreeSet::new(), BTreeSet::new());
    for (name, node) in world.nodes() {
        let number = Label::of(name).number();
        if !seen.insert(number) {
            shared.insert(number);
        }
        if name == world.own_name() {
            continue;
        }
        rows.peers.extend(node.addresses.iter().map(|addr| (*addr, number)));
        rows.nodes.extend(routes::end(world, node).map(|end| (number, end)));
    }
    // Two names with one number: whoever has a backend is not known, and its clients are masqueraded.
    rows.nodes.retain(|number, _| !shared.contains(number));
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, Node, TunnelLink};

    const THERE: Addr = Addr::v4([192, 168, 50, 2]);
    const HERE: Addr = Addr::v4([192, 168, 50, 1]);

    fn world() -> World {
        let mut world = World::new("here");
        for (name, addr) in [("here", HERE), ("there", THERE)] {
            let node =
                Node { addresses: Box::new([addr, Addr::v6([addr.bytes[15]; 16])]), ..Node::default() };
            world.apply(Change::Node(name.into(), Some(node)));
        }
        world.apply(Change::LocalAddress(HERE, Some(3)));
        world
    }

    #[test]
    fn nothing_is_relayed_unless_asked_for_and_then_once_the_tunnel_is_there() {
        let mut world = world();
        let told = |world: &World, mode| rows(world, &Config { mode, vni: 7, ..Config::default() });
        assert_eq!(told(&world, LoadBalancerMode::Snat), Some(RelayRows::default()));
        assert_eq!(told(&world, LoadBalancerMode::Dsr), None);
        world.apply(Change::Tunnel(Some(TunnelLink { ifindex: 9, mtu: 1450 })));
        let said = told(&world, LoadBalancerMode::Dsr).unwrap();
        assert_eq!(said.relay, Relay { device: 9, room: 1450, vni: 7 });
        let number = Label::of("there").number();
        assert_eq!(said.nodes, BTreeMap::from([(number, THERE)]), "by the family that both have");
        assert_eq!(said.peers, BTreeMap::from([(THERE, number), (Addr::v6([2; 16]), number)]));
        assert_eq!(told(&world, LoadBalancerMode::Snat), Some(RelayRows::default()));
    }
}
