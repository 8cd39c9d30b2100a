//! The flow hash and what it chooses.

/// Mixes words into 32 well-spread bits: multiply and fold, two multiplications a round (the finisher of
/// splitmix64, Steele et al., OOPSLA 2014). Not for hash tables that an attacker may fill: for spreading flows.
#[inline(always)]
pub const fn mix(state: u64, word: u64) -> u64 {
    let x = (state ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// The 32 bits that [`slot`] takes.
#[inline(always)]
pub const fn finish(state: u64) -> u32 {
    (state >> 32) as u32
}

/// The slot that a hash chooses in a range of `length` slots: the high half of the product, which spreads as evenly
/// as a remainder and needs no division (Lemire, "Fast Random Integer Generation in an Interval", 2019).
#[inline(always)]
pub const fn slot(hash: u32, length: u32) -> u32 {
    ((hash as u64 * length as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_inside_its_range() {
        for length in [1, 2, 3, 65_537] {
            assert_eq!(slot(0, length), 0);
            assert_eq!(slot(u32::MAX, length), length - 1);
        }
    }

    #[test]
    fn source_ports_spread_evenly() {
        let mut seen = [0u32; 7];
        for port in 0..70_000u64 {
            seen[slot(finish(mix(mix(0, 0x0a00_0001), port)), 7) as usize] += 1;
        }
        for count in seen {
            assert!((9_500..10_500).contains(&count), "{seen:?}");
        }
    }
}
