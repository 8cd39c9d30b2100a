//! A global function: the verifier follows it by itself, once, for any arguments (kernel commit 51c39bb1d5d1).

use ferroflow_common::crc32c;

/// [`crc32c::change`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn crc32c_change(difference: u32, length: u32) -> u32 {
    crc32c::change(difference, length)
}
