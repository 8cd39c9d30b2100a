//! Routes, addresses and queues by netlink.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use ferroflow_common::addr::Addr;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::LinkLayerType;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_connection};
use tokio::sync::mpsc::Sender;

use super::notices::notices;
use super::{NetError, NetEvent, Snapshot, queue, report};
use crate::model::Prefix;

/// What can change a host route or an address. Links too: a route that goes with its device is not announced.
const GROUPS: [MulticastGroup; 6] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Tc,
];

/// Events come in bursts, and a list of everything answers any number of them.
const SETTLE: Duration = Duration::from_millis(5);

/// Lists again without an event, should one have been lost (the socket's buffer overran).
const RELIST: Duration = Duration::from_secs(30);

/// After a list that failed.
const AGAIN: Duration = Duration::from_millis(100);

/// How often a list is made again that lacks what was there before.
const DOUBTS: u32 = 8;

/// Reports the host's own addresses, its routes to single ones, and every change of them, until the receiver is
/// closed.
///
/// # Errors
/// [`NetError`] where netlink cannot be used at all.
pub async fn watch(events: Sender<NetEvent>) -> Result<(), NetError> {
    let (mut handle, mut told) = (asking()?, notices(&GROUPS)?);
    let mut known = Snapshot::default();
    let mut synced = false;
    while !events.is_closed() {
        match list_after(&known, || list(&handle)).await {
            Ok(seen) => {
                report(&events, &known, &seen).await;
                known = seen;
                if !synced {
                    let _closed = events.send(NetEvent::Synced).await;
                    synced = true;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot list the host's routes and addresses; trying again");
                tokio::time::sleep(AGAIN).await;
                handle = asking()?;
                continue;
            }
        }
        tokio::select! {
            () = events.closed() => break,
            notice = told.next() => {
                if notice.is_none() {
                    told = notices(&GROUPS)?;
                }
                tokio::time::sleep(SETTLE).await;
            }
            () = tokio::time::sleep(RELIST) => {}
        }
        while let Ok(Some(_notice)) = tokio::time::timeout(Duration::ZERO, told.next()).await {}
    }
    Ok(())
}

fn asking() -> Result<Handle, NetError> {
    let (connection, handle, _unasked) = new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// What is there now. A list that is made while the kernel's tables change may lack what was there all the time, and what
/// this node takes for gone its pods lose: it is believed when two lists agree.
async fn list_after<F, E>(known: &Snapshot, list: impl Fn() -> F) -> Result<Snapshot, E>
where
    F: Future<Output = Result<Snapshot, E>>,
{
    let mut seen = list().await?;
    for _ in 0..DOUBTS {
        if !seen.lacks_any_of(known) {
            break;
        }
        let again = list().await?;
        if again == seen {
            break;
        }
        seen = again;
    }
    Ok(seen)
}

pub(super) async fn list(handle: &Handle) -> Result<Snapshot, rtnetlink::Error> {
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    let mut found = Snapshot::default();
    let mut uplinks = BTreeSet::new();
    for query in [v4, v6] {
        let mut routes = Box::pin(handle.route().get(query).execute());
        while let Some(route) = routes.try_next().await? {
            found.routes.extend(host_route(&route));
            uplinks.extend(default_route(&route));
        }
    }
    for ifindex in uplinks {
        if is_ethernet(handle, ifindex).await? {
            found.uplinks.insert(ifindex, ifindex);
        }
    }
    found.queues = queue::list(handle).await?.into_iter().map(|ifindex| (ifindex, ifindex)).collect();
    let mut addresses = Box::pin(handle.address().get().execute());
    while let Some(address) = addresses.try_next().await? {
        let Some((addr, ifindex)) = own_address(&address) else { continue };
        found.addresses.insert(addr, ifindex);
        // What it reaches by an address that has no others beside it, it reaches by routes.
        let subnet = Prefix::around(addr, address.header.prefix_len);
        found.subnets.extend(subnet.filter(|subnet| subnet.bits() < 128).map(|subnet| (subnet, ifindex)));
    }
    Ok(found)
}

/// An address that others can reach this host at. The kernel calls an interface's own address "local" where it tells
/// it from a peer's.
fn own_address(message: &AddressMessage) -> Option<(Addr, u32)> {
    let mut own = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(ip) = attribute {
            own = Some(*ip);
        } else if let (AddressAttribute::Address(ip), None) = (attribute, own) {
            own = Some(*ip);
        }
    }
    let own = own?;
    let link_local = match own {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    (!own.is_loopback() && !link_local).then_some((Addr::from(own), message.header.index))
}

/// The address and interface of a route to one address on this host's own links.
fn host_route(route: &RouteMessage) -> Option<(Addr, u32)> {
    let RouteHeader { destination_prefix_length: length, kind, table, .. } = route.header;
    if kind != RouteType::Unicast || table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut addr, mut ifindex) = (None, None);
    for attribute in &route.attributes {
        if let RouteAttribute::Destination(destination) = attribute {
            addr = whole_address(destination, length);
        } else if let RouteAttribute::Oif(index) = attribute {
            ifindex = Some(*index);
        } else if matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        ) {
            return None;
        }
    }
    Some((Addr::from(addr?), ifindex?))
}

/// The interfaces that a default route leads out of; none for other routes.
fn default_route(route: &RouteMessage) -> Vec<u32> {
    let RouteHeader { destination_prefix_length, kind, table, .. } = route.header;
    if kind != RouteType::Unicast || table != RouteHeader::RT_TABLE_MAIN || destination_prefix_length != 0 {
        return Vec::new();
    }
    let out = |attribute: &RouteAttribute| {
        if let RouteAttribute::Oif(index) = attribute {
            return vec![*index];
        }
        if let RouteAttribute::MultiPath(hops) = attribute {
            return hops.iter().map(|hop| hop.interface_index).collect();
        }
        Vec::new()
    };
    route.attributes.iter().flat_map(out).collect()
}

/// Whether packets on the interface have Ethernet headers, which the programs read. One that is gone has none.
async fn is_ethernet(handle: &Handle, ifindex: u32) -> Result<bool, rtnetlink::Error> {
    let mut links = Box::pin(handle.link().get().match_index(ifindex).execute());
    match links.try_next().await {
        Ok(link) => Ok(link.is_some_and(|link| link.header.link_layer_type == LinkLayerType::Ether)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(libc::ENODEV) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn whole_address(destination: &RouteAddress, prefix_length: u8) -> Option<IpAddr> {
    if let RouteAddress::Inet(ip) = destination {
        return (prefix_length == 32).then_some(IpAddr::V4(*ip));
    }
    if let RouteAddress::Inet6(ip) = destination {
        return (prefix_length == 128).then_some(IpAddr::V6(*ip));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::ready;
    use std::net::Ipv4Addr;

    use super::*;

    fn route(prefix: u8) -> RouteMessageBuilder<Ipv4Addr> {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::new(10, 244, 1, 2), prefix)
            .output_interface(7)
    }

    #[test]
    fn a_host_route_without_a_gateway_is_a_local_address() {
        assert_eq!(host_route(&route(32).build()), Some((Addr::v4([10, 244, 1, 2]), 7)));
    }

    #[test]
    fn default_routes_lead_out_and_others_do_not() {
        let gateway = Ipv4Addr::new(192, 168, 0, 1);
        let default = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(7).gateway(gateway).build();
        assert_eq!(default_route(&default), vec![7]);
        assert!(default_route(&route(8).gateway(gateway).build()).is_empty());
        let mut elsewhere = default;
        elsewhere.header.table = 99;
        assert!(default_route(&elsewhere).is_empty());
    }

    /// What is believed, and how many lists it took, where the routes lead to pods with these numbers.
    async fn believed(before: &[u8], lists: &[&[u8]]) -> (Vec<u8>, usize) {
        let with = |pods: &[u8]| Snapshot {
            routes: pods.iter().map(|&pod| (Addr::v4([10, 244, 1, pod]), pod.into())).collect(),
            ..Snapshot::default()
        };
        let made = Cell::new(0);
        let list = || {
            let list = lists.get(made.replace(made.get() + 1)).or(lists.last()).unwrap();
            ready(Ok::<_, ()>(with(list)))
        };
        let seen = list_after(&with(before), list).await.unwrap();
        (seen.routes.into_keys().map(|addr| addr.bytes[15]).collect(), made.get())
    }

    #[tokio::test]
    async fn what_a_list_lacks_is_gone_when_the_next_lacks_it_too() {
        assert_eq!(believed(&[1, 2], &[&[1, 2, 3]]).await, (vec![1, 2, 3], 1));
        assert_eq!(believed(&[1, 2], &[&[1], &[1, 2, 3]]).await, (vec![1, 2, 3], 2));
        assert_eq!(believed(&[1, 2], &[&[1], &[1]]).await, (vec![1], 2));
        assert_eq!(believed(&[1, 2], &[&[], &[2], &[2]]).await, (vec![2], 3));
    }

    #[tokio::test]
    async fn lists_that_never_agree_are_believed_at_last() {
        let lists: Vec<Vec<u8>> = (0..50).map(|list| vec![100 + list]).collect();
        let lists: Vec<&[u8]> = lists.iter().map(Vec::as_slice).collect();
        assert_eq!(believed(&[1], &lists).await.1, 1 + DOUBTS as usize);
    }

    #[test]
    fn networks_and_gateways_are_not() {
        assert_eq!(host_route(&route(24).build()), None);
        assert_eq!(host_route(&route(32).gateway(Ipv4Addr::new(192, 168, 0, 1)).build()), None);
    }
}
