//! Links of pods in the kernel: a pair of devices ([`device`]), and what makes a way of it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferroflow_common::addr::Addr;
use futures_util::TryStreamExt as _;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::kernel;
use super::netns::{Netns, Session, sysctl};
use super::pod::{Mac, Mtu, Netlink, PodError, PodLink, Wired, gateway};
use super::{device, queue};
use crate::model::Family;

/// The kernel of this host.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl Netlink for Kernel {
    fn attach(&self, link: &PodLink) -> Result<Wired, PodError> {
        let netns = Netns::open(&link.netns)?;
        let ifname = &link.pod.name;
        let exists = netns.inside(|_session| Ok(index(ifname)?.is_some()))?;
        if exists {
            return Err(PodError::Exists { name: ifname.clone(), netns: link.netns.clone() });
        }
        let host = Session::open()?;
        let mtu = match &link.mtu {
            Mtu::Fixed(mtu) => *mtu,
            Mtu::Of(devices) => smallest_mtu(&host, devices)?,
        };
        device::add(&host, link, mtu, &netns)?;
        let wired = configure(&host, link, &netns, mtu).map(|ifindex| Wired { ifindex, mtu });
        if wired.is_err() {
            // The first error says more than one of the clean-up; both ends, their addresses and routes go together.
            let _left = self.detach(&link.host.name);
        }
        wired
    }

    fn detach(&self, host: &str) -> Result<(), PodError> {
        let Some(ifindex) = index(host)? else { return Ok(()) };
        let session = Session::open()?;
        let removed = session.request(
            || format!("remove the interface {host}"),
            session.netlink.link().del(ifindex).execute(),
        );
        // It may have gone with the pod's namespace meanwhile.
        removed.or_else(|error| if index(host)?.is_none() { Ok(()) } else { Err(error) })
    }

    fn check(&self, link: &PodLink) -> Result<Wired, PodError> {
        let netns = Netns::open(&link.netns)?;
        netns.inside(|session| check_pod(session, link))?;
        let host = Session::open()?;
        let ifindex = index(&link.host.name)?
            .ok_or_else(|| PodError::Different(format!("the host has no interface {}", link.host.name)))?;
        let seen = host.request(|| "list routes and addresses".into(), kernel::list(&host.netlink))?;
        for addr in &link.addresses {
            if seen.routes.get(&Addr::from(*addr)) != Some(&ifindex) {
                let what = format!("the host has no route to {addr} out of {}", link.host.name);
                return Err(PodError::Different(what));
            }
        }
        if link.limits.ingress.is_some() && !has_queue(&host, ifindex)? {
            return Err(PodError::Different(format!("{} does not limit what the pod gets", link.host.name)));
        }
        let mtu = smallest_mtu(&host, &[ifindex])?;
        Ok(Wired { ifindex, mtu })
    }

    fn astray(&self, links: &[PodLink]) -> Result<BTreeMap<Box<str>, u32>, PodError> {
        let host = Session::open()?;
        let seen = host.request(|| "list routes and addresses".into(), kernel::list(&host.netlink))?;
        let mut found = BTreeMap::new();
        for link in links {
            let Some(ifindex) = index(&link.host.name)? else { continue };
            let is_there = |addr: &IpAddr| seen.routes.get(&Addr::from(*addr)) == Some(&ifindex);
            if !link.addresses.iter().all(is_there) {
                found.insert(link.host.name.clone(), ifindex);
            }
        }
        Ok(found)
    }

    fn mend(&self, link: &PodLink, ifindex: u32) -> Result<(), PodError> {
        let host = Session::open()?;
        link.addresses.iter().try_for_each(|addr| lead(&host, link, ifindex, *addr))
    }

    fn interfaces(&self) -> Result<BTreeMap<Box<str>, u32>, PodError> {
        let session = Session::open()?;
        let mut found = BTreeMap::new();
        let listing = async {
            let mut links = Box::pin(session.netlink.link().get().execute());
            while let Some(link) = links.try_next().await? {
                found.extend(name(&link).map(|name| (name, link.header.index)));
            }
            Ok(())
        };
        session.request(|| "list interfaces".into(), listing)?;
        Ok(found)
    }

    fn forward(&self, families: &[Family]) -> Result<(), PodError> {
        for family in families {
            match family {
                Family::V4 => set("ipv4/ip_forward", "1")?,
                Family::V6 => forward_v6()?,
            }
        }
        Ok(())
    }
}

/// Configures both ends, the way to the pod last; the host's index.
fn configure(host: &Session, link: &PodLink, netns: &Netns, mtu: u32) -> Result<u32, PodError> {
    let name = &link.host.name;
    let ifindex = found(name)?;
    let families = families(link);
    let mut settings =
        vec![("ipv4", "rp_filter", "0"), ("ipv4", "forwarding", "1"), ("ipv4", "proxy_arp", "0")];
    if families.contains(&Family::V6) {
        settings.extend(V6);
        settings.push(("ipv6", "forwarding", "1"));
    }
    apply(&settings, name)?;
    if let Some(limit) = link.limits.ingress {
        queue::limit(host, (name, ifindex), limit, mtu)?;
    }
    up(host, name, ifindex)?;
    netns.inside(|pod| configure_pod(pod, link, mtu))?;
    for &addr in &link.addresses {
        lead(host, link, ifindex, addr)?;
    }
    Ok(ifindex)
}

/// The way from the host to an address of the pod.
fn lead(host: &Session, link: &PodLink, ifindex: u32, addr: IpAddr) -> Result<(), PodError> {
    neighbour(host, ifindex, addr, link.pod.mac)?;
    let what = || format!("add the route to {addr} out of {}", link.host.name);
    host.request(what, host.netlink.route().add(host_route(addr, ifindex)).replace().execute())
}

/// Of an interface with addresses that nobody else has, and that listens to no router.
const V6: [(&str, &str, &str); 3] =
    [("ipv6", "disable_ipv6", "0"), ("ipv6", "accept_dad", "0"), ("ipv6", "accept_ra", "0")];

fn configure_pod(pod: &Session, link: &PodLink, mtu: u32) -> Result<(), PodError> {
    let name = &link.pod.name;
    let ifindex = found(name)?;
    if families(link).contains(&Family::V6) {
        apply(&V6, name)?;
    }
    if let Some(limit) = link.limits.egress {
        queue::limit(pod, (name, ifindex), limit, mtu)?;
    }
    up(pod, name, ifindex)?;
    for &addr in &link.addresses {
        let mut request = pod.netlink.address().add(ifindex, addr, host_bits(addr));
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        pod.request(|| format!("add {addr} to {name}"), request.execute())?;
        let gateway = gateway(addr);
        neighbour(pod, ifindex, gateway, link.host.mac)?;
        for route in [host_route(gateway, ifindex), default_route(gateway, ifindex)] {
            let what = || format!("add the route of {name} by {gateway}");
            pod.request(what, pod.netlink.route().add(route).execute())?;
        }
    }
    Ok(())
}

fn check_pod(pod: &Session, link: &PodLink) -> Result<(), PodError> {
    let name = &link.pod.name;
    let different = |what: String| PodError::Different(format!("{}: {what}", link.netns.display()));
    let ifindex = index(name)?.ok_or_else(|| different(format!("there is no interface {name}")))?;
    let seen = pod.request(|| "list routes and addresses".into(), kernel::list(&pod.netlink))?;
    if link.limits.egress.is_some() && !has_queue(pod, ifindex)? {
        return Err(different(format!("{name} does not limit what the pod sends")));
    }
    let defaults = pod.request(|| "list routes".into(), default_gateways(pod))?;
    for &addr in &link.addresses {
        if seen.addresses.get(&Addr::from(addr)) != Some(&ifindex) {
            return Err(different(format!("{name} does not have {addr}")));
        }
        if !defaults.contains(&(gateway(addr), ifindex)) {
            return Err(different(format!("there is no default route by {} out of {name}", gateway(addr))));
        }
    }
    Ok(())
}

fn has_queue(session: &Session, ifindex: u32) -> Result<bool, PodError> {
    let queues = session.request(|| "list queues".into(), queue::list(&session.netlink))?;
    Ok(queues.contains(&ifindex))
}

async fn default_gateways(session: &Session) -> Result<Vec<(IpAddr, u32)>, rtnetlink::Error> {
    let mut found = Vec::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for query in [v4, v6] {
        let mut routes = Box::pin(session.netlink.route().get(query).execute());
        while let Some(route) = routes.try_next().await? {
            found.extend(default_gateway(&route));
        }
    }
    Ok(found)
}

fn default_gateway(route: &RouteMessage) -> Option<(IpAddr, u32)> {
    if route.header.destination_prefix_length != 0 {
        return None;
    }
    let (mut gateway, mut out) = (None, None);
    for attribute in &route.attributes {
        if let RouteAttribute::Gateway(RouteAddress::Inet(ip)) = attribute {
            gateway = Some(IpAddr::V4(*ip));
        } else if let RouteAttribute::Gateway(RouteAddress::Inet6(ip)) = attribute {
            gateway = Some(IpAddr::V6(*ip));
        } else if let RouteAttribute::Oif(index) = attribute {
            out = Some(*index);
        }
    }
    Some((gateway?, out?))
}

fn up(session: &Session, name: &str, ifindex: u32) -> Result<(), PodError> {
    let message = LinkUnspec::new_with_index(ifindex).up().build();
    session.request(|| format!("set {name} up"), session.netlink.link().set(message).execute())
}

fn neighbour(session: &Session, ifindex: u32, addr: IpAddr, mac: Mac) -> Result<(), PodError> {
    let request = session.netlink.neighbours().add(ifindex, addr).link_layer_address(&mac.0).replace();
    session.request(|| format!("add the neighbour {addr}"), request.execute())
}

fn host_route(to: IpAddr, ifindex: u32) -> RouteMessage {
    match to {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to, 32)
            .output_interface(ifindex)
            .scope(RouteScope::Link)
            .build(),
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, 128)
            .output_interface(ifindex)
            .build(),
    }
}

fn default_route(gateway: IpAddr, ifindex: u32) -> RouteMessage {
    match gateway {
        IpAddr::V4(gateway) => {
            RouteMessageBuilder::<Ipv4Addr>::new().output_interface(ifindex).gateway(gateway).onlink().build()
        }
        IpAddr::V6(gateway) => {
            RouteMessageBuilder::<Ipv6Addr>::new().output_interface(ifindex).gateway(gateway).onlink().build()
        }
    }
}

fn host_bits(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn families(link: &PodLink) -> Vec<Family> {
    let has = |family: &Family| link.addresses.iter().any(|addr| Family::of(&Addr::from(*addr)) == *family);
    Family::ALL.into_iter().filter(has).collect()
}

/// The MTU of Ethernet, where there is no device to go by.
const ETHERNET: u32 = 1500;

fn smallest_mtu(session: &Session, devices: &[u32]) -> Result<u32, PodError> {
    let mut smallest: Option<u32> = None;
    for &device in devices {
        let listing = async { session.netlink.link().get().match_index(device).execute().try_next().await };
        let link = session.request(|| format!("read the MTU of interface {device}"), listing)?;
        let mtu = link.as_ref().and_then(mtu);
        smallest = smallest.into_iter().chain(mtu).min();
    }
    Ok(smallest.unwrap_or(ETHERNET))
}

fn mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(
        |attribute| {
            if let LinkAttribute::Mtu(mtu) = attribute { Some(*mtu) } else { None }
        },
    )
}

fn name(link: &LinkMessage) -> Option<Box<str>> {
    link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute { Some(name.as_str().into()) } else { None }
    })
}

/// In the namespace of this thread.
fn index(name: &str) -> Result<Option<u32>, PodError> {
    match if_nametoindex(name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(PodError::Kernel { what: format!("find {name}"), reason: errno.to_string() }),
    }
}

fn found(name: &str) -> Result<u32, PodError> {
    index(name)?.ok_or_else(|| PodError::Kernel {
        what: format!("find {name}"),
        reason: "it went away while it was configured".into(),
    })
}

/// Sysctls of one interface: IP version, name, value.
fn apply(settings: &[(&str, &str, &str)], interface: &str) -> Result<(), PodError> {
    settings.iter().try_for_each(|(ip, name, value)| set(&format!("{ip}/conf/{interface}/{name}"), value))
}

fn set(name: &str, value: &str) -> Result<(), PodError> {
    sysctl(name, value).map_err(|error| {
        let why = if error.kind() == ErrorKind::NotFound { " (has this kernel the protocol?)" } else { "" };
        PodError::Kernel { what: format!("set net/{name} to {value}"), reason: format!("{error}{why}") }
    })
}

/// A host that forwards no longer listens to routers, but for interfaces told to all the same (accept_ra 2): one that
/// got its own default route so must not lose it.
fn forward_v6() -> Result<(), PodError> {
    let failed = |error: std::io::Error| PodError::Kernel {
        what: "read net/ipv6/conf".into(),
        reason: error.to_string(),
    };
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}"));
    if read("all/forwarding").map_err(failed)?.trim() == "1" {
        return Ok(());
    }
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf").map_err(failed)? {
        let interface = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let listens = read(&format!("{interface}/accept_ra")).is_ok_and(|value| value.trim() == "1");
        if listens && interface != "all" {
            set(&format!("ipv6/conf/{interface}/accept_ra"), "2")?;
        }
    }
    set("ipv6/conf/all/forwarding", "1")
}
