//! Whether an agent's memory grows for ever.
//!
//! The same changes come again and again, each time until the cluster is what it was before; then what the agent has
//! allocated (`ferroflow_heap_bytes`, which no hole between allocations adds to) is read. Buffers, caches and counters
//! that grow to the size of the work do so in the first rounds. What leaks grows in every round: a leak is what makes
//! the least reading of the last quarter larger than the largest of the second quarter, by more than [`ALLOWANCE`].
//! Single readings go up and down by 50 KiB with what happens to be under way (a list that is read, an event that is
//! posted). With 16 rounds of 100 changes a leak of 82 bytes a change is found.

use std::fmt;

/// Readings of one agent, round by round, in bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Rounds(Vec<u64>);

/// Fewer have no quarters worth the name.
pub(super) const LEAST: usize = 8;

/// Bytes that readings may differ by though nothing leaks.
const ALLOWANCE: u64 = 64 * 1024;

impl Rounds {
    pub(super) fn push(&mut self, bytes: u64) {
        self.0.push(bytes);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// By how many bytes the last quarter is above the second, where that is a leak; `None` where there are too few
    /// readings to say.
    pub(super) fn growth(&self) -> Option<u64> {
        if self.0.len() < LEAST {
            return None;
        }
        let quarter = self.0.len() / 4;
        let settled = self.0[quarter..2 * quarter].iter().max()?;
        let last = self.0[self.0.len() - quarter..].iter().min()?;
        last.checked_sub(*settled).filter(|growth| *growth > ALLOWANCE)
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib: Vec<_> = self.0.iter().map(|bytes| (bytes / 1024).to_string()).collect();
        write!(f, "{} KiB", kib.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn growth(readings: impl IntoIterator<Item = u64>) -> Option<u64> {
        Rounds(readings.into_iter().collect()).growth()
    }

    /// Of more than the allowance, one way and the other.
    const NOISE: [u64; 8] = [0, 50_000, 20_000, 45_000, 5_000, 49_000, 11_000, 38_000];

    #[test]
    fn what_grows_in_every_round_is_a_leak() {
        assert_eq!(growth((0..8).map(|round| 1_000_000 + round * 30_000)), Some(3 * 30_000));
        let leaks = (0..16).map(|round| 1_000_000 + round * 100 * 200 + NOISE[round as usize % 8]);
        assert!(growth(leaks).is_some());
    }

    #[test]
    fn what_grows_at_first_or_goes_up_and_down_is_none() {
        assert_eq!(
            growth([400_000, 900_000, 1_000_000, 1_010_000, 1_000_000, 1_005_000, 1_008_000, 1_009_000]),
            None
        );
        assert_eq!(growth((0..40).map(|round| 1_000_000 + NOISE[round as usize % 8])), None);
        assert_eq!(growth((0..7).map(|round| round * 1_000_000)), None, "too few to say");
    }
}
