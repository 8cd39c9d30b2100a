//! Slot ranges: best fit, coalescing, released late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use super::ids::Exhausted;

/// A run of slots that frontends name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    pub offset: u32,
    pub length: u32,
}

/// Gives out ranges and counts the frontends that name each.
#[derive(Debug)]
pub struct Ranges {
    table: &'static str,
    limit: u32,
    /// Free ranges by offset; no two of them touch.
    free: BTreeMap<u32, u32>,
    /// The same by length, then offset.
    by_length: BTreeSet<(u32, u32)>,
    /// Ranges that are given out, and how many frontends name each.
    named: BTreeMap<Range, u32>,
    /// Released ones, and until when they rest; in the order of release.
    resting: VecDeque<(Instant, Range)>,
    /// Slots of all named ranges.
    used: u64,
}

impl Ranges {
    pub fn new(table: &'static str, limit: u32) -> Self {
        let mut ranges = Self {
            table,
            limit,
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            named: BTreeMap::new(),
            resting: VecDeque::new(),
            used: 0,
        };
        ranges.release(Range { offset: 0, length: limit });
        ranges
    }

    /// A fresh range that no frontend names yet: the shortest that is long enough, and the first of those.
    ///
    /// # Errors
    /// Where no free range is long enough.
    pub fn take(&mut self, length: u32, now: Instant) -> Result<Range, Exhausted> {
        while let Some((_, range)) = self.resting.pop_front_if(|(until, _)| *until <= now) {
            self.release(range);
        }
        let Some(&(_, offset)) = self.by_length.range((length, 0)..).next() else {
            return Err(Exhausted { table: self.table, asked: length, limit: self.limit });
        };
        let range = Range { offset, length };
        self.carve(range);
        self.insert_named(range, 0);
        Ok(range)
    }

    /// Gives back what [`Ranges::take`] gave, unless a frontend names it by now.
    pub fn give_back(&mut self, range: Range) {
        if self.named.get(&range) == Some(&0) {
            self.remove_named(range);
            self.release(range);
        }
    }

    /// One more frontend names the range, which may be one that rests: what it says is still there. At restore it may
    /// be one that was never given out; one that overlaps another or does not exist is not taken in.
    pub fn name(&mut self, range: Range) {
        if let Some(frontends) = self.named.get_mut(&range) {
            *frontends += 1;
        } else if let Some(at) = self.resting.iter().position(|(_, other)| *other == range) {
            self.resting.remove(at);
            self.insert_named(range, 1);
        } else if self.carve(range) {
            self.insert_named(range, 1);
        }
    }

    /// One frontend less names the range; after the last one it rests.
    pub fn unname(&mut self, range: Range, until: Instant) {
        let Some(frontends) = self.named.get_mut(&range) else { return };
        *frontends = frontends.saturating_sub(1);
        if *frontends == 0 {
            self.remove_named(range);
            self.resting.push_back((until, range));
        }
    }

    /// Whether the range is given out as it is.
    pub fn is_named(&self, range: Range) -> bool {
        self.named.contains_key(&range)
    }

    /// How many slots are given out.
    pub fn used(&self) -> u64 {
        self.used
    }

    fn insert_named(&mut self, range: Range, frontends: u32) {
        self.named.insert(range, frontends);
        self.used += u64::from(range.length);
    }

    fn remove_named(&mut self, range: Range) {
        self.named.remove(&range);
        self.used -= u64::from(range.length);
    }

    /// Cuts a range out of the free one that contains it, if one does.
    fn carve(&mut self, range: Range) -> bool {
        let Some((&offset, &length)) = self.free.range(..=range.offset).next_back() else { return false };
        let (end, range_end) =
            (u64::from(offset) + u64::from(length), u64::from(range.offset) + u64::from(range.length));
        if range.length == 0 || range_end > end {
            return false;
        }
        self.remove_free(offset, length);
        self.insert_free(offset, range.offset - offset);
        self.insert_free(range.offset + range.length, (end - range_end) as u32);
        true
    }

    /// Makes a range free, as one with its free neighbours.
    fn release(&mut self, range: Range) {
        let Range { mut offset, mut length } = range;
        if let Some((&before, &its_length)) = self.free.range(..offset).next_back()
            && before + its_length == offset
        {
            self.remove_free(before, its_length);
            (offset, length) = (before, its_length + length);
        }
        if let Some(&its_length) = self.free.get(&(offset + length)) {
            self.remove_free(offset + length, its_length);
            length += its_length;
        }
        self.insert_free(offset, length);
    }

    fn insert_free(&mut self, offset: u32, length: u32) {
        if length > 0 {
            self.free.insert(offset, length);
            self.by_length.insert((length, offset));
        }
    }

    fn remove_free(&mut self, offset: u32, length: u32) {
        self.free.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn range(offset: u32, length: u32) -> Range {
        Range { offset, length }
    }

    #[test]
    fn the_best_fit_is_taken_and_neighbours_grow_together() {
        let now = Instant::now();
        let mut ranges = Ranges::new("slots", 20);
        let taken: Vec<_> = [4, 2, 4, 3, 4].map(|length| ranges.take(length, now).unwrap()).into();
        assert_eq!(taken, [range(0, 4), range(4, 2), range(6, 4), range(10, 3), range(13, 4)]);
        for released in [1, 3] {
            ranges.give_back(taken[released]);
        }
        assert_eq!(ranges.take(3, now), Ok(range(10, 3)), "not the 3 at the end: the first of the shortest");
        ranges.give_back(range(10, 3));
        assert_eq!(ranges.take(2, now), Ok(range(4, 2)));
        ranges.give_back(range(6, 4));
        assert_eq!(ranges.take(7, now), Ok(range(6, 7)), "4 and 3 became one");
        assert_eq!(ranges.take(4, now), Err(Exhausted { table: "slots", asked: 4, limit: 20 }));
        assert_eq!(ranges.used(), 17);
        assert_eq!(ranges.take(3, now), Ok(range(17, 3)));
    }

    #[test]
    fn a_range_rests_after_its_last_frontend() {
        let now = Instant::now();
        let later = now + Duration::from_secs(5);
        let mut ranges = Ranges::new("slots", 4);
        let taken = ranges.take(4, now).unwrap();
        ranges.name(taken);
        ranges.name(taken);
        ranges.give_back(taken);
        assert!(ranges.is_named(taken), "named ranges are not given back");
        ranges.unname(taken, later);
        assert!(ranges.is_named(taken));
        ranges.unname(taken, later);
        assert!(!ranges.is_named(taken) && ranges.take(1, now).is_err());
        assert_eq!(ranges.take(4, later), Ok(taken));
    }

    #[test]
    fn a_range_that_rests_may_be_named_again() {
        let now = Instant::now();
        let mut ranges = Ranges::new("slots", 4);
        let taken = ranges.take(4, now).unwrap();
        ranges.name(taken);
        ranges.unname(taken, now);
        ranges.name(taken);
        assert!(ranges.is_named(taken) && ranges.take(1, now).is_err());
        assert_eq!(ranges.used(), 4);
    }

    #[test]
    fn restored_ranges_must_exist_and_not_overlap() {
        let mut ranges = Ranges::new("slots", 10);
        for (restored, taken_in) in [
            (range(2, 3), true),
            (range(2, 3), true),
            (range(4, 2), false),
            (range(0, 3), false),
            (range(8, 3), false),
            (range(u32::MAX, 2), false),
            (range(8, 2), true),
        ] {
            ranges.name(restored);
            assert_eq!(ranges.is_named(restored), taken_in, "{restored:?}");
        }
        assert_eq!(ranges.take(3, Instant::now()), Ok(range(5, 3)));
    }

    /// Every slot is in exactly one of: free, given out, resting.
    #[test]
    fn no_slot_is_lost_or_given_twice() {
        let start = Instant::now();
        let (mut seed, mut held) = (1u64, Vec::new());
        let mut ranges = Ranges::new("slots", 100);
        for step in 0..5_000u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (now, dice) = (start + Duration::from_secs(step), (seed >> 33) as usize);
            if dice.is_multiple_of(2)
                && let Ok(taken) = ranges.take(1 + (dice / 2 % 9) as u32, now)
            {
                ranges.name(taken);
                held.push(taken);
            } else if !held.is_empty() {
                ranges.unname(held.swap_remove(dice / 2 % held.len()), now + Duration::from_secs(3));
            }
            let free = ranges.free.iter().map(|(&offset, &length)| range(offset, length));
            let resting = ranges.resting.iter().map(|(_, range)| *range);
            let mut all: Vec<_> = free.chain(resting).chain(held.iter().copied()).collect();
            all.sort_unstable();
            let mut end = 0;
            for it in all {
                assert_eq!(it.offset, end, "step {step}");
                end += it.length;
            }
            assert_eq!(end, 100, "step {step}");
            assert_eq!(ranges.free.len(), ranges.by_length.len());
            assert_eq!(ranges.used(), held.iter().map(|range| u64::from(range.length)).sum::<u64>());
        }
    }
}
