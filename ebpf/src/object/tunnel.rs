//! The programs on the tunnel's device, which carries packets between nodes in VXLAN.

use core::mem::offset_of;
use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, TC_ACT_UNSPEC, bpf_tunnel_key};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_set_tunnel_key};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::tunnel::{SENDER_MAC, Tunnel};
use ferroflow_common::verdict::{DropReason, Verdict};
use ferroflow_ebpf::{device, pod, tunnel};

use crate::maps::Kernel;
use crate::relay;
use crate::skb::{Mark, Skb};
use crate::tc::{action, shot};

/// TC egress on the tunnel's device: as on any other of the node, and then to which node.
#[classifier]
pub(crate) fn tunnel_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    let mark = skb.told();
    if mark == Mark::ADDRESSED {
        skb.tell(Mark::FINISHED);
        return TC_ACT_UNSPEC;
    }
    let verdict = if mark == Mark::FINISHED { Ok(Verdict::Stack) } else { pod::entering(&mut skb, &Kernel) };
    match verdict {
        Ok(Verdict::Stack) => match encapsulate(&mut skb) {
            Ok(()) => {
                // So it is for the program at the device that the outer packet leaves by.
                skb.tell(Mark::FINISHED);
                TC_ACT_UNSPEC
            }
            Err(reason) => shot(reason),
        },
        verdict => action(&mut skb, verdict),
    }
}

/// TC ingress on the tunnel's device: what other nodes send.
#[classifier]
pub(crate) fn tunnel_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    // As on any other device.
    let _of_its_sender = skb.told();
    let origin = match relay::origin(&skb) {
        Ok(origin) => origin,
        Err(reason) => return shot(reason),
    };
    let verdict = device::arriving_from(&mut skb, &Kernel, origin);
    action(&mut skb, verdict)
}

/// Into the tunnel with what a pod says to another node itself; all else goes on as it goes.
#[inline(always)]
pub(crate) fn turn_to_node(skb: &mut Skb) -> i32 {
    // What is too long is carried in fragments: it was routed, and its sender has been told of a narrow way there.
    match Entrance(to_node(skb.0.as_ptr().cast())).enter(skb) {
        Entered::Gone(action) => action,
        Entered::TooLong(_) | Entered::Not => TC_ACT_UNSPEC,
    }
}

/// Into the tunnel with what is for a pod of another node.
#[inline(always)]
pub(crate) fn to_pods(skb: &mut Skb) -> Entered {
    Entrance(to_pod(skb.0.as_ptr().cast())).enter(skb)
}

/// What became of a packet that may be one for the tunnel.
pub(crate) enum Entered {
    /// What the program returns.
    Gone(i32),
    /// With how much there is room for.
    TooLong(u32),
    Not,
}

/// Whether a packet is ready for the tunnel, in one register: the tunnel's device, or 0 where it is not for one.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Entrance(pub(crate) u64);

impl Entrance {
    const NONE: Self = Self(0);
    const TOO_LONG: u64 = 1 << 32;
    /// The kernel refused.
    const FAILED: u64 = 2 << 32;

    /// Readies the packet for the way; `sender` is what stands in its Ethernet header then.
    #[inline(always)]
    pub(crate) fn ready(skb: &mut Skb, way: &Tunnel, sender: [u8; 6], length: u32) -> Self {
        if length > way.room {
            return Self(Self::TOO_LONG | u64::from(way.room));
        }
        if tunnel::dress(skb, sender).and_then(|()| address(skb, way)).is_err() {
            return Self(Self::FAILED);
        }
        Self(u64::from(way.device))
    }

    #[inline(always)]
    pub(crate) fn enter(self, skb: &Skb) -> Entered {
        if self.0 & Self::TOO_LONG != 0 {
            return Entered::TooLong(self.0 as u32);
        }
        if self.0 & Self::FAILED != 0 {
            return Entered::Gone(shot(DropReason::NoTunnel));
        }
        if self.0 == 0 {
            return Entered::Not;
        }
        skb.tell(Mark::ADDRESSED);
        // SAFETY: the helper takes numbers and checks them.
        Entered::Gone((unsafe { bpf_redirect(self.0 as u32, 0) }) as i32)
    }
}

/// Global functions, as the [steps](crate::steps) are: each an [`Entrance`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn to_node(skb: *mut __sk_buff) -> u64 {
    // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
    let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    let Some(way) = tunnel::towards_node(&skb, &Kernel) else { return Entrance::NONE.0 };
    Entrance::ready(&mut skb, &way, SENDER_MAC, 0).0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn to_pod(skb: *mut __sk_buff) -> u64 {
    // SAFETY: as above.
    let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    match tunnel::way(&skb, &Kernel) {
        Some(way) if way.device != 0 => {
            let length = u32::from(skb.longest());
            Entrance::ready(&mut skb, &way, SENDER_MAC, length).0
        }
        _ => Entrance::NONE.0,
    }
}

#[inline(never)]
fn encapsulate(skb: &mut Skb) -> Result<(), DropReason> {
    let way = tunnel::way(skb, &Kernel).ok_or(DropReason::NoTunnel)?;
    tunnel::dress(skb, SENDER_MAC)?;
    address(skb, &way)
}

/// Says where the tunnel's device is to send the packet.
///
/// # Errors
/// [`DropReason::NoTunnel`] where the kernel refuses.
#[inline(always)]
fn address(skb: &Skb, &Tunnel { node, vni, .. }: &Tunnel) -> Result<(), DropReason> {
    // SAFETY: plain numbers; zero is a valid value of every field, and the kernel's of those that are not set.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni;
    key.tunnel_ttl = TTL;
    // Over IPv4 the checksum is left out, as the kernel does by itself: what is inside has its own (RFC 7348 section
    // 5). Over IPv6 receivers do not take that without being told to (RFC 6936).
    let flags = if node.is_v4() {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(node.v4_bytes());
        BPF_F_ZERO_CSUM_TX
    } else {
        key.__bindgen_anon_1.remote_ipv6 = node.words();
        BPF_F_TUNINFO_IPV6
    };
    let context = skb.0.as_ptr().cast::<__sk_buff>();
    // SAFETY: the helper reads `SIZE` bytes of the key.
    let error = unsafe { bpf_skb_set_tunnel_key(context, &raw mut key, SIZE, u64::from(flags)) };
    if error == 0 { Ok(()) } else { Err(DropReason::NoTunnel) }
}

/// What the key of kernels before 6.0 has; later ones take it too.
pub(crate) const SIZE: u32 = offset_of!(bpf_tunnel_key, __bindgen_anon_3) as u32;

/// Of the outer header.
const TTL: u8 = 64;
