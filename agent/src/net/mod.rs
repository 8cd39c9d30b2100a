//! The host's network as the kernel tells it: which addresses are its own, and which are behind which interfaces; and
//! the links of pods, which the agent makes itself where it is the network plugin ([`pod`]).

pub mod device;
#[cfg(test)]
pub(crate) mod fake;
mod kernel;
pub mod loopback;
mod netns;
mod notices;
pub mod pod;
pub mod queue;
pub mod routes;
pub mod sockets;
pub mod tunnel;
pub mod veth;

use std::collections::BTreeMap;

use ferroflow_common::addr::Addr;
use tokio::sync::mpsc::Sender;

use crate::model::Prefix;

pub use kernel::watch;

/// Interfaces by address.
type Interfaces = BTreeMap<Addr, u32>;

/// What is where at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Snapshot {
    /// Behind which interface a host route (/32 or /128, without a gateway) says that an address is. Every network
    /// plugin that routes to its pods leaves such a route.
    routes: Interfaces,
    /// The host's own addresses.
    addresses: Interfaces,
    /// The ranges that are on its links.
    subnets: BTreeMap<Prefix, u32>,
    /// The Ethernet interfaces that default routes lead out of, each by itself.
    uplinks: BTreeMap<u32, u32>,
    /// The interfaces with a queue, each by itself.
    queues: BTreeMap<u32, u32>,
}

impl Snapshot {
    /// Whether anything that was there before is not.
    fn lacks_any_of(&self, before: &Self) -> bool {
        fn lacks<A: Ord>(now: &BTreeMap<A, u32>, before: &BTreeMap<A, u32>) -> bool {
            before.keys().any(|key| !now.contains_key(key))
        }
        lacks(&self.routes, &before.routes)
            || lacks(&self.addresses, &before.addresses)
            || lacks(&self.subnets, &before.subnets)
            || lacks(&self.uplinks, &before.uplinks)
            || lacks(&self.queues, &before.queues)
    }
}

/// One address, or range of them, that is now at another interface, or at none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved<A = Addr> {
    pub addr: A,
    pub ifindex: Option<u32>,
}

/// What the kernel says, as long as somebody listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetEvent {
    Route(Moved),
    Address(Moved),
    Subnet(Moved<Prefix>),
    /// An interface that a default route leads out of.
    Uplink(Moved<u32>),
    /// An interface whose packets wait in a queue of its own before they leave by it.
    Queue(Moved<u32>),
    /// What was there at the start has all been reported. Sent once.
    Synced,
}

/// What to report to go from one state to another; an address that moved is reported once.
fn changes<A: Copy + Ord>(old: &BTreeMap<A, u32>, new: &BTreeMap<A, u32>) -> Vec<Moved<A>> {
    let gone = old.keys().filter(|addr| !new.contains_key(addr)).map(|&addr| Moved { addr, ifindex: None });
    let come = new
        .iter()
        .filter(|(addr, ifindex)| old.get(addr) != Some(ifindex))
        .map(|(&addr, &ifindex)| Moved { addr, ifindex: Some(ifindex) });
    gone.chain(come).collect()
}

async fn report(events: &Sender<NetEvent>, old: &Snapshot, new: &Snapshot) {
    let routes = changes(&old.routes, &new.routes).into_iter().map(NetEvent::Route);
    let addresses = changes(&old.addresses, &new.addresses).into_iter().map(NetEvent::Address);
    let subnets = changes(&old.subnets, &new.subnets).into_iter().map(NetEvent::Subnet);
    let uplinks = changes(&old.uplinks, &new.uplinks).into_iter().map(NetEvent::Uplink);
    let queues = changes(&old.queues, &new.queues).into_iter().map(NetEvent::Queue);
    // A limit holds from the first packet on: queues come before the routes to who is behind them.
    for event in addresses.chain(queues).chain(routes).chain(subnets).chain(uplinks) {
        // A receiver that is gone ends the watch at its next turn.
        let _closed = events.send(event).await;
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    #[error("cannot list routes and addresses: {0}")]
    List(#[from] rtnetlink::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_reported() {
        let a = Addr::v4([10, 244, 1, 2]);
        let b = Addr::v4([10, 244, 1, 3]);
        let c = Addr::v4([10, 244, 1, 4]);
        let old = Interfaces::from([(a, 1), (b, 2), (c, 3)]);
        let new = Interfaces::from([(a, 1), (b, 5)]);
        let moved = |addr, ifindex| Moved { addr, ifindex };
        assert_eq!(changes(&old, &new), [moved(c, None), moved(b, Some(5))]);
        assert_eq!(changes(&new, &new), []);
    }
}
