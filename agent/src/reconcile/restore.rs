//! What an agent before this one left in the tables: read back before anything is written, so that a restart moves no
//! traffic.

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::abi::lb::Backend;

use super::Config;
use super::hold::{Hold, Restored};
use super::policy::Policies;
use super::tables::{PortState, Tables, enforced, range_of};
use crate::maps::{
    ArrayTable, Backends, Endpoints, Frontends, HashTable, MapError, Maps, Services, Slots, SourceRanges,
};
use crate::model::Name;
use crate::plan;
use crate::plan::ids::Numbers;
use crate::plan::ranges::Ranges;

/// Reads all tables. What rested then is free now: no program runs on one packet for as long as an agent takes to
/// start. What has no known owner gets one that no Service is called, and goes when that is planned.
pub(super) fn restore<M: Maps>(maps: M, config: &Config) -> Result<Tables<M>, MapError> {
    let mut found = BTreeMap::new();
    for (id, text) in maps.dump::<Services>()? {
        let names = text.as_str().and_then(plan::names_of);
        let state =
            names.map(|(name, port)| (name, PortState::new(id, port))).unwrap_or_else(|| nameless(id));
        found.insert(id, state);
    }
    let mut ranges = Ranges::new(Slots::NAME, maps.len::<Slots>());
    let mut frontends = BTreeMap::new();
    for (key, row) in maps.dump::<Frontends>()? {
        found.entry(row.service).or_insert_with(|| nameless(row.service)).1.frontends.push(key);
        ranges.name(range_of(&row));
        frontends.insert(key, row);
    }
    let mut sources = maps.dump::<SourceRanges>()?;
    sources.sort_unstable();
    for (key, verdict) in sources {
        let id = key.data.service;
        found.entry(id).or_insert_with(|| nameless(id)).1.sources.push((key, verdict));
    }
    let used = live_backends(&maps, &mut found)?;
    let endpoints: BTreeMap<_, _> = maps.dump::<Endpoints>()?.into_iter().collect();
    // Twice as many ids as services: those that were released rest.
    let ids = Numbers::restore(
        Services::NAME,
        config.limits.services.saturating_mul(2).saturating_add(1),
        found.keys().copied(),
    );
    let indices = Numbers::restore(Backends::NAME, maps.len::<Backends>(), used);
    let mut services: BTreeMap<Name, Vec<PortState>> = BTreeMap::new();
    let mut owners = BTreeMap::new();
    for (id, (name, state)) in found {
        owners.insert(id, name.clone());
        services.entry(name).or_default().push(state);
    }
    for ports in services.values_mut() {
        ports.sort_by(|a, b| a.name.cmp(&b.name));
    }
    let policies = Policies::restore(&maps, config.plan.live_flows)?;
    let held = if policies.counts()[0] > 0 { Restored::Held } else { Restored::Planned };
    Ok(Tables {
        maps,
        limits: config.limits,
        plan: config.plan.clone(),
        grace: config.grace,
        clock: config.clock,
        ids,
        indices,
        ranges,
        hold: Hold::new(services.keys().cloned(), endpoints.keys().copied(), held),
        services,
        owners,
        cluster_ips: frontends.keys().filter(|key| key.is_cluster_ip()).count(),
        frontends,
        // Where that was not told yet, the first row that is written tells it.
        enforced: enforced(&endpoints),
        endpoints,
        freed: false,
        displaced: BTreeSet::new(),
        policies,
    })
}

/// The rows in use, noted with their owners.
fn live_backends<M: Maps>(
    maps: &M,
    found: &mut BTreeMap<u32, (Name, PortState)>,
) -> Result<Vec<u32>, MapError> {
    let mut used = Vec::new();
    for index in 1..maps.len::<Backends>() {
        let row = maps.read::<Backends>(index)?;
        if row.flags & Backend::LIVE != 0 {
            found.entry(row.service).or_insert_with(|| nameless(row.service)).1.backends.push(index);
            used.push(index);
        }
    }
    Ok(used)
}

fn nameless(id: u32) -> (Name, PortState) {
    (Name::new("", format!("id {id}")), PortState::new(id, ""))
}
