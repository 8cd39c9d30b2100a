//! The programs on pods' interfaces, and what a verdict is to TC.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_ebpf::{EbpfContext as _, Global};
use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::verdict::{DropReason, Verdict};
use ferroflow_ebpf::service::Origin;
use ferroflow_ebpf::source::Senders;
use ferroflow_ebpf::{device, pod, tunnel};

use crate::maps::{self, Kernel};
use crate::mtu;
use crate::relay;
use crate::skb::{Mark, Skb};
use crate::steps;
use crate::tunnel::{self as tunnel_device, Entered};

/// Pods send from their own addresses alone. Where that is not checked, the verifier drops what is about it.
#[unsafe(no_mangle)]
static CHECK_SOURCES: Global<u8> = Global::new(0);

/// The UDP port at which other nodes' tunnels end here; 0 without tunnels, and the verifier drops what is about them.
#[unsafe(no_mangle)]
pub(crate) static TUNNEL_PORT: Global<u16> = Global::new(0);

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

/// TC ingress on the host's end of a pod's device: what the pod sends. On a netkit the program also runs in the pod's own
/// transmission (`BPF_NETKIT_PEER`), on the same `skb->dev` and in the same network namespace; here comes what it let pass
/// to the stack, which has been told, and what it sent round.
#[classifier]
pub(crate) fn pod_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    if skb.has_passed() {
        return TC_ACT_UNSPEC;
    }
    // Pods do not say what is finished.
    let _of_a_pod = skb.told();
    let verdict = pod::leaving(&mut skb, &Kernel);
    let transmits = skb.is_own();
    match verdict {
        // `bpf_redirect_peer` is for TC ingress alone; the kernel drops what is sent so from elsewhere.
        Ok(Verdict::Pod { ifindex }) if transmits => hand(&skb, ifindex | Endpoint::QUEUED),
        Ok(Verdict::Reply) if transmits => {
            skb.tell(Mark::FINISHED);
            // SAFETY: the helper takes numbers and checks them.
            (unsafe { bpf_redirect(Kernel.sender(&skb), 0) }) as i32
        }
        Ok(Verdict::Stack) if transmits => {
            skb.pass();
            TC_ACT_UNSPEC
        }
        // Past the program on the way in: the pod's policies have no say in what refuses its own packet.
        // SAFETY: as above.
        Ok(Verdict::Reply) => (unsafe { bpf_redirect_peer(Kernel.sender(&skb), 0) }) as i32,
        verdict => action(&mut skb, verdict),
    }
}

/// TC egress on the host's end of a pod's device: what the node's stack sends to the pod. A netkit's own hook on that way
/// (`BPF_NETKIT_PRIMARY`) would not do: by then the kernel has forgotten which interface the packet came in by.
#[classifier]
pub(crate) fn pod_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    if skb.told() == Mark::FINISHED {
        return TC_ACT_UNSPEC;
    }
    let origin = if skb.is_own() { Origin::Own } else { Origin::Inward };
    let verdict = pod::entering_pod(&mut skb, &Kernel, origin);
    action(&mut skb, verdict)
}

/// TC ingress on a device of the node: what comes from outside.
#[classifier]
pub(crate) fn device_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    // Neither does another node, where no program of its device took that away: a veth keeps it.
    let _of_its_sender = skb.told();
    let port = TUNNEL_PORT.load();
    if port != 0 && is_for_tunnel(&skb, port) {
        return TC_ACT_UNSPEC;
    }
    match device::arriving(&mut skb, &Kernel) {
        Ok(Verdict::Relay { node }) => relay::send(&mut skb, node),
        verdict => action(&mut skb, verdict),
    }
}

/// With a frame of its own, which no step's comes on top of.
#[inline(never)]
fn is_for_tunnel(skb: &Skb, port: u16) -> bool {
    tunnel::is_for_tunnel(skb, &Kernel, port)
}

#[inline(always)]
pub(crate) fn action(skb: &mut Skb, verdict: Result<Verdict, DropReason>) -> i32 {
    match verdict {
        // Other programs on the interface see the packet next; without any, it passes.
        Ok(Verdict::Stack) => TC_ACT_UNSPEC,
        Ok(Verdict::Pod { ifindex }) => hand(skb, ifindex),
        Ok(Verdict::Forward) => forward(skb),
        Ok(Verdict::Reply) => {
            // SAFETY: the context is the program's own `__sk_buff`.
            let ifindex = unsafe { (*skb.0.as_ptr().cast::<__sk_buff>()).ifindex };
            // SAFETY: the helper takes numbers and checks them.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        // No drop: what was kept goes on later.
        Ok(Verdict::Taken) => TC_ACT_SHOT,
        // What comes from outside alone is relayed: see `device_ingress`.
        Ok(Verdict::Relay { .. }) => shot(DropReason::RelayFailed),
        Err(reason) => shot(reason),
    }
}

/// Into the pod; past its interface, unless it is to wait there.
#[inline(always)]
fn hand(skb: &Skb, link: u32) -> i32 {
    if link & Endpoint::QUEUED == 0 {
        // SAFETY: the helper takes numbers and checks them.
        return (unsafe { bpf_redirect_peer(link, 0) }) as i32;
    }
    skb.tell(Mark::FINISHED);
    let ifindex = link & !Endpoint::QUEUED;
    // SAFETY: as above; without parameters the next hop is the packet's own destination.
    (unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) }) as i32
}

#[inline(always)]
fn forward(skb: &mut Skb) -> i32 {
    if TUNNEL_PORT.load() != 0 {
        match tunnel_device::to_pods(skb) {
            Entered::Gone(action) => return action,
            Entered::TooLong(room) => return mtu::answer(skb, room),
            Entered::Not => {}
        }
    }
    let exit = skb.exit();
    if let Some(ifindex) = exit.device() {
        skb.tell(Mark::FINISHED);
        if exit.is_tunnel() {
            // SAFETY: the helper takes numbers and checks them.
            return (unsafe { bpf_redirect(ifindex, 0) }) as i32;
        }
        // SAFETY: the helper takes numbers and checks them; without parameters the next hop is looked up by the packet's
        // own destination.
        return (unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) }) as i32;
    }
    match exit.room() {
        Some(room) => mtu::answer(skb, room),
        None => shot(DropReason::NoRoute),
    }
}

#[inline(always)]
pub(crate) fn shot(reason: DropReason) -> i32 {
    maps::count(reason);
    steps::log(reason as u32);
    TC_ACT_SHOT
}
