//! Whether this node serves at all: `/healthz` and `/livez` on port 10256 (rule 41).

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Answer, Verdict};
use crate::model::Stay;

/// How long a change may wait until the node is called unhealthy: twice what kube-proxy takes between two syncs.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How far the tables are behind what is known. Healthy while it starts; takes its clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Proxy {
    /// Since when there has been something that is not in the tables.
    pending: Option<Instant>,
    updated: Option<Stamp>,
    node: Stay,
}

/// A moment as it is shown: seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(pub i64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The tables say what the objects say.
    Done,
    Pending,
}

impl Proxy {
    /// To be told whenever something changed or was written.
    pub fn progress(&mut self, progress: Progress, now: Instant, stamp: Stamp) {
        match progress {
            Progress::Done => {
                self.pending = None;
                self.updated = Some(stamp);
            }
            Progress::Pending => {
                self.pending.get_or_insert(now);
            }
        }
    }

    pub fn node(&mut self, node: Stay) {
        self.node = node;
    }

    pub fn verdict(&self, now: Instant) -> Verdict {
        let late = |since: Instant| now.saturating_duration_since(since) >= TIMEOUT;
        Verdict::from(!self.pending.is_some_and(late))
    }

    /// For load balancers.
    pub fn healthz(&self, now: Instant, stamp: Stamp) -> Answer {
        let eligible = self.node == Stay::Stays;
        let verdict = Verdict::from(self.verdict(now) == Verdict::Healthy && eligible);
        let body = json!({
            "lastUpdated": self.last_updated(now, stamp), "currentTime": stamp.text(), "nodeEligible": eligible,
        });
        Answer::new(verdict, body.to_string())
    }

    /// For the kubelet: a node that goes is no reason to restart the agent.
    pub fn livez(&self, now: Instant, stamp: Stamp) -> Answer {
        let body = json!({ "lastUpdated": self.last_updated(now, stamp), "currentTime": stamp.text() });
        Answer::new(self.verdict(now), body.to_string())
    }

    /// Where all is well, nothing is older than now: kube-proxy says so, and monitors compare the two.
    fn last_updated(&self, now: Instant, stamp: Stamp) -> String {
        match self.verdict(now) {
            Verdict::Healthy => stamp.text(),
            Verdict::Unhealthy => self.updated.unwrap_or(Stamp(0)).text(),
        }
    }
}

impl Stamp {
    /// As RFC 3339 writes it, in UTC. Days to dates as in "chrono-Compatible Low-Level Date Algorithms" (Hinnant).
    fn text(self) -> String {
        let (days, second) = (self.0.div_euclid(86_400), self.0.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        // Years begin in March here.
        let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let (year, minute) = (year + era * 400 + carry, second / 60);
        let (hour, minute, second) = (minute / 60, minute % 60, second % 60);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: Stamp = Stamp(951_782_400);

    fn body(answer: &Answer) -> serde_json::Value {
        serde_json::from_str(&answer.body).unwrap()
    }

    #[test]
    fn rule_41_healthy_while_it_starts_and_until_a_change_has_waited_too_long() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut proxy = Proxy::default();
        assert_eq!(proxy.healthz(at(500), THEN).status, 200);
        proxy.progress(Progress::Pending, at(0), THEN);
        proxy.progress(Progress::Pending, at(50), THEN);
        assert_eq!(proxy.healthz(at(59), THEN).status, 200);
        assert_eq!((proxy.healthz(at(60), THEN).status, proxy.livez(at(60), THEN).status), (503, 503));
        proxy.progress(Progress::Done, at(61), THEN);
        assert_eq!(proxy.healthz(at(500), THEN).status, 200);
        proxy.progress(Progress::Pending, at(500), THEN);
        let answer = proxy.healthz(at(560), Stamp(951_782_460));
        assert_eq!(
            body(&answer),
            json!({"lastUpdated": "2000-02-29T00:00:00Z", "currentTime": "2000-02-29T00:01:00Z", "nodeEligible": true})
        );
    }

    #[test]
    fn rule_41_a_node_that_leaves_gets_no_new_connections_and_lives() {
        let mut proxy = Proxy::default();
        proxy.node(Stay::Leaves);
        let now = Instant::now();
        let answer = proxy.healthz(now, THEN);
        assert_eq!((answer.status, &body(&answer)["nodeEligible"]), (503, &json!(false)));
        let answer = proxy.livez(now, THEN);
        assert_eq!((answer.status, body(&answer).get("nodeEligible")), (200, None));
    }

    #[test]
    fn moments_are_shown_as_dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(Stamp(seconds).text(), text);
        }
    }
}
