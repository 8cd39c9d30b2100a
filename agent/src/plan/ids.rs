//! Numbers that name rows: restored, reused, and released late.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

/// A table has no room for what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("table `{table}` has no room for {asked} more rows of {limit}: raise its size")]
pub struct Exhausted {
    pub table: &'static str,
    pub asked: u32,
    pub limit: u32,
}

/// Gives out numbers from 1; the lowest free one first, so that tables stay dense.
#[derive(Debug)]
pub struct Numbers {
    table: &'static str,
    /// The first number that is never given out.
    end: u32,
    /// Every number from here on is free.
    next: u32,
    /// Free ones below `next`.
    free: BTreeSet<u32>,
    /// Released ones, and until when they rest; in the order of release.
    resting: VecDeque<(Instant, u32)>,
}

impl Numbers {
    /// With the numbers that are in use already, in ascending order. What is not below `end` was given out by someone
    /// else and is let be.
    pub fn restore(table: &'static str, end: u32, used: impl IntoIterator<Item = u32>) -> Self {
        let mut numbers = Self { table, end, next: 1, free: BTreeSet::new(), resting: VecDeque::new() };
        for number in used.into_iter().filter(|number| (1..end).contains(number)) {
            numbers.free.extend(numbers.next..number);
            numbers.next = numbers.next.max(number + 1);
        }
        numbers
    }

    /// # Errors
    /// Where all numbers are in use or rest.
    pub fn take(&mut self, now: Instant) -> Result<u32, Exhausted> {
        while let Some((_, number)) = self.resting.pop_front_if(|(until, _)| *until <= now) {
            self.free.insert(number);
        }
        if let Some(number) = self.free.pop_first() {
            return Ok(number);
        }
        if self.next >= self.end {
            return Err(Exhausted { table: self.table, asked: 1, limit: self.end.saturating_sub(1) });
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    /// Gives back a number that nobody has seen.
    pub fn give_back(&mut self, number: u32) {
        if (1..self.end).contains(&number) {
            self.free.insert(number);
        }
    }

    /// Gives back a number that a program or a flow may still use for a while.
    pub fn rest(&mut self, number: u32, until: Instant) {
        if (1..self.end).contains(&number) {
            self.resting.push_back((until, number));
        }
    }

    /// How many are given out and not given back.
    pub fn used(&self) -> usize {
        (self.next - 1) as usize - self.free.len() - self.resting.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_number_rests_before_it_is_reused() {
        let now = Instant::now();
        let grace = Duration::from_secs(5);
        let mut numbers = Numbers::restore("t", 4, []);
        let taken: Vec<_> = (0..3).map(|_| numbers.take(now).unwrap()).collect();
        assert_eq!(taken, [1, 2, 3], "0 is no number");
        assert_eq!(numbers.take(now), Err(Exhausted { table: "t", asked: 1, limit: 3 }));
        numbers.rest(2, now + grace);
        numbers.rest(1, now + grace);
        assert_eq!(numbers.used(), 1);
        assert!(numbers.take(now + grace / 2).is_err());
        assert_eq!(numbers.take(now + grace), Ok(1), "the lowest first");
        numbers.give_back(1);
        assert_eq!(numbers.take(now + grace), Ok(1), "nobody had seen it");
        assert_eq!(numbers.take(now + grace), Ok(2));
    }

    #[test]
    fn restored_numbers_are_in_use_and_gaps_are_free() {
        let now = Instant::now();
        let mut numbers = Numbers::restore("t", 100, [0, 2, 5, 100, u32::MAX]);
        assert_eq!(numbers.used(), 2);
        let taken: Vec<_> = (0..4).map(|_| numbers.take(now).unwrap()).collect();
        assert_eq!(taken, [1, 3, 4, 6]);
        numbers.rest(u32::MAX, now);
        numbers.give_back(0);
        assert_eq!(numbers.take(now), Ok(7), "foreign numbers do not come in by the back door");
    }
}
