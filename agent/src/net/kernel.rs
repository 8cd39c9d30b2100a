//! Routes by netlink.

use std::net::IpAddr;
use std::time::Duration;

use ferroflow_common::addr::Addr;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection};
use tokio::sync::mpsc::Sender;

use super::{LocalRoutes, NetError, RouteEvent, report};

/// What can change a host route. Links too: a route that goes with its device is not announced.
const GROUPS: [MulticastGroup; 3] =
    [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];

/// Events come in bursts, and a list of all routes answers any number of them.
const SETTLE: Duration = Duration::from_millis(5);

/// Lists again without an event, should one have been lost (the socket's buffer overran).
const RELIST: Duration = Duration::from_secs(30);

/// Reports the host's routes to single addresses and every change of them, until the receiver is closed.
///
/// # Errors
/// [`NetError`] where netlink cannot be used at all.
pub async fn watch_routes(events: Sender<RouteEvent>) -> Result<(), NetError> {
    let (connection, handle, mut messages) = new_multicast_connection(&GROUPS)?;
    let connection = tokio::spawn(connection);
    let mut known = LocalRoutes::new();
    let mut synced = false;
    while !events.is_closed() {
        let routes = list(&handle).await?;
        report(&events, &known, &routes).await;
        known = routes;
        if !synced {
            let _closed = events.send(RouteEvent::Synced).await;
            synced = true;
        }
        tokio::select! {
            () = events.closed() => break,
            _message = messages.next() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(RELIST) => {}
        }
        while let Ok(Some(_message)) = tokio::time::timeout(Duration::ZERO, messages.next()).await {}
    }
    connection.abort();
    Ok(())
}

async fn list(handle: &Handle) -> Result<LocalRoutes, NetError> {
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    let mut found = LocalRoutes::new();
    for query in [v4, v6] {
        let mut routes = Box::pin(handle.route().get(query).execute());
        while let Some(route) = routes.try_next().await? {
            found.extend(host_route(&route));
        }
    }
    Ok(found)
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
    fn networks_and_gateways_are_not() {
        assert_eq!(host_route(&route(24).build()), None);
        assert_eq!(host_route(&route(32).gateway(Ipv4Addr::new(192, 168, 0, 1)).build()), None);
    }
}
