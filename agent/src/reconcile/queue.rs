//! What is to be looked at, and when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::Touched;

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// To be looked at now.
    dirty: BTreeSet<Touched>,
    /// Since when there is something to look at.
    since: Option<Instant>,
    /// What failed when it was last looked at.
    failing: BTreeMap<Touched, Failing>,
}

#[derive(Debug)]
struct Failing {
    error: Box<str>,
    attempts: u32,
    /// When to try again.
    due: Instant,
}

impl Queue {
    pub(super) fn touch(&mut self, key: Touched, now: Instant) {
        self.dirty.insert(key);
        self.since.get_or_insert(now);
    }

    /// At most `limit` keys to look at; what failed and is due comes first.
    pub(super) fn take(&mut self, limit: usize, now: Instant) -> Vec<Touched> {
        let due = self.failing.iter().filter(|(_, failing)| failing.due <= now).take(limit);
        let mut keys: Vec<_> = due.map(|(key, _)| key.clone()).collect();
        for key in &keys {
            self.dirty.remove(key);
        }
        while keys.len() < limit
            && let Some(key) = self.dirty.pop_first()
        {
            keys.push(key);
        }
        if self.dirty.is_empty() {
            self.since = None;
        }
        keys
    }

    pub(super) fn succeeded(&mut self, key: &Touched) {
        if self.failing.remove(key).is_some() {
            tracing::info!("{key}: programmed");
        }
    }

    pub(super) fn failed(&mut self, key: Touched, error: Box<str>, now: Instant) {
        let failing = self.failing.get(&key);
        if failing.is_none_or(|failing| failing.error != error) {
            tracing::warn!("{key}: {error}");
        }
        let attempts = failing.map_or(0, |failing| failing.attempts + 1);
        let due = now + LONGEST_WAIT.min(SHORTEST_WAIT.saturating_mul(1 << attempts.min(16)));
        self.failing.insert(key, Failing { error, attempts, due });
    }

    /// Tries everything again at once: what stood in the way may be gone.
    pub(super) fn hurry(&mut self, now: Instant) {
        for failing in self.failing.values_mut() {
            failing.due = now;
        }
    }

    /// When [`Queue::take`] has something to give.
    pub(super) fn due(&self) -> Option<Instant> {
        let retry = self.failing.values().map(|failing| failing.due).min();
        self.since.into_iter().chain(retry).min()
    }

    /// Whether the key waits for its first try or for another one.
    pub(super) fn has(&self, key: &Touched) -> bool {
        self.dirty.contains(key) || self.failing.contains_key(key)
    }

    pub(super) fn dirty(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn failing(&self) -> impl ExactSizeIterator<Item = (&Touched, &str)> {
        self.failing.iter().map(|(key, failing)| (key, &*failing.error))
    }
}

const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Addr;

    use super::*;

    fn key(last: u8) -> Touched {
        Touched::Endpoint(Addr::v4([10, 0, 0, last]))
    }

    #[test]
    fn a_failing_key_waits_longer_each_time_but_not_forever() {
        let mut queue = Queue::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..12 {
            queue.failed(key(1), "no".into(), now);
            let due = queue.due().unwrap();
            waits.push((due - now).as_millis());
            assert_eq!(queue.take(9, due - Duration::from_millis(1)), []);
            assert_eq!(queue.take(9, due), [key(1)]);
            now = due;
        }
        assert_eq!(waits[..4], [50, 100, 200, 400]);
        assert_eq!(waits[10..], [30_000, 30_000]);
        queue.succeeded(&key(1));
        assert_eq!((queue.due(), queue.failing().len()), (None, 0));
    }

    #[test]
    fn a_new_change_does_not_wait() {
        let mut queue = Queue::default();
        let now = Instant::now();
        queue.failed(key(1), "no".into(), now);
        queue.touch(key(1), now);
        queue.touch(key(2), now + Duration::from_secs(9));
        assert_eq!(queue.due(), Some(now));
        assert_eq!(queue.take(1, now), [key(1)]);
        assert_eq!(queue.due(), Some(now));
        assert_eq!(queue.take(1, now), [key(2)]);
        assert_eq!(queue.due(), Some(now + SHORTEST_WAIT), "the failing one, until it succeeds");
    }

    #[test]
    fn everything_is_tried_when_something_was_freed() {
        let mut queue = Queue::default();
        let now = Instant::now();
        queue.failed(key(1), "no".into(), now);
        queue.hurry(now);
        assert_eq!(queue.take(9, now), [key(1)]);
    }
}
