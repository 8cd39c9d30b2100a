//! The programs on pods' interfaces, and what a verdict is to TC.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use ferroflow_common::verdict::{DropReason, Verdict};
use ferroflow_ebpf::pod;

use crate::maps::{self, Kernel};
use crate::skb::Skb;

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

#[inline(always)]
fn action(skb: &Skb, verdict: Result<Verdict, DropReason>) -> i32 {
    match verdict {
        // Other programs on the interface see the packet next; without any, it passes.
        Ok(Verdict::Stack) => TC_ACT_UNSPEC,
        // SAFETY: the helper takes numbers and checks them.
        Ok(Verdict::Pod { ifindex }) => (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32,
        Ok(Verdict::Reply) => {
            // SAFETY: the context is the program's own `__sk_buff`.
            let ifindex = unsafe { (*skb.0.as_ptr().cast::<__sk_buff>()).ifindex };
            // SAFETY: the helper takes numbers and checks them.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        Err(reason) => {
            maps::count(reason);
            // Compiled out by the verifier unless the agent raises AYA_LOG_LEVEL when it loads.
            debug!(&skb.0, "dropped: {}", reason.as_str());
            TC_ACT_SHOT
        }
    }
}
