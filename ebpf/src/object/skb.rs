//! A socket buffer as the library's packet: direct reads where the bytes are linear, helpers for everything else.

use core::arch::asm;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
};
use aya_ebpf::helpers::generated::{
    bpf_clone_redirect, bpf_csum_diff, bpf_csum_update, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use ferroflow_common::abi::tunnel::DEVICE_MAC;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::DropReason;
use ferroflow_ebpf::mtu;
use ferroflow_ebpf::packet::{L3, L4Change, Packet, Reshape, SUM_MAX};

use crate::direct;
use crate::fib::{Found, Query};

pub(crate) struct Skb(pub(crate) TcContext);

/// Where a packet leaves, in one register: see [`ferroflow_ebpf::service::Outcome`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Exit(u64);

impl Exit {
    /// The kernel would not forward it.
    pub(crate) const NOWHERE: Self = Self(0);
    const BY: u64 = 1 << 32;
    const NARROW: u64 = 2 << 32;
    const TUNNEL: u64 = 4 << 32;

    #[inline(always)]
    const fn by(ifindex: u32) -> Self {
        Self(Self::BY | ifindex as u64)
    }

    /// The way has room for so much; before 5.12 the kernel leaves there the length that it was asked about, and does not
    /// look at that but at the packet, unless it is several.
    #[inline(always)]
    const fn narrow(room: u32, asked: u16) -> Self {
        let room = if room < asked as u32 { room } else { 0 };
        Self(Self::NARROW | room as u64)
    }

    /// The device that it leaves by.
    #[inline(always)]
    pub(crate) fn device(self) -> Option<u32> {
        (self.0 & Self::BY != 0).then_some(self.0 as u32)
    }

    /// That is the tunnel's, which asks for no neighbours.
    #[inline(always)]
    pub(crate) fn is_tunnel(self) -> bool {
        self.0 & Self::TUNNEL != 0
    }

    /// How much the way has room for, where that is less; 0 where the kernel does not say.
    #[inline(always)]
    pub(crate) fn room(self) -> Option<u32> {
        (self.0 & Self::NARROW != 0).then_some(self.0 as u32)
    }
}

/// What one program tells the next: a number of the traffic control's own classifiers (`skb->tc_index`), which the kernel
/// keeps from one hook to the next; of the sixteen bits those use the low ones.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Mark(u32);

impl Mark {
    /// The program at the device that the packet leaves by has nothing more to do.
    pub(crate) const FINISHED: Self = Self(0xfe40);
    /// The same, and the tunnel knows where it goes.
    pub(crate) const ADDRESSED: Self = Self(0xfe41);

    /// Whether it is one of them.
    #[inline(always)]
    const fn is_ours(self) -> bool {
        self.0 & !1 == Self::FINISHED.0
    }
}

/// `skb->mark` from a netkit's transmission to the ingress of the host's end.
const PASSED: u32 = 0xfe40_fe40;

/// The multiples of four that a sum's length less four may be.
const SUM_MASK: u32 = SUM_MAX - 4;
const _: () = assert!(SUM_MAX.is_power_of_two());

impl Skb {
    /// Where the kernel's routes send the packet, as it now is.
    #[inline(never)]
    pub(crate) fn exit(&self) -> Exit {
        let skb = self.0.as_ptr().cast::<__sk_buff>();
        // The one that it came in by, or whose pod is sending it.
        // SAFETY: the context is the program's own `__sk_buff`.
        let ifindex = unsafe { (*skb).ifindex };
        let length = self.longest();
        if self.ethertype() == V4::ETHERTYPE {
            let Some([src, dst]) = self.words(L3 + V4::SRC_OFF) else { return Exit::NOWHERE };
            self.ask(Query::new::<V4>(ifindex, [src, 0, 0, 0], [dst, 0, 0, 0], length), length)
        } else {
            let Some([s0, s1, s2, s3, d0, d1, d2, d3]) = self.words(L3 + V6::SRC_OFF) else {
                return Exit::NOWHERE;
            };
            self.ask(Query::new::<V6>(ifindex, [s0, s1, s2, s3], [d0, d1, d2, d3], length), length)
        }
    }

    /// How long the packet is on the wire: see [`mtu::longest`].
    #[inline(always)]
    pub(crate) fn longest(&self) -> u16 {
        longest(self.0.as_ptr().cast()) as u16
    }

    #[inline(always)]
    fn ask(&self, mut query: Query, length: u16) -> Exit {
        // SAFETY: the context is the program's own.
        match unsafe { query.ask(self.0.as_ptr()) } {
            // The kernel knows it from the first packet to the address on.
            Found::Known if query.addresses()[..6] == DEVICE_MAC => {
                Exit(Exit::by(query.device()).0 | Exit::TUNNEL)
            }
            // A neighbour that is not known is asked for when the packet is sent.
            Found::Known | Found::Unknown => Exit::by(query.device()),
            Found::Narrow => Exit::narrow(query.room(), length),
            Found::Nowhere => Exit::NOWHERE,
        }
    }

    /// Whether a process of the node, or its kernel, made the packet, or a pod is just sending it by a netkit: it came in by
    /// no interface. `__sk_buff` has had the
    /// field since it is there (4.2), and the kernel writes it for each packet that an interface hands over, and
    /// clears it where one goes from one network namespace to another.
    #[inline(always)]
    pub(crate) fn is_own(&self) -> bool {
        // SAFETY: the context is the program's own `__sk_buff`.
        unsafe { (*self.0.as_ptr().cast::<__sk_buff>()).ingress_ifindex == 0 }
    }

    /// Says that the packet goes on to the stack from a netkit's transmission, and has to pass the program no more.
    #[inline(always)]
    pub(crate) fn pass(&self) {
        // SAFETY: the context is the program's own `__sk_buff`, whose field may be written in TC programs.
        unsafe { (*self.0.as_ptr().cast::<__sk_buff>()).mark = PASSED };
    }

    /// Whether the packet comes from a netkit's transmission, where it was let pass: said once. Pods cannot say it, for a
    /// veth takes `skb->mark` away between its ends, and a netkit before its program runs.
    #[inline(always)]
    pub(crate) fn has_passed(&self) -> bool {
        let skb = self.0.as_ptr().cast::<__sk_buff>();
        // SAFETY: as above.
        if unsafe { (*skb).mark } != PASSED {
            return false;
        }
        // SAFETY: as above.
        unsafe { (*skb).mark = 0 };
        !self.is_own()
    }

    #[inline(always)]
    pub(crate) fn tell(&self, Mark(number): Mark) {
        // SAFETY: the context is the program's own `__sk_buff`, whose field may be written in TC programs.
        unsafe { (*self.0.as_ptr().cast::<__sk_buff>()).tc_index = number };
    }

    /// What a program has told, which is told once; or any other mark.
    #[inline(always)]
    pub(crate) fn told(&self) -> Mark {
        let skb = self.0.as_ptr().cast::<__sk_buff>();
        // SAFETY: as above.
        let mark = Mark(unsafe { (*skb).tc_index });
        if mark.is_ours() {
            // SAFETY: as above.
            unsafe { (*skb).tc_index = 0 };
        }
        mark
    }

    /// Copies the packet and gives its length; `None` where that is more than there is room for.
    #[inline(always)]
    pub(crate) fn copy_to<const N: usize>(&self, bytes: &mut [u8; N]) -> Option<u32> {
        let length = bounded::<N>(self.0.len())?;
        let buffer = bytes.as_mut_ptr().cast();
        // SAFETY: `length` is at most the size of the buffer.
        let error = unsafe { bpf_skb_load_bytes(self.0.as_ptr(), 0, buffer, length) };
        (error == 0).then_some(length)
    }

    /// Makes the packet one with these bytes, of which `length` are its.
    #[inline(always)]
    pub(crate) fn replace<const N: usize>(&mut self, bytes: &[u8; N], length: u32) -> Result<(), DropReason> {
        let length = bounded::<N>(length).ok_or(DropReason::EarlyFragment)?;
        self.0.change_tail(length, 0).map_err(|_errno| DropReason::EarlyFragment)?;
        let (skb, buffer) = (self.0.as_ptr().cast(), bytes.as_ptr().cast());
        // SAFETY: `length` is at most the size of the buffer. A sum over the packet is brought in line.
        let error = unsafe { bpf_skb_store_bytes(skb, 0, buffer, length, u64::from(BPF_F_RECOMPUTE_CSUM)) };
        if error == 0 { Ok(()) } else { Err(DropReason::EarlyFragment) }
    }

    /// Sends a copy to the interface's own ingress queue.
    #[inline(always)]
    pub(crate) fn send_round(&mut self) -> Result<(), DropReason> {
        let skb = self.0.as_ptr().cast::<__sk_buff>();
        // SAFETY: the context is the program's own.
        let ifindex = unsafe { (*skb).ifindex };
        // SAFETY: the helper takes numbers and checks them.
        let error = unsafe { bpf_clone_redirect(skb, ifindex, u64::from(BPF_F_INGRESS)) };
        if error == 0 { Ok(()) } else { Err(DropReason::EarlyFragment) }
    }

    /// `__sk_buff::data` and `data_end`.
    #[inline(always)]
    fn bounds(&self) -> (u64, u64) {
        // SAFETY: the context is the program's own `__sk_buff`, which has the two fields at 76 and 80.
        unsafe { direct::bounds::<76, 80>(self.0.as_ptr()) }
    }
}

/// A length that a helper may be given for a buffer of `N` bytes, which is at least one. It is compared less one, so that
/// one comparison bounds it at both ends: before 6.8 the verifier takes nothing from `!= 0`.
#[inline(always)]
fn bounded<const N: usize>(length: u32) -> Option<u32> {
    let mut length = u64::from(length);
    // SAFETY: a subtraction, in the register that is then compared and given on.
    unsafe { asm!("{0} += -1", inout(reg) length, options(pure, nomem, nostack)) };
    if length >= N as u64 {
        return None;
    }
    // SAFETY: takes the subtraction back.
    unsafe { asm!("{0} += 1", inout(reg) length, options(pure, nomem, nostack)) };
    Some(length as u32)
}

/// A global function, as the [steps](crate::steps) are.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn longest(skb: *mut __sk_buff) -> u64 {
    // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
    let skb = Skb(TcContext::new(unsafe { NonNull::new_unchecked(skb) }));
    // SAFETY: as above.
    let segment = unsafe { (*skb.0.as_ptr().cast::<__sk_buff>()).gso_size };
    u64::from(if skb.ethertype() == V4::ETHERTYPE {
        mtu::longest::<V4, _>(&skb, segment)
    } else {
        mtu::longest::<V6, _>(&skb, segment)
    })
}

impl Packet for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        u16::from_be(self.0.skb.protocol() as u16)
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        direct::forgotten(number, self.0.len())
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        if let Some(start) = direct::at(self.bounds(), offset, N as u64 * 4) {
            // SAFETY: inside the packet, as just shown.
            return Some(unsafe { direct::load(start) });
        }
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        let length = size_of::<[u32; N]>() as u32;
        // SAFETY: the helper writes `length` bytes or fails.
        let error = unsafe { bpf_skb_load_bytes(self.0.as_ptr(), offset, words.as_mut_ptr().cast(), length) };
        // SAFETY: it has not failed.
        (error == 0).then(|| unsafe { words.assume_init() })
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), DropReason> {
        self.0.store(offset as usize, bytes, 0).map_err(|_errno| DropReason::Rewrite)
    }

    #[inline(always)]
    fn change_l3_checksum(&mut self, offset: u32, change: Sum) -> Result<(), DropReason> {
        self.0
            .l3_csum_replace(offset as usize, 0, u64::from(change.folded()), 0)
            .map_err(|_errno| DropReason::Rewrite)
    }

    #[inline(always)]
    fn change_l4_checksum(&mut self, offset: u32, change: &L4Change) -> Result<(), DropReason> {
        let (sum, zero_is_none, pseudo) = match *change {
            L4Change::Addresses { addresses, zero_is_none, .. } => {
                (addresses, zero_is_none, u64::from(BPF_F_PSEUDO_HDR))
            }
            L4Change::Ports { ports, zero_is_none } => (ports, zero_is_none, 0),
        };
        let zero = if zero_is_none { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let sum = u64::from(sum.folded());
        self.0
            .l4_csum_replace(offset as usize, 0, sum, zero | pseudo)
            .map_err(|_errno| DropReason::Rewrite)?;
        if let L4Change::Addresses { l3_unsummed: true, .. } = change {
            // The helper takes the address change out of a CHECKSUM_COMPLETE sum as if an IPv4 header checksum had
            // cancelled it; IPv6 has none, so it goes back in (what the flag BPF_F_IPV6 does since 6.16).
            // SAFETY: the context is the program's own; on any other kind of checksum the helper does nothing.
            unsafe { bpf_csum_update(self.0.as_ptr().cast(), sum as u32) };
        }
        Ok(())
    }
}

impl Reshape for Skb {
    #[inline(always)]
    fn sum(&self, offset: u32, length: u32) -> Option<Sum> {
        if length == 0 || length > SUM_MAX || length & 3 != 0 {
            return None;
        }
        let mut length = u64::from(length);
        // SAFETY: changes nothing, as was just checked; but the verifier may have looked at another copy of the number
        // (before 6.8 at none that was on the stack), and sees here that this one is from 4 to SUM_MAX.
        unsafe {
            asm!(
                "{length} += -4",
                "{length} &= {mask}",
                "{length} += 4",
                length = inout(reg) length,
                mask = const SUM_MASK,
                options(pure, nomem, nostack),
            );
        }
        let length = length as u32;
        let mut bytes = [0u32; SUM_MAX as usize / 4];
        let buffer = bytes.as_mut_ptr();
        // SAFETY: `length` is at most the size of the buffer.
        let error = unsafe { bpf_skb_load_bytes(self.0.as_ptr(), offset, buffer.cast(), length) };
        if error != 0 {
            return None;
        }
        // SAFETY: as above; nothing is taken away (a null buffer of length 0).
        let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, buffer, length, 0) };
        (sum >= 0).then(|| Sum::ZERO.word(sum as u32))
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> Result<(), DropReason> {
        self.0.change_tail(length, 0).map_err(|_errno| DropReason::Reject)
    }

    #[inline(always)]
    fn make_room(&mut self, bytes: u32) -> Result<(), DropReason> {
        self.0.adjust_room(bytes as i32, BPF_ADJ_ROOM_MAC, 0).map_err(|_errno| DropReason::Reject)
    }
}
