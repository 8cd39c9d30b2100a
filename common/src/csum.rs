//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are over 16-bit words in memory order: one's complement addition is indifferent to byte order as long as
//! everything is read alike, so nothing here converts.

/// An unfolded one's complement sum. The kernel's helpers call the same thing `__wsum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    pub const ZERO: Self = Self(0);

    /// Adds a 32-bit word in memory order.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u32) -> Self {
        Self(self.0 + (word & 0xffff) as u64 + (word >> 16) as u64)
    }

    /// Adds a 16-bit word in memory order.
    #[inline(always)]
    #[must_use]
    pub const fn half(self, half: u16) -> Self {
        Self(self.0 + half as u64)
    }

    /// Takes a 32-bit word away: adds its complement.
    #[inline(always)]
    #[must_use]
    pub const fn less_word(self, word: u32) -> Self {
        self.word(!word)
    }

    /// Takes a 16-bit word away.
    #[inline(always)]
    #[must_use]
    pub const fn less_half(self, half: u16) -> Self {
        self.half(!half)
    }

    /// The sum in 16 bits, not complemented.
    #[inline(always)]
    pub const fn folded(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// The checksum as a header carries it, in memory order.
    #[inline(always)]
    pub const fn finish(self) -> [u8; 2] {
        (!self.folded()).to_ne_bytes()
    }

    /// RFC 1624, equation 3: the new checksum where `self` is (new words - old words) and `old` the present one.
    #[inline(always)]
    pub const fn update(self, old: [u8; 2]) -> [u8; 2] {
        self.half(!u16::from_ne_bytes(old)).finish()
    }
}

/// The sum of a byte string; an odd last byte counts as if a zero followed.
pub fn bytes(data: &[u8]) -> Sum {
    let (pairs, rest) = data.as_chunks::<2>();
    let sum = pairs.iter().fold(Sum::ZERO, |sum, pair| sum.half(u16::from_ne_bytes(*pair)));
    match rest {
        [last] => sum.half(u16::from_ne_bytes([*last, 0])),
        _ => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word by word with end-around carry.
    fn reference(data: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            if sum > 0xffff {
                sum = (sum & 0xffff) + 1;
            }
        }
        (!(sum as u16)).to_be_bytes()
    }

    /// A small generator, so that a failure repeats.
    fn noise(seed: &mut u64) -> u8 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 33) as u8
    }

    #[test]
    fn the_header_of_rfc_1071_examples_sums_right() {
        let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 192, 168, 0, 1, 192, 168, 0, 199];
        assert_eq!(bytes(&header).finish(), [0xb8, 0x61]);
    }

    #[test]
    fn sums_equal_the_definition_at_every_length() {
        let mut seed = 7;
        for length in 0..200 {
            let data: [u8; 200] = core::array::from_fn(|_| noise(&mut seed));
            assert_eq!(bytes(&data[..length]).finish(), reference(&data[..length]), "length {length}");
        }
    }

    #[test]
    fn an_update_equals_a_full_recomputation() {
        let mut seed = 11;
        for round in 0..2000 {
            let mut data: [u8; 40] = core::array::from_fn(|_| noise(&mut seed));
            let before = bytes(&data).finish();
            let at = usize::from(noise(&mut seed) % 10) * 4;
            let old = u32::from_ne_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
            let new: [u8; 4] = core::array::from_fn(|_| noise(&mut seed));
            data[at..at + 4].copy_from_slice(&new);
            let updated = Sum::ZERO.less_word(old).word(u32::from_ne_bytes(new)).update(before);
            assert_eq!(updated, bytes(&data).finish(), "round {round}");
        }
    }
}
