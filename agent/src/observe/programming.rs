//! How long it takes from a change of endpoints in the cluster until this node's tables say so (rule 42).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::model::Name;

/// Changes of one Service that wait at once; of one that fails for long, those that came first are measured.
const MOST: usize = 100;

#[derive(Debug)]
pub(super) struct Programming {
    start: Instant,
    /// What the tables do not say yet.
    waiting: BTreeMap<Name, Vec<Came>>,
}

/// How old a change was when it came, and when that was. The cluster says when it came about by the wall clock, which may be
/// set while the change waits.
type Came = (Duration, Instant);

impl Programming {
    pub(super) fn new(start: Instant) -> Self {
        Self { start, waiting: BTreeMap::new() }
    }

    /// What came about before this agent started waited for its start, and says nothing of how fast it is.
    pub(super) fn triggered(&mut self, service: Name, age: Duration, now: Instant) {
        if age >= now.saturating_duration_since(self.start) {
            return;
        }
        let waiting = self.waiting.entry(service).or_default();
        if waiting.len() < MOST {
            waiting.push((age, now));
        }
    }

    /// The durations of those changes that are programmed by now.
    pub(super) fn finish(&mut self, now: Instant, is_programmed: impl Fn(&Name) -> bool) -> Vec<Duration> {
        let done = self.waiting.extract_if(.., |service, _| is_programmed(service));
        done.flat_map(|(_, came)| came).map(|(age, at)| age + now.saturating_duration_since(at)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn rule_42_what_came_about_before_the_start_is_not_measured() {
        let start = Instant::now();
        let (web, dns) = (Name::new("shop", "web"), Name::new("kube-system", "dns"));
        let mut programming = Programming::new(start);
        // Whatever the wall clock said at the start: it may have been set since.
        programming.triggered(web.clone(), seconds(2), start + seconds(1));
        programming.triggered(web.clone(), seconds(1), start + seconds(1));
        assert!(programming.finish(start + seconds(1), |_| true).is_empty());
        programming.triggered(web.clone(), seconds(1), start + seconds(2));
        programming.triggered(web.clone(), seconds(0), start + seconds(3));
        programming.triggered(dns, seconds(0), start + seconds(2));
        assert!(programming.finish(start + seconds(4), |_| false).is_empty());
        let measured = programming.finish(start + seconds(4), |name| *name == web);
        assert_eq!(measured, [seconds(3), seconds(1)], "each change once");
        assert_eq!(programming.finish(start + seconds(9), |_| true), [seconds(7)]);
        assert!(programming.finish(start + seconds(9), |_| true).is_empty());
    }

    #[test]
    fn a_service_that_fails_for_ever_does_not_fill_the_memory() {
        let start = Instant::now();
        let mut programming = Programming::new(start);
        for second in 1..=500 {
            programming.triggered(Name::new("shop", "web"), seconds(0), start + seconds(second));
        }
        assert_eq!(programming.finish(start + seconds(501), |_| true).len(), MOST);
    }
}
