//! The link of a pod to its node, as data, and who makes it.
//!
//! ```text
//!   pod: eth0 10.244.1.5/32 fd00::5/128            node: ff…  no address
//!        default via 169.254.1.1, fe80::1  ───────       10.244.1.5/32, fd00::5/128 out of it
//!        neighbour: the gateway is the node's MAC        neighbour: the pod is the pod's MAC
//! ```
//!
//! There is no bridge, no proxy ARP and no neighbour discovery: each end has a permanent entry for the other.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ferroflow_common::hash::mix;

use super::queue::Limits;
use crate::ipam::Owner;
use crate::model::Family;

/// What kind of device it is: see [`super::device`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Veth,
    Netkit,
}

impl Kind {
    /// As the kernel calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Netkit => "netkit",
        }
    }
}

/// A link as it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    pub kind: Kind,
    pub host: End,
    pub pod: End,
    /// The pod's namespace.
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
    pub mtu: Mtu,
    pub limits: Limits,
}

/// Bytes of an IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mtu {
    Fixed(u32),
    /// The smallest of these interfaces.
    Of(Vec<u32>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub name: Box<str>,
    pub mac: Mac,
}

/// A link-layer address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A link as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wired {
    /// Of the host's end.
    pub ifindex: u32,
    pub mtu: u32,
}

impl PodLink {
    /// The link of an attachment. Its names and MACs are the same however often it is made: nobody has to remember
    /// them, and nobody who assigns MACs of new interfaces (udev) changes one that is set.
    pub fn new(owner: &Owner, netns: PathBuf, addresses: Vec<IpAddr>, mtu: Mtu) -> Self {
        Self {
            kind: Kind::Veth,
            host: End { name: host_interface(owner), mac: mac(owner, 1) },
            pod: End { name: owner.ifname.clone(), mac: mac(owner, 2) },
            netns,
            addresses,
            mtu,
            limits: Limits::default(),
        }
    }

    #[must_use]
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    #[must_use]
    pub fn kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }
}

/// The host's end of an attachment's link: 14 of the 15 bytes that a name may have, 48 bits of them from a hash.
pub fn host_interface(owner: &Owner) -> Box<str> {
    format!("{PREFIX}{:012x}", digest(owner, 0) >> 16).into()
}

/// What the names of our interfaces begin with.
const PREFIX: &str = "ff";

fn mac(owner: &Owner, end: u64) -> Mac {
    let [a, b, c, d, e, ..] = digest(owner, end).to_be_bytes();
    // Locally administered, and no group.
    Mac([0x02, a, b, c, d, e])
}

fn digest(owner: &Owner, seed: u64) -> u64 {
    let Owner { container_id, ifname } = owner;
    [container_id, ifname].into_iter().fold(seed, |state, text| {
        // Before the text goes its length, so that no two owners have the same words.
        let words = text.as_bytes().chunks(8).map(|chunk| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(chunk) {
                *to = *from;
            }
            u64::from_le_bytes(word)
        });
        words.fold(mix(state, text.len() as u64), mix)
    })
}

/// The next hop of a pod, of its address's family: link-local, so that it is the same everywhere and no pod's.
pub fn gateway(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(_) => Ipv4Addr::new(169, 254, 1, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// The kernel's network, as far as pods need it. Calls block.
pub trait Netlink: fmt::Debug + Send + Sync + 'static {
    /// Makes a link; on an error there is none.
    ///
    /// # Errors
    /// [`PodError`].
    fn attach(&self, link: &PodLink) -> Result<Wired, PodError>;

    /// Removes the link with this host interface, which need not be there.
    ///
    /// # Errors
    /// [`PodError::Kernel`].
    fn detach(&self, host: &str) -> Result<(), PodError>;

    /// Compares; changes nothing.
    ///
    /// # Errors
    /// [`PodError::Different`] with what is not as in `link`.
    fn check(&self, link: &PodLink) -> Result<Wired, PodError>;

    /// The host's interfaces of those links that are there, but without the routes to their pods.
    ///
    /// # Errors
    /// [`PodError::Kernel`].
    fn astray(&self, links: &[PodLink]) -> Result<BTreeMap<Box<str>, u32>, PodError>;

    /// Makes the routes to the pod of such a link again.
    ///
    /// # Errors
    /// [`PodError::Kernel`].
    fn mend(&self, link: &PodLink, ifindex: u32) -> Result<(), PodError>;

    /// The host's interfaces: index by name.
    ///
    /// # Errors
    /// [`PodError::Kernel`].
    fn interfaces(&self) -> Result<BTreeMap<Box<str>, u32>, PodError>;

    /// Makes the host forward packets of these families.
    ///
    /// # Errors
    /// [`PodError::Kernel`].
    fn forward(&self, families: &[Family]) -> Result<(), PodError>;
}

#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("the network namespace {path} cannot be entered: {source}")]
    NoNetns { path: PathBuf, source: io::Error },
    #[error("{path} is the network namespace of the host: a pod has one of its own")]
    HostNetns { path: PathBuf },
    #[error("the interface {name} exists already in {netns}")]
    Exists { name: Box<str>, netns: PathBuf },
    #[error("{what}: {reason}")]
    Kernel { what: String, reason: String },
    #[error("{0}")]
    Different(String),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_macs_are_steady_and_distinct() {
        let owner = |id: &str, ifname: &str| Owner { container_id: id.into(), ifname: ifname.into() };
        let long = "0123456789abcdef".repeat(4);
        let owners = [
            owner("a", "eth0"),
            owner("a", "eth1"),
            owner("ae", "th0"),
            owner("", "aeth0"),
            owner(&long, "eth0"),
            owner(&long[1..], "eth0"),
        ];
        let names: BTreeSet<_> = owners.iter().map(host_interface).collect();
        assert_eq!(names.len(), owners.len());
        assert!(names.iter().all(|name| name.len() == 14 && name.starts_with("ff")), "{names:?}");
        let link = PodLink::new(&owners[0], "/run/netns/a".into(), Vec::new(), Mtu::Fixed(1500));
        assert_eq!(link, PodLink::new(&owners[0], "/run/netns/a".into(), Vec::new(), Mtu::Fixed(1500)));
        assert_ne!(link.host.mac, link.pod.mac);
        assert_eq!(link.pod.mac.0[0], 0x02);
        assert_eq!(Mac([2, 0, 0, 0, 0, 0xab]).to_string(), "02:00:00:00:00:ab");
        // An agent of another version must find what this one made.
        assert_eq!(&*host_interface(&owners[0]), "ff85b37400b106");
    }
}
