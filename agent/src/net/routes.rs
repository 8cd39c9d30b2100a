//! The routes between nodes in the kernel: made, kept, and removed when nobody wants them any longer.
//!
//! Ours are told from all others by their protocol, so that what an administrator or another daemon made is never
//! touched, and what an agent made before it died is found.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ferroflow_common::addr::Addr;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_connection};
use tokio::sync::watch::{Receiver, Sender};

use super::notices::notices;
use super::pod::{Netlink as _, PodError, gateway};
use super::tunnel::{self, TunnelDevice, TunnelError};
use super::{NetError, veth};
use crate::model::{Family, Prefix, Routes, TunnelLink, Way};

/// What the kernel says that a route was made by; no other daemon is known to use the number (`/etc/iproute2/rt_protos`).
pub const PROTOCOL: u8 = 70;

/// What the routes are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Goal {
    /// Counts the goals.
    pub revision: u64,
    pub routes: Routes,
    /// The device that packets are carried through.
    pub tunnel: Option<TunnelDevice>,
    pub surplus: Surplus,
}

/// What was last tried of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Laid {
    pub revision: u64,
    /// The tunnel's device.
    pub tunnel: Option<TunnelLink>,
    /// How often something that had been made was missing and was made again.
    pub repairs: u64,
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

    /// Makes the tunnel's device as it is to be, or removes it; what it is then. Routes out of it can be made from then on.
    ///
    /// # Errors
    /// [`RouteError::Tunnel`].
    fn tunnel(
        &self,
        wanted: Option<&TunnelDevice>,
    ) -> impl Future<Output = Result<Option<TunnelLink>, RouteError>> + Send;

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
    Tunnel(#[from] TunnelError),
    #[error(transparent)]
    Forward(#[from] PodError),
}

/// Changes of the kernel's routes are looked at together: a device that goes takes all of its routes with it.
const SETTLE: Duration = Duration::from_millis(50);

/// Looks again without an event, should one have been lost, and tries again what failed.
const PATROL: Duration = Duration::from_secs(3);

/// Makes the routes what the goal says, again whenever an event says that they may have changed, until the goal's
/// sender is gone. What was last tried is sent to `laid`.
pub async fn keep<T: RouteTable>(
    table: T,
    mut goals: Receiver<Goal>,
    laid: Sender<Laid>,
    mut events: impl Stream<Item: Send> + Unpin,
) {
    let mut said = BTreeSet::new();
    let mut repairs = 0;
    // The goal that was there in full, and the tunnel it had.
    let mut whole: Option<(u64, Option<TunnelLink>)> = None;
    loop {
        let goal = goals.borrow_and_update().clone();
        if goal.revision > 0 {
            let Work { tunnel, made, failed } = lay(&table, &goal).await;
            let before = whole.filter(|(revision, _)| *revision == goal.revision);
            if let Some((_, device)) = before
                && (!made.is_empty() || device != tunnel)
            {
                let routes: Vec<_> = made.iter().map(Prefix::to_string).collect();
                let device = if device == tunnel { "" } else { tunnel::NAME };
                tracing::warn!(routes = %routes.join(" "), device, "somebody removed what is made again");
                repairs += 1;
            }
            let failed: BTreeSet<_> = failed.iter().map(RouteError::to_string).collect();
            for error in failed.difference(&said) {
                tracing::warn!("{error}; trying again");
            }
            whole = failed.is_empty().then_some((goal.revision, tunnel));
            said = failed;
            laid.send_replace(Laid { revision: goal.revision, tunnel, repairs });
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

/// What laying routes came to.
struct Work {
    tunnel: Option<TunnelLink>,
    made: Vec<Prefix>,
    failed: Vec<RouteError>,
}

/// Once; goes on where one is refused.
async fn lay<T: RouteTable>(table: &T, goal: &Goal) -> Work {
    let families =
        Family::ALL.into_iter().filter(|family| goal.routes.keys().any(|to| to.family() == *family));
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    failed.extend(table.forward(&families.collect::<Vec<_>>()).err());
    let tunnel = match table.tunnel(goal.tunnel.as_ref()).await {
        Ok(tunnel) => tunnel,
        Err(error) => {
            failed.push(error);
            None
        }
    };
    let actual = match table.list().await {
        Ok(actual) => actual,
        Err(error) => {
            failed.push(error);
            return Work { tunnel, made, failed };
        }
    };
    for (&to, &way) in &goal.routes {
        let done = match actual.get(&to) {
            Some(is) if *is == way => continue,
            Some(_other) => table.replace(to, way).await,
            None => table.add(to, way).await,
        };
        match done {
            Ok(()) => made.push(to),
            Err(error) => failed.push(error),
        }
    }
    match goal.surplus {
        Surplus::Kept => {}
        Surplus::Removed => {
            for (&to, &way) in actual.iter().filter(|(to, _)| !goal.routes.contains_key(to)) {
                failed.extend(table.remove(to, way).await.err());
            }
        }
    }
    Work { tunnel, made, failed }
}

/// The main table of this host.
pub struct Kernel {
    netlink: Handle,
    /// The interface of the tunnel; 0 where there is none.
    tunnel: AtomicU32,
}

/// Links too: routes that go with their device are not announced.
const GROUPS: [MulticastGroup; 3] =
    [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];

impl Kernel {
    fn device(&self) -> u32 {
        self.tunnel.load(Ordering::Relaxed)
    }

    /// With the events that may change a route.
    ///
    /// # Errors
    /// [`NetError::Socket`].
    pub fn open() -> Result<(Self, impl Stream<Item: Send> + Unpin + Send), NetError> {
        let (connection, netlink, _unasked) = new_connection()?;
        tokio::spawn(connection);
        Ok((Self { netlink, tunnel: AtomicU32::new(0) }, notices(&GROUPS)?))
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
                found.extend(ours(&route, self.device()));
            }
        }
        Ok(found)
    }

    async fn add(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        let done = self.netlink.route().add(message(to, way, self.device())).execute().await;
        done.map_err(|error| match errno(&error) {
            Some(libc::EEXIST) => RouteError::Taken { to },
            _ => refused(to, "add", &error),
        })
    }

    async fn replace(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        let done = self.netlink.route().add(message(to, way, self.device())).replace().execute().await;
        done.map_err(|error| refused(to, "replace", &error))
    }

    async fn remove(&self, to: Prefix, way: Way) -> Result<(), RouteError> {
        match self.netlink.route().del(message(to, way, self.device())).execute().await {
            Err(error) if errno(&error) != Some(libc::ESRCH) => Err(refused(to, "remove", &error)),
            _ => Ok(()),
        }
    }

    async fn tunnel(&self, wanted: Option<&TunnelDevice>) -> Result<Option<TunnelLink>, RouteError> {
        let made = tunnel::make(&self.netlink, wanted).await;
        let link = made.as_ref().ok().copied().flatten();
        self.tunnel.store(link.map_or(0, |link| link.ifindex), Ordering::Relaxed);
        Ok(made?)
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

/// `tunnel` is the interface of the tunnel. A route into it leads by a next hop that is no node, so that one neighbour
/// stands for all: the device needs no link-layer address of any.
fn message(to: Prefix, way: Way, tunnel: u32) -> RouteMessage {
    let (hop, out, source) = match way {
        Way::Via { gateway, ifindex } => (Some(gateway), ifindex, None),
        Way::Tunnel { source } => (Some(hop(to.family())), tunnel, source),
        Way::Unreachable => (None, 0, None),
    };
    match to.addr().ip() {
        IpAddr::V4(ip) => {
            let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, to.bits().saturating_sub(96))
                .protocol(RouteProtocol::Other(PROTOCOL));
            if let Some(hop) = hop {
                route = route.gateway(Ipv4Addr::from(hop.v4_bytes())).output_interface(out).onlink();
            } else {
                route = route.kind(RouteType::Unreachable);
            }
            source.into_iter().fold(route, |it, addr| it.pref_source(addr.v4_bytes().into())).build()
        }
        IpAddr::V6(ip) => {
            let mut route = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, to.bits())
                .protocol(RouteProtocol::Other(PROTOCOL));
            if let Some(hop) = hop {
                route = route.gateway(Ipv6Addr::from(hop.bytes)).output_interface(out).onlink();
            } else {
                route = route.kind(RouteType::Unreachable);
            }
            source.into_iter().fold(route, |it, addr| it.pref_source(addr.bytes.into())).build()
        }
    }
}

/// The next hop of whatever goes into the tunnel, link-local as that of pods.
fn hop(family: Family) -> Addr {
    let of_family = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    gateway(of_family).into()
}

/// A route of ours; one that was made otherwise than we make them leads by no gateway, which is never wanted.
fn ours(route: &RouteMessage, tunnel: u32) -> Option<(Prefix, Way)> {
    let RouteHeader { destination_prefix_length, kind, table, protocol, .. } = route.header;
    if protocol != RouteProtocol::Other(PROTOCOL) || table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut to, mut gateway, mut out, mut source) = (None, Addr::UNSPECIFIED, 0, None);
    for attribute in &route.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            to = ip(address);
        } else if let RouteAttribute::Gateway(address) = attribute {
            gateway = ip(address).map_or(Addr::UNSPECIFIED, Addr::from);
        } else if let RouteAttribute::Oif(ifindex) = attribute {
            out = *ifindex;
        } else if let RouteAttribute::PrefSource(address) = attribute {
            source = ip(address).map(Addr::from);
        }
    }
    let to = Prefix::new(to?.into(), destination_prefix_length)?;
    let way = if kind == RouteType::Unreachable {
        Way::Unreachable
    } else if tunnel != 0 && out == tunnel && gateway == hop(to.family()) {
        Way::Tunnel { source }
    } else {
        Way::Via { gateway, ifindex: out }
    };
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

        async fn tunnel(&self, wanted: Option<&TunnelDevice>) -> Result<Option<TunnelLink>, RouteError> {
            Ok(wanted.map(|_| TunnelLink { ifindex: 9, mtu: 1450 }))
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
        Goal { revision, routes: routes.iter().copied().collect(), tunnel: None, surplus: Surplus::Removed }
    }

    #[tokio::test]
    async fn only_the_difference_is_written() {
        let fake = Fake::default();
        let first = goal(1, &[(range(1), Way::Unreachable), (range(2), via(2)), (range(3), via(3))]);
        assert!(lay(&fake, &first).await.failed.is_empty());
        assert!(lay(&fake, &first).await.failed.is_empty());
        assert_eq!(fake.0.lock().unwrap().writes, 3);
        let second = goal(2, &[(range(1), Way::Unreachable), (range(2), via(9)), (range(4), via(4))]);
        assert!(lay(&fake, &second).await.failed.is_empty());
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
        let failed = lay(&fake, &held).await.failed;
        assert!(matches!(&failed[..], [RouteError::Taken { to }] if *to == range(2)), "{failed:?}");
        let expected = Routes::from([(range(3), via(3)), (range(7), via(7))]);
        assert_eq!(fake.0.lock().unwrap().routes, expected);
    }

    #[tokio::test]
    async fn routes_that_somebody_removes_come_back() {
        let fake = Fake::default();
        let (goals, wanted) = watch::channel(Goal::default());
        let (laid, mut done) = watch::channel(Laid::default());
        let (events, told) = mpsc::unbounded_channel::<()>();
        let told = Box::pin(stream::unfold(told, |mut told| async { Some((told.recv().await?, told)) }));
        let keeping = tokio::spawn(keep(fake.clone(), wanted, laid, told));
        let wanted = goal(1, &[(range(2), via(2))]);
        goals.send_replace(wanted.clone());
        done.wait_for(|laid| laid.revision == 1).await.unwrap();
        fake.0.lock().unwrap().routes.clear();
        done.mark_unchanged();
        events.send(()).unwrap();
        done.changed().await.unwrap();
        assert_eq!(done.borrow().repairs, 1);
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
            (range(3), Way::Tunnel { source: Some(Addr::v4([192, 168, 50, 1])) }),
            (Prefix::new(six("fd00:3::"), 64).unwrap(), Way::Tunnel { source: Some(six("fd50::1")) }),
            (Prefix::new(six("fd00:4::"), 64).unwrap(), Way::Tunnel { source: None }),
        ];
        for (to, way) in routes {
            assert_eq!(ours(&message(to, way, 12), 12), Some((to, way)));
        }
        let mut other = message(range(2), via(2), 12);
        other.header.protocol = RouteProtocol::Static;
        assert_eq!(ours(&other, 12), None);
    }
}
