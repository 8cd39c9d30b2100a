//! Packets as they are, whatever their headers say.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use ferroflow_ebpf::frame::Frame;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

use crate::{cluster::Family, netns::Netns};

/// Sends IP packets of one family from a namespace.
#[derive(Debug)]
pub struct Raw(OwnedFd);

impl Raw {
    pub fn new(netns: &Netns, family: Family) -> Result<Self> {
        let family = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let open = move |_: &_| socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw);
        Ok(Self(netns.run(open)?.context("open a raw socket")?))
    }

    /// What is behind the frame's Ethernet header.
    pub fn send(&self, frame: &Frame) -> Result<()> {
        let to = SockaddrStorage::from(SocketAddr::new(frame.dst.ip(), 0));
        sendto(self.0.as_raw_fd(), &frame.build()[14..], &to, MsgFlags::empty()).context("send a packet")?;
        Ok(())
    }
}
