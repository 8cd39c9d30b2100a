//! The clock that flows are stamped with: seconds since the machine started, out of the kernel's own count of ticks.
//!
//! A program reads that count (`jiffies`) in two instructions, which the verifier puts in the place of the helper's call
//! (kernel commit 5576b991e9c1, 5.6). Any other clock is a chain of calls, and on processors whose returns are guarded
//! against speculation (SRSO, retbleed) that costs each packet more than a lookup in a table.
//!
//! `CLOCK_MONOTONIC` shows the same seconds, but for the ticks that were lost while the machine started: less than one on
//! most. Where ticks are made by a timer of high resolution none is lost after that, because the kernel counts by the
//! clock how many have passed.

/// How the kernel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// What the count was at the start.
    pub first: u64,
    /// Seconds in a tick, in parts of 2^36.
    pub share: u64,
}

const SHIFT: u32 = 36;
const SECOND: u64 = 1_000_000_000;
/// Seconds after which a count of 32 bits would overflow: the kernel starts so far below (`INITIAL_JIFFIES`).
const EARLY: u64 = 300;

impl Ticks {
    /// Of this many nanoseconds; `None` where that is no tick of a kernel.
    pub const fn of(nanoseconds: u64) -> Option<Self> {
        if nanoseconds < SECOND / 10_000 || nanoseconds > SECOND / 10 {
            return None;
        }
        let a_second = (SECOND + nanoseconds / 2) / nanoseconds;
        let share = (nanoseconds << SHIFT).div_ceil(SECOND);
        Some(Self { first: (1 << 32) - EARLY * a_second, share })
    }

    /// Whole seconds since the start, for the first five years.
    #[inline(always)]
    pub const fn seconds(self, count: u64) -> u32 {
        (self.parts(count) >> SHIFT) as u32
    }

    /// Nanoseconds of the second that it is in.
    pub const fn subsecond(self, count: u64) -> u32 {
        (((self.parts(count) & ((1 << SHIFT) - 1)) * (SECOND >> 9)) >> (SHIFT - 9)) as u32
    }

    #[inline(always)]
    const fn parts(self, count: u64) -> u64 {
        count.wrapping_sub(self.first).wrapping_mul(self.share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_those_of_the_ticks() {
        for a_second in [24, 64, 100, 250, 300, 1_000, 1_024] {
            let ticks = Ticks::of(SECOND / a_second).unwrap();
            assert_eq!(ticks.seconds(ticks.first), 0);
            for second in [1, 59, 300, 86_400, 31_536_000, 4 * 31_536_000] {
                // Ticks are whole nanoseconds, and seconds not always whole ticks: 1,024 are 512 ns short of one.
                let count = ticks.first + second * a_second;
                let exact = SECOND.is_multiple_of(a_second);
                let off = u64::from(ticks.seconds(count)).abs_diff(second);
                assert!(
                    off <= u64::from(!exact) + second / if exact { 10_000_000 } else { 1_000_000 },
                    "{second} s at {a_second}"
                );
                assert!(ticks.seconds(count + a_second + 1) > ticks.seconds(count));
            }
        }
    }

    #[test]
    fn the_part_of_a_second_is_known() {
        let ticks = Ticks::of(4_000_000).unwrap();
        let count = ticks.first + 250 * 77_618;
        assert_eq!(ticks.seconds(count + 125), 77_618);
        assert!(ticks.subsecond(count + 125).abs_diff(500_000_000) < 4_000_000);
        assert!(ticks.subsecond(count + 249).abs_diff(996_000_000) < 4_000_000);
    }

    #[test]
    fn what_is_no_tick_is_refused() {
        for nanoseconds in [0, 1, SECOND, u64::MAX] {
            assert_eq!(Ticks::of(nanoseconds), None, "{nanoseconds}");
        }
    }
}
