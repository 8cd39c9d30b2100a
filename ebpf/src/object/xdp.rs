//! The program in a device's driver, and a frame there as the library's packet: its bytes, with complete checksums.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::{DropReason, Verdict};
use ferroflow_ebpf::nat::Rewrite;
use ferroflow_ebpf::packet::{L4Change, Packet};
use ferroflow_ebpf::tables::Tracked;
use ferroflow_ebpf::xdp::{self, Wire};

use crate::direct;
use crate::fib::{Found, Query};
use crate::maps::{self, Kernel};

/// A device of the node, before TC's `device_ingress`.
#[xdp]
pub(crate) fn device_xdp(ctx: XdpContext) -> u32 {
    match xdp::arriving(&mut Frame(ctx), &Kernel) {
        Ok(Verdict::Reply) => xdp_action::XDP_TX,
        Ok(
            Verdict::Stack | Verdict::Forward | Verdict::Taken | Verdict::Relay { .. } | Verdict::Pod { .. },
        ) => xdp_action::XDP_PASS,
        Err(reason) => {
            maps::count(reason);
            xdp_action::XDP_DROP
        }
    }
}

struct Frame(XdpContext);

impl Frame {
    /// `xdp_md::data` and `data_end`.
    #[inline(always)]
    fn bounds(&self) -> (u64, u64) {
        // SAFETY: the context is the program's own `xdp_md`, which begins with the two fields.
        unsafe { direct::bounds::<0, 4>(self.0.as_ptr()) }
    }

    #[inline(always)]
    fn half(&self, offset: u32) -> Option<u16> {
        let start = direct::at(self.bounds(), offset, 2)?;
        // SAFETY: inside the packet, as just shown.
        Some(unsafe { direct::load_half(start) })
    }

    #[inline(always)]
    fn change(&mut self, offset: u32, change: Sum) -> Result<[u8; 2], DropReason> {
        let old = self.half(offset).ok_or(DropReason::Rewrite)?;
        let new = change.update(old.to_ne_bytes());
        self.write(offset, &new)?;
        Ok(new)
    }

    /// [`Wire::next_hop`], in a frame of the stack by itself.
    #[inline(never)]
    fn hop<F: Family, R: Tracked>(&self, row: &R, length: u32) -> Option<[u8; 12]> {
        let to = Rewrite::of(&row.load());
        let context = self.0.as_ptr();
        // SAFETY: the context is the program's own `xdp_md`.
        let ifindex = unsafe { (*context.cast::<xdp_md>()).ingress_ifindex };
        let length = u16::try_from(length).ok()?;
        let (src, dst) = (F::words(&F::bytes(to.src())), F::words(&F::bytes(to.dst())));
        let mut query = Query::new::<F>(ifindex, src, dst, length);
        // SAFETY: as above.
        let found = unsafe { query.ask(context) } == Found::Known && query.device() == ifindex;
        found.then(|| query.addresses())
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn length(&self) -> u32 {
        let (data, end) = self.bounds();
        (end - data) as u32
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        self.half(12).map_or(0, u16::from_be)
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        // SAFETY: the context is the program's own `xdp_md`.
        direct::forgotten(number, unsafe { (*self.0.as_ptr().cast::<xdp_md>()).ingress_ifindex })
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let start = direct::at(self.bounds(), offset, N as u64 * 4)?;
        // SAFETY: inside the packet, as just shown.
        Some(unsafe { direct::load(start) })
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), DropReason> {
        let start = direct::at(self.bounds(), offset, N as u64).ok_or(DropReason::Rewrite)?;
        // SAFETY: inside the packet, as just shown, to which this is the only reference.
        unsafe { direct::store(start, bytes) };
        Ok(())
    }

    #[inline(always)]
    fn change_l3_checksum(&mut self, offset: u32, change: Sum) -> Result<(), DropReason> {
        self.change(offset, change).map(|_new| ())
    }

    #[inline(always)]
    fn change_l4_checksum(&mut self, offset: u32, change: &L4Change) -> Result<(), DropReason> {
        let (L4Change::Addresses { addresses: sum, zero_is_none, .. }
        | L4Change::Ports { ports: sum, zero_is_none }) = *change;
        if zero_is_none && self.half(offset) == Some(0) {
            return Ok(());
        }
        // RFC 768: a sum of zero is sent as its other form.
        if self.change(offset, sum)? == [0, 0] && zero_is_none {
            self.write(offset, &[0xff, 0xff])?;
        }
        Ok(())
    }
}

impl Wire for Frame {
    #[inline(always)]
    fn next_hop<F: Family, R: Tracked>(&self, row: &R, length: u32) -> Option<[u8; 12]> {
        self.hop::<F, R>(row, length)
    }
}
