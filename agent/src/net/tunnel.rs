//! The device that carries packets to other nodes in VXLAN.
//!
//! There is one, whatever the number of nodes: it has no network identifier and no peer of its own (it "collects
//! metadata"), and the programs say for each packet where it goes. It outlives the agent, with its routes and programs.

use std::net::Ipv4Addr;

use ferroflow_common::abi::tunnel::DEVICE_MAC;
use futures_util::TryStreamExt as _;
use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};
use rtnetlink::packet_route::address::AddressScope;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::netns::sysctl;
use crate::model::TunnelLink;

/// As long as a name may be, and not one that pods' interfaces have.
pub const NAME: &str = "ferroflow-vxlan";

/// As it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// UDP.
    pub port: u16,
    /// The interfaces that what it sends leaves by.
    pub devices: Vec<u32>,
    /// How many bytes less than theirs its own packets may have.
    pub overhead: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("cannot {what} {NAME}: {source}")]
    Netlink { what: &'static str, source: rtnetlink::Error },
    #[error(
        "cannot add {NAME}: UDP port {port} is another tunnel's: name a free one with --vxlan-port, on every node"
    )]
    Port { port: u16 },
    #[error("cannot set net/{name}: {source}")]
    Sysctl { name: String, source: std::io::Error },
    #[error("{NAME} went away while it was configured")]
    Gone,
}

/// What the smallest devices of IPv6 have (RFC 8200 section 5).
const LEAST_MTU: u32 = 1280;

/// The MTU of Ethernet, where there is no device to go by.
const ETHERNET: u32 = 1500;

/// Makes the device so, or removes it where none is wanted; what it is then. One that is as it should be is not touched.
pub(super) async fn make(
    netlink: &Handle,
    wanted: Option<&TunnelDevice>,
) -> Result<Option<TunnelLink>, TunnelError> {
    let found = find(netlink).await?;
    let Some(wanted) = wanted else {
        if let Some(link) = found {
            remove(netlink, &link).await?;
        }
        return Ok(None);
    };
    let mtu = mtu(netlink, wanted).await?;
    let link = match found {
        Some(link) if carries(&link, wanted.port) => link,
        other => {
            if let Some(link) = other {
                remove(netlink, &link).await?;
            }
            add(netlink, wanted.port, mtu).await?;
            find(netlink).await?.ok_or(TunnelError::Gone)?
        }
    };
    let ifindex = link.header.index;
    let is_mtu = |it: &LinkAttribute| *it == LinkAttribute::Mtu(mtu);
    if !link.attributes.iter().any(is_mtu) || !link.header.flags.contains(LinkFlags::Up) {
        configure()?;
        let message = LinkUnspec::new_with_index(ifindex).mtu(mtu).arp(false).up().build();
        let set = netlink.link().set(message).execute().await;
        set.map_err(|source| TunnelError::Netlink { what: "set up", source })?;
        add_address(netlink, ifindex).await?;
    }
    wanted.devices.iter().try_for_each(|device| loosen(*device))?;
    Ok(Some(TunnelLink { ifindex, mtu }))
}

async fn find(netlink: &Handle) -> Result<Option<LinkMessage>, TunnelError> {
    match if_nametoindex(NAME) {
        Err(Errno::ENODEV) => Ok(None),
        // Whatever else it says, the listing says it better.
        Ok(_) | Err(_) => {
            let mut links = Box::pin(netlink.link().get().match_name(NAME.to_owned()).execute());
            let found = links.try_next().await;
            found.map_err(|source| TunnelError::Netlink { what: "look for", source })
        }
    }
}

async fn remove(netlink: &Handle, link: &LinkMessage) -> Result<(), TunnelError> {
    let removed = netlink.link().del(link.header.index).execute().await;
    removed.map_err(|source| TunnelError::Netlink { what: "remove", source })
}

async fn add(netlink: &Handle, port: u16, mtu: u32) -> Result<(), TunnelError> {
    let message = LinkMessageBuilder::<LinkVxlan>::new(NAME)
        .collect_metadata(true)
        .learning(false)
        .port(port)
        .address(DEVICE_MAC.to_vec())
        .mtu(mtu)
        .build();
    let added = netlink.link().add(message).execute().await;
    added.map_err(|source| {
        let taken = matches!(&source, rtnetlink::Error::NetlinkError(message)
            if matches!(message.to_io().raw_os_error(), Some(libc::EEXIST | libc::EADDRINUSE)));
        if taken { TunnelError::Port { port } } else { TunnelError::Netlink { what: "add", source } }
    })
}

fn carries(link: &LinkMessage, port: u16) -> bool {
    let infos = link.attributes.iter().filter_map(|attribute| {
        if let LinkAttribute::LinkInfo(infos) = attribute { Some(infos) } else { None }
    });
    let infos: Vec<_> = infos.flatten().collect();
    let data = infos
        .iter()
        .find_map(|info| if let LinkInfo::Data(InfoData::Vxlan(data)) = info { Some(data) } else { None });
    let address = LinkAttribute::Address(DEVICE_MAC.to_vec());
    infos.iter().any(|info| **info == LinkInfo::Kind(InfoKind::Vxlan))
        && link.attributes.contains(&address)
        && data.is_some_and(|data| {
            data.contains(&InfoVxlan::Port(port)) && data.contains(&InfoVxlan::CollectMetadata(true))
        })
}

async fn mtu(netlink: &Handle, wanted: &TunnelDevice) -> Result<u32, TunnelError> {
    let mut smallest: Option<u32> = None;
    for &device in &wanted.devices {
        let mut links = Box::pin(netlink.link().get().match_index(device).execute());
        let link = links.try_next().await;
        let link = link.map_err(|source| TunnelError::Netlink { what: "find the MTU of", source })?;
        let of_link = link
            .iter()
            .flat_map(|link| &link.attributes)
            .find_map(|attribute| if let LinkAttribute::Mtu(mtu) = attribute { Some(*mtu) } else { None });
        smallest = smallest.into_iter().chain(of_link).min();
    }
    Ok(smallest.unwrap_or(ETHERNET).saturating_sub(wanted.overhead).max(LEAST_MTU))
}

/// Without any address of its own a device has a strict reverse path filter even where it was told to have a loose one
/// (`fib_validate_source`). Nobody sends to this one, which is the same on every node.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);

async fn add_address(netlink: &Handle, ifindex: u32) -> Result<(), TunnelError> {
    let mut request = netlink.address().add(ifindex, ADDRESS.into(), 32);
    // No source of packets to anybody else.
    request.message_mut().header.scope = AddressScope::Link;
    match request.execute().await {
        Err(rtnetlink::Error::NetlinkError(message))
            if message.to_io().raw_os_error() == Some(libc::EEXIST) =>
        {
            Ok(())
        }
        added => added.map_err(|source| TunnelError::Netlink { what: "add an address to", source }),
    }
}

/// What pods answer to other nodes' hosts comes by the device itself, and the route to the pods leads into the tunnel:
/// a strict reverse path filter would drop it.
fn loosen(device: u32) -> Result<(), TunnelError> {
    let Ok(device) = if_indextoname(device) else { return Ok(()) };
    let filter = |conf: &str| {
        let value = std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{conf}/rp_filter"));
        value.ok().and_then(|value| value.trim().parse::<u8>().ok())
    };
    let device = device.to_string_lossy();
    if filter("all").max(filter(&device)) == Some(STRICT) {
        let name = format!("ipv4/conf/{device}/rp_filter");
        sysctl(&name, "2").map_err(|source| TunnelError::Sysctl { name, source })?;
    }
    Ok(())
}

/// Of `rp_filter`: the larger of `all` and the device's own is in force, and 2 is loose.
const STRICT: u8 = 1;

/// Packets of other nodes' hosts come through it, whose own addresses are elsewhere: a strict reverse path filter
/// would drop them, and `all` outdoes a 0 here, but not a 2.
fn configure() -> Result<(), TunnelError> {
    let settings = [
        format!("ipv4/conf/{NAME}/rp_filter=2"),
        format!("ipv4/conf/{NAME}/forwarding=1"),
        format!("ipv6/conf/{NAME}/addr_gen_mode=1"),
        format!("ipv6/conf/{NAME}/accept_ra=0"),
        format!("ipv6/conf/{NAME}/disable_ipv6=0"),
        format!("ipv6/conf/{NAME}/forwarding=1"),
    ];
    for setting in settings {
        let Some((name, value)) = setting.split_once('=') else { continue };
        match sysctl(name, value) {
            // A kernel without IPv6 has no routes of it either.
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(TunnelError::Sysctl { name: name.into(), source });
            }
            _ => {}
        }
    }
    Ok(())
}
