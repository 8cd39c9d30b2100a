//! The kernel's routes (`bpf_fib_lookup`).

use core::ffi::c_void;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup as lookup;
use ferroflow_common::family::{Family, V4};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// What the kernel says of a way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It has the next hop's Ethernet address.
    Known,
    /// It would ask for that.
    Unknown,
    /// The packet is too long for it.
    Narrow,
    /// It would not forward the packet.
    Nowhere,
}

/// A question, and then its answer.
pub(crate) struct Query(bpf_fib_lookup);

impl Query {
    /// Where a packet that came in by `ifindex` goes, from `src` to `dst`. Words past the family's own are not read.
    /// A `length` that is not 0 must fit the device.
    #[inline(always)]
    pub(crate) fn new<F: Family>(ifindex: u32, src: [u32; 4], dst: [u32; 4], length: u16) -> Self {
        // SAFETY: plain numbers; zero is a valid value of every field.
        let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
        if F::ETHERTYPE == V4::ETHERTYPE {
            query.family = AF_INET;
            query.__bindgen_anon_3.ipv4_src = src[0];
            query.__bindgen_anon_4.ipv4_dst = dst[0];
        } else {
            query.family = AF_INET6;
            query.__bindgen_anon_3.ipv6_src = src;
            query.__bindgen_anon_4.ipv6_dst = dst;
        }
        query.ifindex = ifindex;
        query.__bindgen_anon_1.tot_len = length;
        Self(query)
    }

    /// # Safety
    /// `context` is that of the running program.
    #[inline(always)]
    pub(crate) unsafe fn ask(&mut self, context: *mut c_void) -> Found {
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the helper reads and writes `size` bytes; the context is the caller's promise.
        let answer = unsafe { lookup(context, &raw mut self.0, size, 0) };
        if answer == i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
            Found::Known
        } else if answer == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
            Found::Unknown
        } else if answer == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
            Found::Narrow
        } else {
            Found::Nowhere
        }
    }

    /// What fits, in bytes from the IP header on, after [`Found::Narrow`]: the kernel writes it over the length that it
    /// was asked about, from 5.12 on.
    #[inline(always)]
    pub(crate) fn room(&self) -> u32 {
        // SAFETY: both members of the union are one number.
        u32::from(unsafe { self.0.__bindgen_anon_1.mtu_result })
    }

    /// The device that the packet leaves by.
    #[inline(always)]
    pub(crate) fn device(&self) -> u32 {
        self.0.ifindex
    }

    /// The Ethernet addresses of the next hop and of the device.
    #[inline(always)]
    pub(crate) fn addresses(&self) -> [u8; 12] {
        // SAFETY: the kernel wrote them where it knows the neighbour; any bytes are addresses.
        let macs = unsafe { self.0.__bindgen_anon_6.__bindgen_anon_2 };
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (macs.dmac, macs.smac);
        [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]
    }
}
