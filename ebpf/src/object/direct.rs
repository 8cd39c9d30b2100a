//! Direct access to a packet's linear bytes, in instructions that the compiler cannot take apart or move: the verifier
//! recognises its own checks only in certain shapes.

use core::arch::asm;
use core::ffi::c_void;

/// Where the packet begins and ends: two fields of the context, loaded by instructions that the compiler cannot split or
/// move apart. The verifier recognises a packet pointer only in a plain 32-bit load.
///
/// # Safety
/// `context` is the program's own, and the fields at these offsets of its ABI are `data` and `data_end`.
#[inline(always)]
pub(crate) unsafe fn bounds<const DATA: usize, const END: usize>(context: *mut c_void) -> (u64, u64) {
    let (data, end): (u64, u64);
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{data} = *(u32 *)({context} + {at})",
            "{end} = *(u32 *)({context} + {end_at})",
            data = out(reg) data,
            end = out(reg) end,
            context = in(reg) context,
            at = const DATA,
            end_at = const END,
            options(readonly, nostack),
        );
    }
    (data, end)
}

/// The number, of which the verifier forgets what it knew: `unknown`, anything that it knows nothing of, is mixed in and
/// taken out again, which it does not relate.
#[inline(always)]
pub(crate) fn forgotten(number: u32, unknown: u32) -> u32 {
    let mut number = u64::from(number);
    // SAFETY: arithmetic in a register that ends as it began.
    unsafe {
        asm!(
            "{0} ^= {1}",
            "{0} ^= {1}",
            inout(reg) number,
            in(reg) u64::from(unknown),
            options(pure, nomem, nostack),
        );
    }
    number as u32
}

/// How far into the packet direct access goes: the verifier wants a bound, and headers end long before.
const DIRECT: u32 = 0x700;
const DIRECT_MASK: u32 = 0x7ff;

/// Where `length` bytes at `offset` stand, given where the packet begins and ends; `None` where it ends before.
#[inline(always)]
pub(crate) fn at((data, end): (u64, u64), offset: u32, length: u64) -> Option<u64> {
    if offset > DIRECT {
        return None;
    }
    let mut start = data;
    // SAFETY: one addition, hidden from the compiler so that the check and the accesses use one register: to the
    // verifier two sums of a packet pointer and the same number are two pointers. The mask takes nothing away: it is
    // for kernels before 6.8, where the check above bounds one copy of the offset and none that was on the stack.
    unsafe {
        asm!(
            "{offset} &= {mask}",
            "{start} += {offset}",
            start = inout(reg) start,
            offset = inout(reg) u64::from(offset) => _,
            mask = const DIRECT_MASK,
            options(pure, nomem, nostack),
        );
    }
    (start + length <= end).then_some(start)
}

/// `N` words in memory order. Headers are not aligned, and the compiler would take loads apart into bytes; every kernel
/// that JITs BPF on a machine with unaligned loads accepts these.
///
/// # Safety
/// The words are inside the packet, as [`at`] has shown to the verifier too.
#[inline(always)]
pub(crate) unsafe fn load<const N: usize>(start: u64) -> [u32; N] {
    core::array::from_fn(|index| {
        let at = start + index as u64 * 4;
        let word: u64;
        // SAFETY: the caller's promise; the instruction zero-extends.
        unsafe {
            asm!("{0} = *(u32 *)({1} + 0)", out(reg) word, in(reg) at, options(pure, readonly, nostack))
        };
        word as u32
    })
}

/// Two bytes in memory order.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub(crate) unsafe fn load_half(start: u64) -> u16 {
    let half: u64;
    // SAFETY: the caller's promise; the instruction zero-extends.
    unsafe {
        asm!("{0} = *(u16 *)({1} + 0)", out(reg) half, in(reg) start, options(pure, readonly, nostack))
    };
    half as u16
}

/// Writes the bytes, four at a time as far as they go.
///
/// # Safety
/// As for [`load`], and nothing else refers to the packet's bytes.
#[inline(always)]
pub(crate) unsafe fn store<const N: usize>(start: u64, bytes: &[u8; N]) {
    let (words, rest) = bytes.as_chunks::<4>();
    for (index, word) in words.iter().enumerate() {
        let (at, word) = (start + index as u64 * 4, u64::from(u32::from_ne_bytes(*word)));
        // SAFETY: the caller's promise.
        unsafe { asm!("*(u32 *)({0} + 0) = {1}", in(reg) at, in(reg) word, options(nostack)) };
    }
    for (index, byte) in rest.iter().enumerate() {
        let (at, byte) = (start + (words.len() * 4 + index) as u64, u64::from(*byte));
        // SAFETY: the caller's promise.
        unsafe { asm!("*(u8 *)({0} + 0) = {1}", in(reg) at, in(reg) byte, options(nostack)) };
    }
}
