//! The routes between nodes in the kernel: made, kept, and removed when nobody wants them any longer.
//!
//! Ours are told from all others by their protocol, so that what an administrator or another daemon made is never
//! touched, and what an agent made before it died is found.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ferroflow_common::addr::Addr;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection};
use tokio::sync::watch::{Receiver, Sender};

use super::NetError;
use super::pod::{Netlink as _, PodError};
use super::veth;
use crate::model::{Family, Prefix, Routes, Way};

/// What the kernel says that a route was made by; no other daemon is known to use the number (`/etc/iproute2/rt_protos`).
pub const PROTOCOL: u8 = 70;

/// What the routes are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Goal {
    /// Counts the goals.
    pub revision: u64,
    pub routes: Routes,
    pub surplus: Surplus,
}

/// What becomes of our routes that are no part of the goal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Surplus {
    #[default]
    Removed,
    /// Something of a node cannot be read: they may be its.
    Kept,
}

/// The kernel's table, as far as it is ours.
pub trait RouteTable {
    /// # Errors
    /// [`RouteError`].
    fn list(&self) -> impl Future<Output = Result<Routes, RouteError>> + Send;

    /// # Errors
    /// [`RouteError::Taken`] where there is one, ours or somebody else's.
    fn add(&self, to: Prefix, way: Way) -> impl Future<Output = Result<(), RouteError>> + Send;

    /// Puts one of ours in the place of another, without a moment between.
    ///
    /// # Errors
    /// [`RouteError`].
    fn replace(&self, to: Prefix, way: Way) -> impl Future<Output = Result<(), RouteError>> + Send;

    /// That it is gone already is no error.
    ///
    /// # Errors
    /// [`RouteError`].
    fn remove(&self, to: Prefix, way: Way) -> impl Future<Output = Result<(), RouteError>> + Send;

    /// Makes the host forward packets of these families.
    ///
    /// # Errors
    /// [`RouteError`].
    fn forward(&self, families: &[Family]) -> Result<(), RouteError>;
}

#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("{to}: there is a route that is not ours: remove it, or start the agent with --routing none")]
    Taken { to: Prefix },
    #[error("{to}: cannot {what} the route: {reason}")]
    Refused { to: Prefix, what: &'static str, reason: String },
    #[error("cannot list routes: {0}")]
    List(rtnetlink::Error),
    #[error(transparent)]
    Forward(#[from] PodError),
}

/// Changes of the kernel's routes are looked at together: a device that goes takes all of its routes with it.
const SETTLE: Duration = Duration::from_millis(50);

/// Looks again without an event, should one have been lost, and tries again what failed.
const PATROL: Duration = Duration::from_secs(3);

/// Makes the routes what the goal says, again whenever an event says that they may have changed, until the goal's
/// sender is gone. The revision that was last tried is sent to `laid`.
pub async fn keep<T: RouteTable>(
    table: T,
    mut goals: Receiver<Goal>,
    laid: Sender<u64>,
    mut events: impl Stream<Item: Send> + Unpin,
) {
    let mut said = BTreeSet::new();
    loop {
        let goal = goals.borrow_and_update().clone();
        if goal.revision > 0 {
            let failed: BTreeSet<_> = lay(&table, &goal).await.iter().map(RouteError::to_string).collect();
            for error in failed.difference(&said) {
                tracing::warn!("{error}; trying again");
            }
            said = failed;
            laid.send_replace(goal.revision);
        }
        tokio::select! {
            changed = goals.changed() => match changed {
                Ok(()) => continue,
                Err(_gone) => return,
            },
            Some(_event) = events.next() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(PATROL) => {}
        }
        while let Ok(Some(_event)) = tokio::time::timeout(Duration::ZERO, events.next()).await {}
    }
}

/// Once; goes on where one is refused.
async fn lay<T: RouteTable>(table: &T, goal: &Goal) -> Vec<RouteError> {
    let families =
        Family::ALL.into_iter().filter(|family| goal.routes.keys().any(|to| to.family() == *family));
    let mut failed = Vec::new();
    failed.extend(table.forward(&families.collect::<Vec<_>>()).err());
    let actual = match table.list().await {
        Ok(actual) => actual,
        Err(error) => {
            failed.push(error);
            return failed;
        }
    };
    for (&to, &way) in &goal.routes {
        let done = match actual.get(&to) {
            Some(is) if *is == way => Ok(()),
            Some(_other) => table.replace(to, way).await,
            None => table.add(to, way).await,
        };
        failed.extend(done.err());
    }
    match goal.surplus {
        Surplus::Kept => {}
        Surplus::Removed => {
            for (&to, &way) in actual.iter().filter(|(to, _)| !goal.routes.contains_key(to)) {
                failed.extend(table.remove(to, way).await.err());
            }
        }
    }
    failed
}

/// The main table of this host.
pub struct Kernel {
    netlink: Handle,
}

/// Links too: routes that go with their device are not announced.
const GROUPS: [MulticastGroup; 3] =
    [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];

impl Kernel {
    /// With the events that may change a route.
    ///
    /// # Errors
    /// [`NetError::Socket`].
    pub fn open() -> Result<(Self, impl Stream<Item: Send> + Unpin + Send), NetError> {
        let (connection, netlink, events) = new_multicast_connection(&GROUPS)?;
        tokio::spawn(connection);
        Ok((Self { netlink }, events))
    }
}

impl RouteTable for Kernel {
    async fn list(&self) -> Result<Routes, RouteError> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut found = Routes::new();
        for query in [v4, v6] {
            let mut routes = Box::pin(self.netlink.route().get(query).execute());
            while let Some(route) = routes.try_next().await.map_err(RouteError::List)? {
                found.extend(ours(&route));
            }
        }
        Ok(found)
    }

    async fn add(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        let done = self.netlink.route().add(message(to, way)).execute().await;
        done.map_err(|error| match errno(&error) {
            Some(libc::EEXIST) => RouteError::Taken { to },
            _ => refused(to, "add", &error),
        })
    }

    async fn replace(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        let done = self.netlink.route().add(message(to, way)).replace().execute().await;
        done.map_err(|error| refused(to, "replace", &error))
    }

    async fn remove(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        match self.netlink.route().del(message(to, way)).execute().await {
            Err(error) if errno(&error) != Some(libc::ESRCH) => Err(refused(to, "remove", &error)),
            _ => Ok(()),
        }
    }

    fn forward(&self, families: &[Family]) -> Result<(), RouteError> {
        Ok(veth::Kernel.forward(families)?)
    }
}

fn refused(to: Prefix, what: &'static str, error: &rtnetlink::Error) -> RouteError {
    RouteError::Refused { to, what, reason: error.to_string() }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    if let rtnetlink::Error::NetlinkError(message) = error {
        return message.to_io().raw_os_error();
    }
    None
}

fn message(to: Prefix, way: Way) -> RouteMessage {
    match to.addr().ip() {
        IpAddr::V4(ip) => {
            let builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, to.bits().saturating_sub(96))
                .protocol(RouteProtocol::Other(PROTOCOL));
            match way {
                Way::Via { gateway, ifindex } => builder
                    .gateway(Ipv4Addr::from(gateway.v4_bytes()))
                    .output_interface(ifindex)
                    .onlink()
                    .build(),
                Way::Unreachable => builder.kind(RouteType::Unreachable).scope(RouteScope::Universe).build(),
            }
        }
        IpAddr::V6(ip) => {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, to.bits())
                .protocol(RouteProtocol::Other(PROTOCOL));
            match way {
                Way::Via { gateway, ifindex } => {
                    builder.gateway(Ipv6Addr::from(gateway.bytes)).output_interface(ifindex).onlink().build()
                }
                Way::Unreachable => builder.kind(RouteType::Unreachable).build(),
            }
        }
    }
}

/// A route of ours; one that was made otherwise than we make them leads by no gateway, which is never wanted.
fn ours(route: &RouteMessage) -> Option<(Prefix, Way)> {
    let RouteHeader { destination_prefix_length, kind, table, protocol, .. } = route.header;
    if protocol != RouteProtocol::Other(PROTOCOL) || table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut to, mut gateway, mut out) = (None, Addr::UNSPECIFIED, 0);
    for attribute in &route.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            to = ip(address);
        } else if let RouteAttribute::Gateway(address) = attribute {
            gateway = ip(address).map_or(Addr::UNSPECIFIED, Addr::from);
        } else if let RouteAttribute::Oif(ifindex) = attribute {
            out = *ifindex;
        }
    }
    let to = Prefix::new(to?.into(), destination_prefix_length)?;
    let way =
        if kind == RouteType::Unreachable { Way::Unreachable } else { Way::Via { gateway, ifindex: out } };
    Some((to, way))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(ip) = address {
        return Some(IpAddr::V4(*ip));
    }
    if let RouteAddress::Inet6(ip) = address {
        return Some(IpAddr::V6(*ip));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures_util::stream;
    use tokio::sync::{mpsc, watch};

    use super::*;

    /// A table in which some ranges are somebody else's.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        routes: Routes,
        taken: BTreeSet<Prefix>,
        writes: usize,
        forwards: Vec<Family>,
    }

    impl RouteTable for Fake {
        async fn list(&self) -> Result<Routes, RouteError> {
            Ok(self.0.lock().unwrap().routes.clone())
        }

        async fn add(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
            let mut state = self.0.lock().unwrap();
            if state.taken.contains(&to) || state.routes.contains_key(&to) {
                return Err(RouteError::Taken { to });
            }
            state.writes += 1;
            state.routes.insert(to, way);
            Ok(())
        }

        async fn replace(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
            let mut state = self.0.lock().unwrap();
            state.writes += 1;
            assert!(state.routes.insert(to, way).is_some(), "nothing to replace");
            Ok(())
        }

        async fn remove(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
            let mut state = self.0.lock().unwrap();
            state.writes += 1;
            assert_eq!(state.routes.remove(&to), Some(way));
            Ok(())
        }

        fn forward(&self, families: &[Family]) -> Result<(), RouteError> {
            self.0.lock().unwrap().forwards = families.to_vec();
            Ok(())
        }
    }

    fn range(last: u8) -> Prefix {
        Prefix::new(Addr::v4([10, 244, last, 0]), 24).unwrap()
    }

    fn via(last: u8) -> Way {
        Way::Via { gateway: Addr::v4([192, 168, 50, last]), ifindex: 3 }
    }

    fn goal(revision: u64, routes: &[(Prefix, Way)]) -> Goal {
        Goal { revision, routes: routes.iter().copied().collect(), surplus: Surplus::Removed }
    }

    #[tokio::test]
    async fn only_the_difference_is_written() {
        let fake = Fake::default();
        let first = goal(1, &[(range(1), Way::Unreachable), (range(2), via(2)), (range(3), via(3))]);
        assert!(lay(&fake, &first).await.is_empty());
        assert!(lay(&fake, &first).await.is_empty());
        assert_eq!(fake.0.lock().unwrap().writes, 3);
        let second = goal(2, &[(range(1), Way::Unreachable), (range(2), via(9)), (range(4), via(4))]);
        assert!(lay(&fake, &second).await.is_empty());
        let state = fake.0.lock().unwrap();
        assert_eq!((&state.routes, state.writes), (&second.routes, 6));
        assert_eq!(state.forwards, [Family::V4]);
    }

    #[tokio::test]
    async fn what_is_somebody_elses_stays_and_what_may_be_wanted_too() {
        let fake = Fake::default();
        fake.0.lock().unwrap().taken.insert(range(2));
        fake.0.lock().unwrap().routes.insert(range(7), via(7));
        let held = Goal { surplus: Surplus::Kept, ..goal(1, &[(range(2), via(2)), (range(3), via(3))]) };
        let failed = lay(&fake, &held).await;
        assert!(matches!(&failed[..], [RouteError::Taken { to }] if *to == range(2)), "{failed:?}");
        let expected = Routes::from([(range(3), via(3)), (range(7), via(7))]);
        assert_eq!(fake.0.lock().unwrap().routes, expected);
    }

    #[tokio::test]
    async fn routes_that_somebody_removes_come_back() {
        let fake = Fake::default();
        let (goals, wanted) = watch::channel(Goal::default());
        let (laid, mut done) = watch::channel(0);
        let (events, told) = mpsc::unbounded_channel::<()>();
        let told = Box::pin(stream::unfold(told, |mut told| async { Some((told.recv().await?, told)) }));
        let keeping = tokio::spawn(keep(fake.clone(), wanted, laid, told));
        let wanted = goal(1, &[(range(2), via(2))]);
        goals.send_replace(wanted.clone());
        done.wait_for(|revision| *revision == 1).await.unwrap();
        fake.0.lock().unwrap().routes.clear();
        done.mark_unchanged();
        events.send(()).unwrap();
        done.changed().await.unwrap();
        assert_eq!(fake.0.lock().unwrap().routes, wanted.routes);
        drop(goals);
        keeping.await.unwrap();
    }

    #[test]
    fn a_route_is_read_as_it_was_written() {
        let six = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let routes = [
            (range(1), Way::Unreachable),
            (range(2), via(2)),
            (Prefix::new(six("fd00:1::"), 64).unwrap(), Way::Via { gateway: six("fd50::2"), ifindex: 9 }),
            (Prefix::new(six("fd00:2::"), 64).unwrap(), Way::Unreachable),
        ];
        for (to, way) in routes {
            assert_eq!(ours(&message(to, way)), Some((to, way)));
        }
        let mut other = message(range(2), via(2));
        other.header.protocol = RouteProtocol::Static;
        assert_eq!(ours(&other), None);
    }
}
