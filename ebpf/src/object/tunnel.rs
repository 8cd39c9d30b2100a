//! The programs on the tunnel's device, which carries packets between nodes in VXLAN.

use core::mem::offset_of;
use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, TC_ACT_UNSPEC, bpf_tunnel_key};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_set_tunnel_key};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::tunnel::{NodeTunnel, Tunnel};
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
        verdict => action(&skb, verdict),
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
    action(&skb, verdict)
}

/// Into the tunnel with what a pod says to another node itself; all else goes on as it goes.
#[inline(always)]
pub(crate) fn turn_to_node(skb: &mut Skb) -> i32 {
    let device = addressed_to_node(skb.0.as_ptr().cast());
    if device == 0 {
        return TC_ACT_UNSPEC;
    }
    if device == FAILED {
        return shot(DropReason::NoTunnel);
    }
    skb.tell(Mark::ADDRESSED);
    // SAFETY: the helper takes numbers and checks them.
    (unsafe { bpf_redirect(device, 0) }) as i32
}

/// The kernel refused; no interface has the number.
const FAILED: u32 = u32::MAX;

/// A global function, as the [steps](crate::steps) are: the tunnel's device, for which the packet is ready then; 0 where it is
/// not for that, [`FAILED`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn addressed_to_node(skb: *mut __sk_buff) -> u32 {
    // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
    let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    let Some(NodeTunnel { end, device }) = tunnel::towards_node(&skb, &Kernel) else { return 0 };
    if tunnel::dress(&mut skb).and_then(|()| address(&skb, &end)).is_err() {
        return FAILED;
    }
    device
}

#[inline(never)]
fn encapsulate(skb: &mut Skb) -> Result<(), DropReason> {
    let end = tunnel::leaving(skb, &Kernel)?;
    address(skb, &end)
}

/// Says where the tunnel's device is to send the packet.
///
/// # Errors
/// [`DropReason::NoTunnel`] where the kernel refuses.
#[inline(always)]
pub(crate) fn address(skb: &Skb, &Tunnel { node, vni }: &Tunnel) -> Result<(), DropReason> {
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
