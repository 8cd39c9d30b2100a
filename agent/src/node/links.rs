//! The links of the network namespace that this runs in, by netlink: what is mounted at /sys may show another's.

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Error, Handle, new_connection};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
}

/// A link as it is.
pub(super) struct Seen {
    pub(super) link: Link,
    /// Bytes.
    pub(super) mtu: u32,
    pub(super) role: Role,
}

/// Who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The host's end of a pod's that we attached: `ff` and twelve hexadecimal digits.
    OurPod,
    /// One end of a pair of others.
    Pair,
    /// It is up, and no loopback.
    Device,
    Other,
}

/// # Errors
/// What netlink refuses.
pub(super) fn all() -> Result<Vec<Seen>, LinksError> {
    in_session("list interfaces", async |handle| {
        let mut messages = Box::pin(handle.link().get().execute());
        let mut found = Vec::new();
        while let Some(message) = messages.try_next().await? {
            found.extend(seen(&message));
        }
        Ok(found)
    })
}

fn seen(message: &LinkMessage) -> Option<Seen> {
    let (mut name, mut mtu, mut pair) = (None, 0, false);
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(text) = attribute {
            name = Some(text.clone());
        } else if let LinkAttribute::Mtu(bytes) = attribute {
            mtu = *bytes;
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            let kind = |info: &LinkInfo| matches!(info, LinkInfo::Kind(InfoKind::Veth | InfoKind::Netkit));
            pair = infos.iter().any(kind);
        }
    }
    let name = name?;
    let flags = message.header.flags;
    let role = if pair && is_pod_name(&name) {
        Role::OurPod
    } else if pair {
        Role::Pair
    } else if flags.contains(LinkFlags::Up) && !flags.contains(LinkFlags::Loopback) {
        Role::Device
    } else {
        Role::Other
    };
    Some(Seen { link: Link { index: message.header.index, name }, mtu, role })
}

fn is_pod_name(name: &str) -> bool {
    let digits = name.strip_prefix("ff").unwrap_or_default();
    digits.len() == 12 && digits.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'))
}

/// Does some work with netlink, and says what it was where it fails.
pub(super) fn in_session<T>(
    what: &str,
    work: impl AsyncFnOnce(Handle) -> Result<T, Error>,
) -> Result<T, LinksError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(LinksError::Socket)?.block_on(async {
        let (connection, handle, _) = new_connection().map_err(LinksError::Socket)?;
        let connection = tokio::spawn(connection);
        let done = work(handle).await;
        connection.abort();
        done.map_err(|source| LinksError::Netlink { what: what.to_owned(), source })
    })
}

#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    #[error("cannot {what}: {source}")]
    Netlink { what: String, source: Error },
    #[error("cannot open a netlink socket: {0}")]
    Socket(std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pod_links_are_told_from_others() {
        assert!(is_pod_name("ff0123456789ab"));
        for other in ["ff01234", "ff0123456789aB", "fg0123456789ab", "eth0", "ff0123456789abc"] {
            assert!(!is_pod_name(other), "{other}");
        }
    }
}
