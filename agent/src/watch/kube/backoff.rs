//! How long to wait after a fault.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

/// Doubles with every fault in a row; a random part keeps the agents of a cluster from asking all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    longest: Duration,
    faults: u32,
}

impl Backoff {
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, faults: 0 }
    }

    /// To be called when it worked.
    pub(super) fn reset(&mut self) {
        self.faults = 0;
    }

    /// Between half and all of the exponential delay.
    pub(super) fn next(&mut self) -> Duration {
        let delay = self.first.saturating_mul(1 << self.faults.min(16)).min(self.longest);
        self.faults = self.faults.saturating_add(1);
        random(delay / 2, delay)
    }
}

/// Some duration of this range, whole milliseconds apart.
pub(super) fn random(from: Duration, to: Duration) -> Duration {
    let width = u64::try_from(to.saturating_sub(from).as_millis()).unwrap_or(u64::MAX);
    // Every hasher of the standard library has keys of its own, the first of which are random.
    let bits = RandomState::new().hash_one(width);
    from + Duration::from_millis(bits.checked_rem(width.saturating_add(1)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_start_over() {
        let (first, longest) = (Duration::from_millis(800), Duration::from_secs(30));
        let mut backoff = Backoff::new(first, longest);
        for expected in [800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000] {
            let delay = backoff.next().as_millis();
            assert!((expected / 2..=expected).contains(&delay), "{delay} of {expected}");
        }
        backoff.faults = u32::MAX - 1;
        assert!(backoff.next() <= longest);
        backoff.reset();
        assert!(backoff.next() <= first);
    }

    #[test]
    fn agents_do_not_wait_alike() {
        let delays: std::collections::BTreeSet<_> =
            (0..50).map(|_| random(Duration::ZERO, Duration::from_secs(3600))).collect();
        assert!(delays.len() > 10, "{} different", delays.len());
        assert_eq!(random(Duration::from_secs(1), Duration::from_secs(1)), Duration::from_secs(1));
    }
}
