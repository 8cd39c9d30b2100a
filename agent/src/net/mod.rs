//! The host's network as the kernel tells it: which addresses are behind which interfaces.

mod kernel;

use std::collections::BTreeMap;

use ferroflow_common::addr::Addr;
use tokio::sync::mpsc::Sender;

pub use kernel::watch_routes;

/// Interfaces by the address that a host route (/32 or /128, without a gateway) says is behind them. Every network
/// plugin that routes to its pods leaves such a route.
pub type LocalRoutes = BTreeMap<Addr, u32>;

/// One address that is now behind another interface, or behind none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteChange {
    pub addr: Addr,
    pub ifindex: Option<u32>,
}

/// What the kernel's routes say, as long as somebody listens.
#[derive(Clone, Copy, Debug)]
pub enum RouteEvent {
    Changed(RouteChange),
    /// The routes that were there at the start have all been reported. Sent once.
    Synced,
}

/// What to report to go from one set of routes to another; an address that moved is reported once.
fn changes(old: &LocalRoutes, new: &LocalRoutes) -> Vec<RouteChange> {
    let gone =
        old.keys().filter(|addr| !new.contains_key(addr)).map(|&addr| RouteChange { addr, ifindex: None });
    let come = new
        .iter()
        .filter(|(addr, ifindex)| old.get(addr) != Some(ifindex))
        .map(|(&addr, &ifindex)| RouteChange { addr, ifindex: Some(ifindex) });
    gone.chain(come).collect()
}

async fn report(events: &Sender<RouteEvent>, old: &LocalRoutes, new: &LocalRoutes) {
    for change in changes(old, new) {
        // A receiver that is gone ends the watch at its next turn.
        let _closed = events.send(RouteEvent::Changed(change)).await;
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    #[error("cannot list routes: {0}")]
    Routes(#[from] rtnetlink::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_reported() {
        let a = Addr::v4([10, 244, 1, 2]);
        let b = Addr::v4([10, 244, 1, 3]);
        let c = Addr::v4([10, 244, 1, 4]);
        let old = LocalRoutes::from([(a, 1), (b, 2), (c, 3)]);
        let new = LocalRoutes::from([(a, 1), (b, 5)]);
        let changed = |addr, ifindex| RouteChange { addr, ifindex };
        assert_eq!(changes(&old, &new), [changed(c, None), changed(b, Some(5))]);
        assert_eq!(changes(&new, &new), []);
    }
}
