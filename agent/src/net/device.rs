//! Devices of pods: a pair of ends, of which the far one is made inside the pod's namespace.
//!
//! | kind | what a pod sends | kernel |
//! | --- | --- | --- |
//! | veth | waits in a queue of the CPU, then meets the program at the host's end | any |
//! | netkit | meets the program in the pod's own transmission, and leaves from there | 6.7, commit 35dfaad7188c |
//!
//! A netkit is made in mode L2, so that frames are those of a veth, and drops what the pod sends as long as there is no
//! program in its transmission.

use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoNetkit, InfoVeth, LinkMessage, NetkitMode, NetkitPolicy};
use rtnetlink::{Error, LinkMessageBuilder, LinkNetkit, LinkUnspec, LinkVeth};

use super::netns::{Netns, Session};
use super::pod::{End, Kind, Mac, PodError, PodLink};

/// Down at first: what must hold from the first packet on is set before it is up.
pub(super) fn add(host: &Session, link: &PodLink, mtu: u32, netns: &Netns) -> Result<(), PodError> {
    let End { name, mac: Mac(mac) } = &link.pod;
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(&**name)
        .address(mac.to_vec())
        .mtu(mtu)
        .setns_by_fd(netns.fd())
        .build();
    let End { name: host_name, mac: Mac(host_mac) } = &link.host;
    let host_mac = host_mac.to_vec();
    let message = match link.kind {
        Kind::Veth => LinkVeth::new(host_name, name)
            .address(host_mac)
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build(),
        Kind::Netkit => LinkNetkit::new(host_name, name, NetkitMode::L2)
            .address(host_mac)
            .mtu(mtu)
            .set_info_data(netkit(peer))
            .build(),
    };
    let what = || format!("add the {} {host_name} with {name} in {}", link.kind.name(), link.netns.display());
    host.request(what, host.netlink.link().add(message).execute())
}

fn netkit(peer: LinkMessage) -> InfoData {
    InfoData::Netkit(vec![
        InfoNetkit::Mode(NetkitMode::L2),
        InfoNetkit::PeerPolicy(NetkitPolicy::Drop),
        InfoNetkit::Peer(peer),
    ])
}

/// Whether this kernel has netkit: one is made in a network namespace of its own, and is gone with that.
///
/// # Errors
/// [`PodError::Kernel`] where it cannot be found out.
pub fn has_netkit() -> Result<bool, PodError> {
    let failed = |reason: String| PodError::Kernel { what: "look for netkit".into(), reason };
    let look = move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.to_string()))?;
        let session = Session::open()?;
        let message = LinkNetkit::new("netkit0", "netkit1", NetkitMode::L2).build();
        match session.wait(session.netlink.link().add(message).execute()) {
            Ok(()) => Ok(true),
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::EOPNOTSUPP => Ok(false),
            Err(error) => Err(failed(error.to_string())),
        }
    };
    // A thread is in one namespace, and this one ends with the look.
    let thread = std::thread::Builder::new().name("netkit".into()).spawn(look);
    match thread.map_err(|error| failed(error.to_string()))?.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
