//! Now and then everything that this agent attached, pinned and laid is looked at: somebody may have removed it.

use std::time::{Duration, Instant};

use crate::datapath::{Datapath, Found, Interface};
use crate::net::routes::Laid;

/// Between two walks: with the time that one takes, what was removed is back within ten seconds.
const INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(crate) struct Patrol {
    /// When to look; at once the first time.
    due: Option<Instant>,
    /// Of the routes, as of the last walk.
    repairs: u64,
    /// What could not be repaired then.
    failing: Vec<String>,
}

impl Patrol {
    /// Looks, where it is time to, and says what was missing and is there again.
    pub(crate) fn walk(
        &mut self,
        datapath: &mut Datapath,
        interfaces: impl Iterator<Item = (Interface, u32)>,
        laid: Laid,
        now: Instant,
    ) -> Vec<String> {
        if self.due.is_some_and(|due| now < due) {
            return Vec::new();
        }
        self.due = Some(now + INTERVAL);
        let Found { mut repaired, failed } = datapath.patrol(interfaces);
        if laid.repairs > self.repairs {
            let times = laid.repairs - self.repairs;
            repaired.push(format!("routes between nodes: made again ({times} times)"));
            self.repairs = laid.repairs;
        }
        let failing: Vec<_> = failed.iter().map(ToString::to_string).collect();
        for error in failing.iter().filter(|error| !self.failing.contains(error)) {
            tracing::warn!(%error, "something of the datapath is not as it should be; trying again");
        }
        self.failing = failing;
        repaired
    }
}
