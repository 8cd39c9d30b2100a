//! How long it takes from a change of endpoints in the cluster until this node's tables say so (rule 42).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use crate::model::Name;

/// Changes of one Service that wait at once; of one that fails for long, those that came first are measured.
const MOST: usize = 100;

#[derive(Debug)]
pub(super) struct Programming {
    start: SystemTime,
    /// When that came about which the tables do not say yet.
    waiting: BTreeMap<Name, Vec<SystemTime>>,
}

impl Programming {
    pub(super) fn new(start: SystemTime) -> Self {
        Self { start, waiting: BTreeMap::new() }
    }

    /// What came about before this agent started waited for its start, and says nothing of how fast it is.
    pub(super) fn triggered(&mut self, service: Name, at: SystemTime) {
        if at <= self.start {
            return;
        }
        let waiting = self.waiting.entry(service).or_default();
        if waiting.len() < MOST {
            waiting.push(at);
        }
    }

    /// The durations of those changes that are programmed by now.
    pub(super) fn finish(&mut self, now: SystemTime, is_programmed: impl Fn(&Name) -> bool) -> Vec<Duration> {
        let done = self.waiting.extract_if(.., |service, _| is_programmed(service));
        // The clocks of two machines differ: what seems to come took no time.
        done.flat_map(|(_, times)| times).map(|at| now.duration_since(at).unwrap_or_default()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_42_what_came_about_before_the_start_is_not_measured() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let (web, dns) = (Name::new("shop", "web"), Name::new("kube-system", "dns"));
        let mut programming = Programming::new(start);
        programming.triggered(web.clone(), at(999));
        programming.triggered(web.clone(), at(1_000));
        assert!(programming.finish(at(1_001), |_| true).is_empty());
        programming.triggered(web.clone(), at(1_001));
        programming.triggered(web.clone(), at(1_003));
        programming.triggered(dns, at(1_002));
        assert!(programming.finish(at(1_004), |_| false).is_empty());
        let seconds = [3, 1].map(Duration::from_secs);
        assert_eq!(programming.finish(at(1_004), |name| *name == web), seconds, "each change once");
        assert_eq!(programming.finish(at(1_000), |_| true), [Duration::ZERO], "of a clock that is ahead");
        assert!(programming.finish(at(1_009), |_| true).is_empty());
    }

    #[test]
    fn a_service_that_fails_for_ever_does_not_fill_the_memory() {
        let mut programming = Programming::new(SystemTime::UNIX_EPOCH);
        for second in 1..=500 {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
            programming.triggered(Name::new("shop", "web"), at);
        }
        assert_eq!(programming.finish(SystemTime::now(), |_| true).len(), MOST);
    }
}
