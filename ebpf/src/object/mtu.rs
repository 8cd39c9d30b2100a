//! Telling the sender of a packet that it is too long for the way on.

use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::programs::TcContext;
use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_ebpf::mtu;
use ferroflow_ebpf::packet::Packet as _;
use ferroflow_ebpf::reject::turn_around;
use ferroflow_ebpf::service::Outcome;

use crate::skb::Skb;
use crate::tc::shot;

/// Turns the packet into the error that a router on its way would send. It takes that router's way, too: in by the
/// packet's own interface, where it is an error about a known flow as any other.
#[inline(always)]
pub(crate) fn answer(skb: &Skb, room: u32) -> i32 {
    let context = skb.0.as_ptr().cast::<__sk_buff>();
    let outcome =
        if skb.ethertype() == V4::ETHERTYPE { too_big_v4(context, room) } else { too_big_v6(context, room) };
    if let Err(reason) = Outcome(outcome).fate() {
        return shot(reason);
    }
    // SAFETY: the context is the program's own.
    let ifindex = unsafe { (*context).ifindex };
    // SAFETY: the helper takes numbers and checks them.
    (unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) }) as i32
}

/// The same for a packet that is as its sender sent it: out by its own interface, to where it came from.
#[inline(always)]
pub(crate) fn answer_back(skb: &mut Skb, room: u32) -> i32 {
    let context = skb.0.as_ptr().cast::<__sk_buff>();
    let outcome =
        if skb.ethertype() == V4::ETHERTYPE { too_big_v4(context, room) } else { too_big_v6(context, room) };
    if let Err(reason) = Outcome(outcome).fate().and_then(|_error| turn_around(skb)) {
        return shot(reason);
    }
    // SAFETY: the context is the program's own.
    let ifindex = unsafe { (*context).ifindex };
    // SAFETY: the helper takes numbers and checks them.
    (unsafe { bpf_redirect(ifindex, 0) }) as i32
}

macro_rules! too_big {
    ($($name:ident: $family:ty;)*) => {$(
        /// A global function, as the [steps](crate::steps) are.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff, room: u32) -> u64 {
            // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
            let mut skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
            Outcome::of(mtu::too_big::<$family, _>(&mut skb, room)).0
        }
    )*};
}

too_big! {
    too_big_v4: V4;
    too_big_v6: V6;
}
