//! Packets that go to another node as they are: into the tunnel, and out of it.

use core::mem::transmute;
use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, bpf_tunnel_key};
use aya_ebpf::helpers::generated::bpf_skb_get_tunnel_key;
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::relay::{NodeNumber, Relay, SENDER_MAC};
use ferroflow_common::abi::tunnel::Tunnel;
use ferroflow_common::addr::Addr;
use ferroflow_common::family::{Family as _, V6};
use ferroflow_common::verdict::DropReason;
use ferroflow_ebpf::packet::Packet as _;
use ferroflow_ebpf::service::Origin;
use ferroflow_ebpf::tables::Services as _;

use crate::maps::Kernel;
use crate::mtu;
use crate::skb::Skb;
use crate::tc::shot;
use crate::tunnel::{Entered, Entrance, SIZE};

/// Sends the packet to the node, or tells its sender that it is too long for that.
#[inline(always)]
pub(crate) fn send(skb: &mut Skb, node: NodeNumber) -> i32 {
    match Entrance(relay(skb.0.as_ptr().cast(), node)).enter(skb) {
        Entered::Gone(action) => action,
        Entered::TooLong(room) => mtu::answer_back(skb, room),
        Entered::Not => shot(DropReason::RelayFailed),
    }
}

/// A global function, as the [steps](crate::steps) are: an [`Entrance`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn relay(skb: *mut __sk_buff, node: u32) -> u64 {
    // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
    let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    let Relay { device, room, vni } = Kernel.relay();
    let Some(node) = Kernel.node(node) else { return 0 };
    if device == 0 {
        return 0;
    }
    let length = u32::from(skb.longest());
    Entrance::ready(&mut skb, &Tunnel { node, vni, device, room }, SENDER_MAC, length).0
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
