//! The programs on pods' interfaces, and what a verdict is to TC.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_ebpf::{EbpfContext as _, Global};
use aya_log_ebpf::info;
use ferroflow_common::verdict::{DropReason, Verdict};
use ferroflow_ebpf::source::Senders;
use ferroflow_ebpf::{device, pod};

use crate::maps::{self, Kernel};
use crate::skb::Skb;

/// Pods send from their own addresses alone. Where that is not checked, the verifier drops what is about it.
#[unsafe(no_mangle)]
static CHECK_SOURCES: Global<u8> = Global::new(0);

impl Senders<Skb> for Kernel {
    #[inline(always)]
    fn checks_sources(&self) -> bool {
        CHECK_SOURCES.load() != 0
    }

    #[inline(always)]
    fn sender(&self, packet: &Skb) -> u32 {
        // SAFETY: the context is the program's own `__sk_buff`.
        unsafe { (*packet.0.as_ptr().cast::<__sk_buff>()).ifindex }
    }
}

/// TC ingress on the host's end of a pod's veth: what the pod sends.
#[classifier]
pub(crate) fn pod_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    let verdict = pod::leaving(&mut skb, &Kernel);
    action(&skb, verdict)
}

/// TC egress on the host's end of a pod's veth: what the node's stack sends to the pod.
#[classifier]
pub(crate) fn pod_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    let verdict = pod::entering(&mut skb, &Kernel);
    action(&skb, verdict)
}

/// TC ingress on a device of the node: what comes from outside.
#[classifier]
pub(crate) fn device_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    let verdict = device::arriving(&mut skb, &Kernel);
    action(&skb, verdict)
}

#[inline(always)]
pub(crate) fn action(skb: &Skb, verdict: Result<Verdict, DropReason>) -> i32 {
    match verdict {
        // Other programs on the interface see the packet next; without any, it passes.
        Ok(Verdict::Stack) => TC_ACT_UNSPEC,
        // SAFETY: the helper takes numbers and checks them.
        Ok(Verdict::Pod { ifindex }) => (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32,
        Ok(Verdict::Forward) => match skb.output_device() {
            // SAFETY: as above; without parameters the next hop is looked up by the packet's own destination.
            Some(ifindex) => (unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) }) as i32,
            None => shot(skb, DropReason::NoRoute),
        },
        Ok(Verdict::Reply) => {
            // SAFETY: the context is the program's own `__sk_buff`.
            let ifindex = unsafe { (*skb.0.as_ptr().cast::<__sk_buff>()).ifindex };
            // SAFETY: the helper takes numbers and checks them.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        // No drop: what was kept goes on later.
        Ok(Verdict::Taken) => TC_ACT_SHOT,
        Err(reason) => shot(skb, reason),
    }
}

#[inline(always)]
pub(crate) fn shot(skb: &Skb, reason: DropReason) -> i32 {
    maps::count(reason);
    // Compiled out by the verifier unless the agent raises AYA_LOG_LEVEL when it loads.
    info!(&skb.0, "dropped: {}", reason.as_str());
    TC_ACT_SHOT
}
