//! Packets that go to another node as they are: into the tunnel, and out of it.

use core::mem::transmute;
use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, bpf_tunnel_key};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_get_tunnel_key};
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::relay::{NodeNumber, Relay, SENDER_MAC};
use ferroflow_common::abi::tunnel::{DEVICE_MAC, Tunnel};
use ferroflow_common::addr::Addr;
use ferroflow_common::family::{Family as _, V6};
use ferroflow_common::verdict::DropReason;
use ferroflow_ebpf::packet::Packet as _;
use ferroflow_ebpf::service::Origin;
use ferroflow_ebpf::tables::Services as _;

use crate::maps::Kernel;
use crate::mtu;
use crate::skb::{Mark, Skb};
use crate::tc::shot;
use crate::tunnel::{self, SIZE};

/// Sends the packet to the node, or tells its sender that it is too long for that.
#[inline(always)]
pub(crate) fn send(skb: &mut Skb, node: NodeNumber) -> i32 {
    let done = relay(skb.0.as_ptr().cast(), node);
    if done & TOO_LONG != 0 { mtu::answer_back(skb, done as u32) } else { done as i32 }
}

/// With how much there is room for.
const TOO_LONG: u64 = 1 << 32;

/// A global function, as the [steps](crate::steps) are: what the program returns, or [`TOO_LONG`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn relay(skb: *mut __sk_buff, node: u32) -> u64 {
    // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
    let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    let Relay { device, room, vni } = Kernel.relay();
    if device != 0 && u32::from(skb.longest()) > room {
        return TOO_LONG | u64::from(room);
    }
    if device == 0 || into_tunnel(&mut skb, node, vni).is_err() {
        return shot(DropReason::RelayFailed) as u64;
    }
    skb.tell(Mark::ADDRESSED);
    // SAFETY: the helper takes numbers and checks them.
    (unsafe { bpf_redirect(device, 0) }) as u64
}

#[inline(always)]
fn into_tunnel(skb: &mut Skb, node: NodeNumber, vni: u32) -> Result<(), DropReason> {
    let node = Kernel.node(node).ok_or(DropReason::RelayFailed)?;
    let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (DEVICE_MAC, SENDER_MAC);
    skb.write(0, &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5])?;
    tunnel::address(skb, &Tunnel { node, vni })
}

/// Where the sender stands in the Ethernet header, and how it begins where it relays.
const SENDER: u32 = 6;
const RELAYED: u32 = u32::from_ne_bytes([SENDER_MAC[0], SENDER_MAC[1], SENDER_MAC[2], SENDER_MAC[3]]);

/// Whether a packet out of the tunnel is a relayed one, by what it says of itself.
#[inline(always)]
fn is_relayed(skb: &Skb) -> bool {
    skb.words(SENDER).is_some_and(|[word]: [u32; 1]| word == RELAYED)
}

/// What [`Origin::Relay`] has more than [`Origin::Tunnel`].
const RELAY_BIT: u32 = Origin::Relay as u32 ^ Origin::Tunnel as u32;
const _: () = assert!(RELAY_BIT == 1 && Origin::Relay as u32 > Origin::Tunnel as u32);

/// Whose a packet is that comes out of the tunnel.
///
/// # Errors
/// [`DropReason::StrangeRelay`] where no node of the cluster has the address that it comes from.
#[inline(always)]
pub(crate) fn origin(skb: &Skb) -> Result<Origin, DropReason> {
    let is_relayed = is_relayed(skb);
    if is_relayed && is_from_node(skb) == 0 {
        return Err(DropReason::StrangeRelay);
    }
    // What the verifier knew it would follow all the way, once for each of the two.
    let relayed = skb.forget(u32::from(is_relayed)) & RELAY_BIT;
    // SAFETY: the number of the one or of the other.
    Ok(unsafe { transmute::<u32, Origin>(Origin::Tunnel as u32 | relayed) })
}

/// Whether a node of the cluster sent the packet; 0 where not. One that came by no tunnel is a copy that a program has
/// sent round: what the device decapsulates always says where it comes from.
#[inline(never)]
fn is_from_node(skb: &Skb) -> u32 {
    // SAFETY: plain numbers; zero is a valid value of every field.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let context = skb.0.as_ptr().cast::<__sk_buff>();
    // SAFETY: the helper writes `SIZE` bytes of the key, or fails.
    if unsafe { bpf_skb_get_tunnel_key(context, &raw mut key, SIZE, 0) } == 0 {
        // SAFETY: the member of the union that the helper wrote; any bytes are a number.
        let from = unsafe { key.__bindgen_anon_1.remote_ipv4 };
        return u32::from(Kernel.is_peer(&Addr::v4(from.to_be_bytes())));
    }
    // SAFETY: as above.
    if unsafe { bpf_skb_get_tunnel_key(context, &raw mut key, SIZE, u64::from(BPF_F_TUNINFO_IPV6)) } == 0 {
        // SAFETY: as above.
        let from = unsafe { key.__bindgen_anon_1.remote_ipv6 };
        return u32::from(Kernel.is_peer(&V6::addr(V6::from_words(from))));
    }
    1
}
