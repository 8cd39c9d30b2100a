//! The program on a device of the node, for what leaves by it, and what it is told of the ways out.

use core::mem::offset_of;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::Global;
use aya_ebpf::bindings::{__sk_buff, BPF_F_NO_PREALLOC, TC_ACT_UNSPEC, bpf_sock, bpf_sock_tuple};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{HashMap, LpmTrie};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::conntrack::Tuple;
use ferroflow_common::abi::node::{Masquerade, Unmasqueraded};
use ferroflow_common::abi::policy::RangeKey;
use ferroflow_common::addr::{Addr, Proto};
use ferroflow_common::family::{Family, V4};
use ferroflow_common::verdict::Verdict;
use ferroflow_ebpf::masquerade::{self, Exits};
use ferroflow_ebpf::tables::Aligned;

use crate::maps::Kernel;
use crate::skb::{Mark, Skb};
use crate::tc::{TUNNEL_PORT, action};
use crate::tunnel;

/// Pods are masqueraded to the world. Where they are not, the verifier drops all that is about it.
#[unsafe(no_mangle)]
static MASQUERADE: Global<u8> = Global::new(0);

#[btf_map(name = "exit_addresses", pin_by_name)]
static EXIT_ADDRESSES: HashMap<u32, Masquerade, 1_024, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

#[btf_map(name = "unmasqueraded", pin_by_name)]
static UNMASQUERADED: LpmTrie<Addr, Unmasqueraded, 65_536> = LpmTrie::new();

/// TC egress on a device of the node: what its processes answer as backends, and pods' packets to the world.
#[classifier]
pub(crate) fn device_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb(ctx);
    if skb.told() == Mark::FINISHED {
        return TC_ACT_UNSPEC;
    }
    let verdict = masquerade::leaving(&mut skb, &Kernel);
    if verdict == Ok(Verdict::Stack) && TUNNEL_PORT.load() != 0 {
        return tunnel::turn_to_node(&mut skb);
    }
    action(&mut skb, verdict)
}

/// The network namespace of the packet's device (`BPF_F_CURRENT_NETNS`).
const CURRENT_NETNS: u64 = u64::MAX;

impl Exits<Skb> for Kernel {
    #[inline(always)]
    fn masquerades(&self) -> bool {
        MASQUERADE.load() != 0
    }

    #[inline(always)]
    fn keeps_source(&self, dst: &Addr) -> bool {
        UNMASQUERADED.get(&Key::new(RangeKey::EVERY_BIT, *dst)).is_some_and(|kept| *kept != 0)
    }

    #[inline(always)]
    fn exit_address<F: Family>(&self, packet: &Skb) -> F::Bytes {
        // SAFETY: the context is the program's own `__sk_buff`.
        let ifindex = unsafe { (*packet.0.as_ptr().cast::<__sk_buff>()).ifindex };
        // SAFETY: copied before anything else is called; the agent replaces a row by a new one, never in place.
        let own = unsafe { EXIT_ADDRESSES.get(&ifindex) };
        let of = |row: &Masquerade| F::bytes(if F::ETHERTYPE == V4::ETHERTYPE { &row.v4 } else { &row.v6 });
        own.map_or(F::from_words([0; 4]), of)
    }

    #[inline(always)]
    fn is_hosts<F: Family>(&self, packet: &Skb, tuple: &Aligned<Tuple<F::Bytes>>) -> bool {
        let context = packet.0.as_ptr();
        // A tuple begins as the helper's does: addresses and ports, in network order.
        let ends = (&raw const tuple.0).cast::<bpf_sock_tuple>().cast_mut();
        let size = offset_of!(Tuple<F::Bytes>, proto) as u32;
        let socket: *mut bpf_sock = if tuple.proto == Proto::TCP {
            // SAFETY: the helper reads `size` bytes of the tuple, and writes nothing.
            unsafe { bpf_sk_lookup_tcp(context, ends, size, CURRENT_NETNS, 0) }
        } else if tuple.proto == Proto::UDP {
            // SAFETY: as above.
            unsafe { bpf_sk_lookup_udp(context, ends, size, CURRENT_NETNS, 0) }
        } else {
            return false;
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: a lookup returned it, and it is not null.
        unsafe { bpf_sk_release(socket.cast()) };
        true
    }
}
