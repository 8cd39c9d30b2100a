//! Features of network devices, over the generic netlink family `ethtool` (kernel 5.7 and newer).

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// Turns a feature off, by its name in `ethtool --show-features`, in the namespace of the calling thread.
pub fn turn_off(dev: &str, feature: &str) -> Result<()> {
    let mut socket = Socket::new(NETLINK_GENERIC).context("open generic netlink")?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;

    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"ethtool\0");
    let family =
        request(&socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name).context("find the family ethtool")?;
    let family = find(&family, CTRL_ATTR_FAMILY_ID).context("the family ethtool has no id")?;
    let family = u16::from_ne_bytes(family.try_into()?);

    let header = nested(HEADER, &attribute(HEADER_DEV_NAME, &terminated(dev)));
    // A bit that is listed without a value is to become 0.
    let bit = nested(BITS_BIT, &attribute(BIT_NAME, &terminated(feature)));
    let wanted = nested(FEATURES_WANTED, &nested(BITSET_BITS, &bit));
    request(&socket, family, MSG_FEATURES_SET, &[header, wanted].concat())
        .with_context(|| format!("turn {feature} of {dev} off"))?;
    Ok(())
}

/// Sends a request; returns the attributes of the answer, if there is one beside the acknowledgement.
fn request(socket: &Socket, family: u16, command: u8, attributes: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(MESSAGE_HEADER + COMMAND_HEADER + attributes.len())?;
    let mut message = Vec::new();
    message.extend(len.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    // Sequence number and port: one request at a time.
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    socket.send(&message, 0)?;

    let mut answer = Vec::new();
    loop {
        let (packet, _) = socket.recv_from_full()?;
        let mut rest = packet.as_slice();
        while let Some((kind, body, next)) = split_message(rest) {
            if kind == NLMSG_ERROR {
                let code = body.get(..4).context("a short acknowledgement")?;
                return match i32::from_ne_bytes(code.try_into()?) {
                    0 => Ok(answer),
                    code => bail!("{}", Errno::from_raw(-code)),
                };
            }
            answer = body.get(COMMAND_HEADER..).unwrap_or_default().to_vec();
            rest = next;
        }
        ensure!(rest.is_empty(), "netlink sent half a message");
    }
}

/// Kind and body of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let next = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, bytes.get(MESSAGE_HEADER..len)?, next))
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        if kind == wanted {
            return attributes.get(4..len.into());
        }
        attributes = attributes.get(usize::from(len).max(4).next_multiple_of(4)..)?;
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // Names of devices and features: a few dozen bytes.
    let len = (4 + value.len()) as u16;
    let mut bytes = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, attributes)
}

fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

// linux/netlink.h, linux/genetlink.h
const MESSAGE_HEADER: usize = 16;
const COMMAND_HEADER: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

// linux/ethtool_netlink.h
const MSG_FEATURES_SET: u8 = 12;
const HEADER: u16 = 1;
const HEADER_DEV_NAME: u16 = 2;
const FEATURES_WANTED: u16 = 3;
const BITSET_BITS: u16 = 3;
const BITS_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
