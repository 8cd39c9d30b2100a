//! The loopback interface of a pod's network namespace, which a new namespace has down and without addresses.

use std::path::Path;

use futures_util::TryStreamExt as _;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::link::LinkFlags;

use super::netns::{Netns, Session};
use super::pod::PodError;

/// The first interface of every namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const INDEX: u32 = 1;

/// Sets it up. The kernel gives it 127.0.0.1/8 and ::1/128 with that.
///
/// # Errors
/// A namespace that cannot be entered, or is the host's; what the kernel refuses.
pub fn raise(netns: &Path) -> Result<(), PodError> {
    Netns::open(netns)?.inside(|session| {
        let up = LinkUnspec::new_with_index(INDEX).up().build();
        session.request(|| "set lo up".into(), session.netlink.link().set(up).execute())
    })
}

/// # Errors
/// As [`raise`]; [`PodError::Different`] where it is down.
pub fn check(netns: &Path) -> Result<(), PodError> {
    Netns::open(netns)?.inside(|session| {
        if is_up(session)? { Ok(()) } else { Err(PodError::Different("lo is down".into())) }
    })
}

fn is_up(session: &Session) -> Result<bool, PodError> {
    let mut links = Box::pin(session.netlink.link().get().match_index(INDEX).execute());
    let link = session.request(|| "look at lo".into(), links.try_next())?;
    Ok(link.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)))
}
