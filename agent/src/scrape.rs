//! What a scrape finds: gathered where the tables' writer and the model are at hand, and shown by [`crate::observe`].

use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::clock;
use crate::gc::Swept;
use crate::health::server::Answered;
use crate::heap;
use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::model::Kind;
use crate::observe::locality::no_local;
use crate::observe::{Fill, View};
use crate::reconcile::{Reconciler, Stats};

/// What is known besides the reconciler.
#[derive(Debug)]
pub(crate) struct Gauges {
    pub(crate) started: SystemTime,
    pub(crate) swept: watch::Receiver<Swept>,
}

impl Gauges {
    /// `problems` are refused, and the source is away since `away_since` (seconds of `CLOCK_MONOTONIC`; 0: it is not).
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn view(
        &self,
        reconciler: &Reconciler<KernelMaps>,
        answered: Answered,
        (problems, away_since): (u32, u32),
    ) -> Result<View, MapError> {
        let (stats, world, swept) = (reconciler.stats(), reconciler.world(), *self.swept.borrow());
        let away = if away_since == 0 { 0 } else { clock::seconds().saturating_sub(away_since) };
        Ok(View {
            fills: fills(reconciler, swept)?,
            drops: reconciler.maps().drops()?,
            swept: swept.deleted,
            writes: stats.writes,
            failures: stats.failures,
            objects: Kind::ALL.map(|kind| (kind, world.count(kind))).into(),
            problems,
            away: Duration::from_secs(u64::from(away)),
            started: self.started,
            no_local: no_local(world),
            answered,
            heap: heap::in_use(),
        })
    }
}

/// Of the tables whose rows somebody has counted anyhow.
fn fills(reconciler: &Reconciler<KernelMaps>, swept: Swept) -> Result<Vec<Fill>, MapError> {
    let Stats { services, backends, slots, endpoints, policy_sets, policy_rules, peers, .. } =
        reconciler.stats();
    let frontends = reconciler.frontend_rows();
    let tables = [
        ("services", services as u64),
        ("frontends", frontends as u64),
        ("backends", backends as u64),
        ("slots", slots),
        ("endpoints", endpoints as u64),
        ("policy_sets", policy_sets as u64),
        ("policy", policy_rules as u64),
        ("ipcache", peers as u64),
    ];
    let flows = swept.left.map(|left| [("conntrack_v4", left.v4), ("conntrack_v6", left.v6)]);
    let fill = |(map, entries)| Ok(Fill { map, entries, capacity: reconciler.maps().capacity_of(map)? });
    tables.into_iter().chain(flows.into_iter().flatten()).map(fill).collect()
}
