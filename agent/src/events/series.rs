//! Which notes become events, and which only count: pure, takes its clock.
//!
//! The same note again is a series: its count is posted at most every [`SERIES`], as the API's own conventions have it
//! (events.k8s.io/v1 `EventSeries`; client-go posts a series that goes on every 6 minutes). New events are bounded by a
//! bucket: 25 at once, then one in 12 seconds, so that 5,000 nodes that all see one fault in 1,000 objects post 125,000
//! events at first and 417 a second after that, which events' own expiry bounds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Note;

/// How often a series is posted again.
pub const SERIES: Duration = Duration::from_secs(360);

/// After so long without it, a note is a new event.
const FORGOTTEN: Duration = Duration::from_secs(900);

const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(12);

/// Notes that were posted and may go on.
#[derive(Debug)]
pub struct Series {
    posted: BTreeMap<Note, Posted>,
    tokens: u32,
    refilled: Instant,
}

#[derive(Debug)]
struct Posted {
    /// The name of the event.
    event: Box<str>,
    count: u32,
    seen: Instant,
    said: Instant,
}

/// What is to be posted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Post {
    /// A new event; whoever posts it tells its [name](Series::posted).
    Create,
    /// The event of this name has happened so often.
    Patch { event: Box<str>, count: u32 },
}

impl Series {
    pub fn new(now: Instant) -> Self {
        Self { posted: BTreeMap::new(), tokens: BURST, refilled: now }
    }

    /// What to do about a note; `None` where it only counts, or there are too many.
    pub fn take(&mut self, note: &Note, now: Instant) -> Option<Post> {
        self.posted.retain(|_, posted| now.saturating_duration_since(posted.seen) < FORGOTTEN);
        self.refill(now);
        if let Some(posted) = self.posted.get_mut(note) {
            posted.count = posted.count.saturating_add(1);
            posted.seen = now;
            // The second time makes a series of it; from there on seldom.
            let due = posted.count == 2 || now.saturating_duration_since(posted.said) >= SERIES;
            return due.then(|| {
                posted.said = now;
                Post::Patch { event: posted.event.clone(), count: posted.count }
            });
        }
        self.tokens = self.tokens.checked_sub(1)?;
        Some(Post::Create)
    }

    /// The note is now an event of this name.
    pub fn posted(&mut self, note: Note, event: Box<str>, now: Instant) {
        self.posted.insert(note, Posted { event, count: 1, seen: now, said: now });
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled).as_secs() / REFILL.as_secs();
        let refills = u32::try_from(passed).unwrap_or(u32::MAX);
        self.tokens = self.tokens.saturating_add(refills).min(BURST);
        self.refilled += REFILL.saturating_mul(refills);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reason;
    use super::*;
    use crate::model::{Kind, Name, ObjectId};

    fn note(name: &str) -> Note {
        let object = ObjectId { kind: Kind::Service, name: Name::new("default", name) };
        Note { object, reason: Reason::ServiceConflict, message: "taken".into() }
    }

    #[test]
    fn the_same_again_is_a_series_that_is_posted_seldom() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut series = Series::new(start);
        assert_eq!(series.take(&note("a"), at(0)), Some(Post::Create));
        series.posted(note("a"), "a.1".into(), at(0));
        let patch = |count| Some(Post::Patch { event: "a.1".into(), count });
        assert_eq!(series.take(&note("a"), at(1)), patch(2));
        for second in 2..300 {
            assert_eq!(series.take(&note("a"), at(second)), None);
        }
        assert_eq!(series.take(&note("a"), at(361)), patch(301));
        let other = Note { message: "taken by another".into(), ..note("a") };
        assert_eq!(series.take(&other, at(362)), Some(Post::Create));
        assert_eq!(series.take(&note("a"), at(361 + 900)), Some(Post::Create), "after a long silence");
    }

    #[test]
    fn new_events_are_bounded() {
        let start = Instant::now();
        let mut series = Series::new(start);
        let mut posted = |seconds: u64| {
            let now = start + Duration::from_secs(seconds);
            (0..100).filter(|index| series.take(&note(&format!("{seconds}-{index}")), now).is_some()).count()
        };
        assert_eq!([posted(0), posted(1), posted(12), posted(48)], [25, 0, 1, 3]);
        assert_eq!(posted(86_400), 25, "no more than that after any silence");
    }
}
