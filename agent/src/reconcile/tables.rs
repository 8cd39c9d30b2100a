//! The tables and what was written to them. A thing is recorded here only after the write it depends on succeeded,
//! so that whatever fails can be planned again from here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::lb::{
    Backend, Frontend, FrontendKey, ServiceName, Slot, SourceRange, SourceRangeKey,
};
use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::policy::{EndpointPolicy, RangeKey};
use ferroflow_common::addr::Addr;

use super::diff::{Step, steps};
use super::hold::Hold;
use super::policy::Policies;
use crate::maps::{
    Backends, Endpoints, ExitAddresses, Frontends, HashTable, MapError, Maps, Masquerades, NodeAddresses,
    NodeTunnels, RelayNodes, RelayPeers, Services, SettingsRow, Slots, SourceRanges, Tunnels,
    UnmasqueradedRanges,
};
use crate::model::{Name, Prefix, Touched};
use crate::plan;
use crate::plan::ids::Numbers;
use crate::plan::node::NodeRows;
use crate::plan::ranges::{Range, Ranges};

#[derive(Debug)]
pub(super) struct Tables<M> {
    pub(super) maps: M,
    pub(super) limits: Limits,
    pub(super) plan: plan::Config,
    pub(super) grace: Duration,
    pub(super) clock: fn() -> u32,
    pub(super) ids: Numbers,
    pub(super) indices: Numbers,
    pub(super) ranges: Ranges,
    pub(super) services: BTreeMap<Name, Vec<PortState>>,
    /// Whose an id is.
    pub(super) owners: BTreeMap<u32, Name>,
    pub(super) frontends: BTreeMap<FrontendKey, Frontend>,
    /// How many of `frontends` only say that an address is a cluster IP.
    pub(super) cluster_ips: usize,
    pub(super) endpoints: BTreeMap<Addr, Endpoint>,
    /// [`Settings::POLICIES`] as long as policies apply to a pod: then the programs are told to ask them.
    pub(super) enforced: u32,
    /// A frontend was removed since this was last asked.
    pub(super) freed: bool,
    /// Services that lost a frontend to another since this was last asked.
    pub(super) displaced: BTreeSet<Name>,
    pub(super) hold: Hold,
    pub(super) policies: Policies,
}

/// How many rows the hash tables of services have room for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Service ports.
    pub services: u32,
    pub frontends: u32,
}

/// Whose the rows of a small table are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// This node's own, of which everything is known.
    This,
    /// Those of all nodes.
    OfNodes,
}

/// One port of a Service as it is in the tables. The rest is read there: arrays are only a load away.
#[derive(Debug)]
pub(super) struct PortState {
    /// The port's name; the ports of a Service are in this order.
    pub(super) name: Box<str>,
    pub(super) id: u32,
    pub(super) frontends: Vec<FrontendKey>,
    /// Indices of live rows.
    pub(super) backends: Vec<u32>,
    /// Sorted.
    pub(super) sources: Vec<(SourceRangeKey, SourceRange)>,
}

/// Writes, in the order in which they are made: nothing is named before it is there, and nothing goes before it is
/// no longer named. Ids have their names first and longest, so that a crash leaves no row of an unknown owner.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) names: Vec<(u32, Box<str>, ServiceName)>,
    pub(super) backends: Vec<(u32, Backend)>,
    pub(super) sources: Vec<(SourceRangeKey, SourceRange)>,
    pub(super) slots: Vec<(Range, Vec<Slot>)>,
    pub(super) frontends: Vec<(FrontendKey, Frontend)>,
    /// Backends that are in other sets than before.
    pub(super) marks: Vec<(u32, Backend)>,
    pub(super) gone_frontends: Vec<FrontendKey>,
    /// Service ids with their ranges.
    pub(super) gone_sources: Vec<(u32, SourceRangeKey)>,
    /// Service ids with their backends.
    pub(super) gone_backends: Vec<(u32, u32)>,
    pub(super) gone_names: Vec<u32>,
}

impl<M: Maps> Tables<M> {
    /// Does the work, which is the Service `name`'s, until a write fails.
    pub(super) fn execute(
        &mut self,
        name: &Name,
        ports: &mut Vec<PortState>,
        work: &Work,
        now: Instant,
    ) -> Result<(), MapError> {
        self.add_rows(name, ports, work)?;
        for (key, row) in &work.frontends {
            self.maps.put::<Frontends>(key, row)?;
            self.record_frontend(*key, Some(*row), ports, now);
        }
        for (index, row) in &work.marks {
            self.maps.write::<Backends>(*index, row)?;
        }
        for key in &work.gone_frontends {
            self.maps.delete::<Frontends>(key)?;
            self.record_frontend(*key, None, ports, now);
            self.freed = true;
        }
        self.remove_rows(ports, work, now)?;
        ports.iter_mut().for_each(PortState::shrink);
        Ok(())
    }

    /// Takes back the numbers that work which failed did not come to use.
    pub(super) fn give_back(&mut self, ports: &[PortState], work: &Work) {
        for (id, ..) in &work.names {
            if ports.iter().all(|port| port.id != *id) {
                self.ids.give_back(*id);
            }
        }
        for (index, _) in &work.backends {
            if !ports.iter().any(|port| port.backends.contains(index)) {
                self.indices.give_back(*index);
            }
        }
        for (range, _) in &work.slots {
            self.ranges.give_back(*range);
        }
    }

    /// Makes the row of a local pod say what it should.
    pub(super) fn apply_endpoint(&mut self, addr: Addr, desired: Option<Endpoint>) -> Result<(), MapError> {
        let old = self.endpoints.get(&addr).copied();
        match desired.map(|row| adopting(old.as_ref(), row, self.clock)) {
            Some(row) if old != Some(row) => {
                if row.is_isolated() {
                    self.enforce(Settings::POLICIES)?;
                }
                self.policies.unjudged |= old.is_some_and(|old| old.policy != row.policy);
                self.maps.put::<Endpoints>(&addr, &row)?;
                self.endpoints.insert(addr, row);
            }
            None if self.endpoints.contains_key(&addr) => {
                self.maps.delete::<Endpoints>(&addr)?;
                self.endpoints.remove(&addr);
            }
            Some(_) | None => return Ok(()),
        }
        self.enforce(enforced(&self.endpoints))
    }

    /// Tells the programs whether to ask policies: before the first pod that these apply to, and no longer than for the
    /// last one.
    fn enforce(&mut self, enforced: u32) -> Result<(), MapError> {
        if self.enforced != enforced {
            let settings = self.maps.read::<SettingsRow>(0)?;
            let flags = settings.flags & !Settings::POLICIES | enforced;
            self.maps.write::<SettingsRow>(0, &Settings { flags, ..settings })?;
            self.enforced = enforced;
        }
        Ok(())
    }

    /// Has the programs judge live flows again, where policies have changed and a pod's flows are to be cut.
    pub(super) fn judge_again(&mut self) -> Result<(), MapError> {
        let cuts = self.endpoints.values().any(|row| row.policy.live == EndpointPolicy::CUT);
        if self.policies.unjudged && cuts {
            let settings = self.maps.read::<SettingsRow>(0)?;
            let epoch = settings.epoch.wrapping_add(1);
            self.maps.write::<SettingsRow>(0, &Settings { epoch, ..settings })?;
            self.policies.unjudged = false;
        }
        Ok(())
    }

    /// The table is small and read back each time.
    pub(super) fn apply_node(&mut self, rows: &NodeRows) -> Result<(), MapError> {
        if self.maps.read::<Masquerades>(0)? != rows.masquerade {
            self.maps.write::<Masquerades>(0, &rows.masquerade)?;
        }
        let flags = rows.settings.flags | self.enforced;
        let old = self.maps.read::<SettingsRow>(0)?;
        let relay = rows.relay.as_ref().map_or(old.relay, |rows| rows.relay);
        let settings = Settings { flags, epoch: old.epoch, relay, ..rows.settings };
        if old != settings {
            // Ranges are taken back before they change: a program must not see half of one.
            if old.ranges != settings.ranges {
                let ranges = Settings::NONE.ranges;
                self.maps.write::<SettingsRow>(0, &Settings { ranges, ..settings })?;
            }
            self.maps.write::<SettingsRow>(0, &settings)?;
        }
        if let Some(relay) = &rows.relay {
            // Last, what leads packets to where the others say.
            self.apply_rows::<RelayPeers>(&relay.peers, Whose::OfNodes)?;
            self.apply_rows::<RelayNodes>(&relay.nodes, Whose::OfNodes)?;
        }
        let key = |range: &Prefix| RangeKey { bits: range.bits().into(), addr: range.addr() };
        let kept = rows.exits.kept.iter().map(|range| (key(range), 1)).collect();
        self.apply_rows::<NodeAddresses>(&rows.addresses, Whose::This)?;
        self.apply_rows::<ExitAddresses>(&rows.exits.addresses, Whose::This)?;
        self.apply_rows::<UnmasqueradedRanges>(&kept, Whose::OfNodes)?;
        let Some(ways) = &rows.tunnels else { return Ok(()) };
        let pods = ways.pods.iter().map(|(range, row)| (key(range), *row)).collect();
        self.apply_rows::<Tunnels>(&pods, Whose::OfNodes)?;
        self.apply_rows::<NodeTunnels>(&ways.nodes, Whose::OfNodes)
    }

    /// Makes a small table what it should be. Rows of nodes that cannot be read stay until they can.
    fn apply_rows<T: HashTable>(
        &mut self,
        desired: &BTreeMap<T::Key, T::Value>,
        whose: Whose,
    ) -> Result<(), MapError> {
        let mut actual = self.maps.dump::<T>()?;
        actual.sort_unstable_by_key(|(key, _)| *key);
        let desired = desired.iter().map(|(key, row)| (*key, (*key, *row)));
        let actual = actual.into_iter().map(|(key, row)| (key, (key, row)));
        for step in steps(desired, actual) {
            match step {
                Step::Add((key, row)) => self.maps.put::<T>(&key, &row)?,
                Step::Keep((key, row), (_, old)) if row != old => self.maps.put::<T>(&key, &row)?,
                Step::Keep(..) => {}
                Step::Remove(_) if whose == Whose::OfNodes && self.hold.holds_nodes() => {
                    self.hold.wait(Touched::Node);
                }
                Step::Remove((key, _)) => self.maps.delete::<T>(&key)?,
            }
        }
        Ok(())
    }

    fn add_rows(&mut self, name: &Name, ports: &mut Vec<PortState>, work: &Work) -> Result<(), MapError> {
        for (id, port, text) in &work.names {
            self.maps.put::<Services>(id, text)?;
            self.owners.insert(*id, name.clone());
            let state = PortState::new(*id, port);
            ports.reserve_exact(1);
            ports.insert(ports.partition_point(|other| other.name < *port), state);
        }
        for (index, row) in &work.backends {
            self.maps.write::<Backends>(*index, row)?;
            if let Some(port) = ports.iter_mut().find(|port| port.id == row.service) {
                port.backends.push(*index);
            }
        }
        for (key, verdict) in &work.sources {
            self.maps.put::<SourceRanges>(key, verdict)?;
            if let Some(port) = ports.iter_mut().find(|port| port.id == key.data.service) {
                port.sources.retain(|(other, _)| other != key);
                let at = port.sources.partition_point(|(other, _)| other < key);
                port.sources.insert(at, (*key, *verdict));
            }
        }
        for (range, contents) in &work.slots {
            for (slot, index) in (range.offset..).zip(contents) {
                self.maps.write::<Slots>(slot, index)?;
            }
        }
        Ok(())
    }

    fn remove_rows(&mut self, ports: &mut Vec<PortState>, work: &Work, now: Instant) -> Result<(), MapError> {
        for (id, key) in &work.gone_sources {
            self.maps.delete::<SourceRanges>(key)?;
            if let Some(port) = ports.iter_mut().find(|port| port.id == *id) {
                port.sources.retain(|(other, _)| other != key);
            }
        }
        for &(id, index) in &work.gone_backends {
            let row = self.maps.read::<Backends>(index)?;
            let generation = row.generation.wrapping_add(1);
            let released = Backend { flags: 0, generation, ..row };
            self.maps.write::<Backends>(index, &released)?;
            self.indices.rest(index, now + self.grace);
            if let Some(port) = ports.iter_mut().find(|port| port.id == id) {
                port.backends.retain(|other| *other != index);
            }
        }
        for &id in &work.gone_names {
            self.maps.delete::<Services>(&id)?;
            self.ids.rest(id, now + self.grace);
            self.owners.remove(&id);
            ports.retain(|port| port.id != id);
        }
        Ok(())
    }

    /// Notes what a frontend now is, and who has it and its slots: it may have been another's.
    fn record_frontend(
        &mut self,
        key: FrontendKey,
        row: Option<Frontend>,
        ports: &mut [PortState],
        now: Instant,
    ) {
        let old = match row {
            Some(row) => self.frontends.insert(key, row),
            None => self.frontends.remove(&key),
        };
        if key.is_cluster_ip() {
            self.cluster_ips = self.cluster_ips + usize::from(row.is_some()) - usize::from(old.is_some());
        }
        if let Some(row) = row {
            self.ranges.name(range_of(&row));
        }
        if let Some(old) = old {
            self.ranges.unname(range_of(&old), now + self.grace);
        }
        let (old_id, new_id) = (old.map(|row| row.service), row.map(|row| row.service));
        if old_id == new_id {
            return;
        }
        let owner = old_id.and_then(|id| self.owners.get(&id));
        // The Service that is being applied is not among them.
        let owner = owner.and_then(|owner| Some((owner, self.services.get_mut(owner)?)));
        if let Some((owner, _)) = &owner {
            self.displaced.insert((*owner).clone());
        }
        let others = owner.into_iter().flat_map(|(_, ports)| ports);
        if let Some(port) = ports.iter_mut().chain(others).find(|port| Some(port.id) == old_id) {
            port.frontends.retain(|other| *other != key);
        }
        if let Some(port) = ports.iter_mut().find(|port| Some(port.id) == new_id) {
            port.frontends.push(key);
        }
    }
}

impl PortState {
    /// Lets go of room that vectors have for more: a cluster has thousands of ports.
    fn shrink(&mut self) {
        self.frontends.shrink_to_fit();
        self.backends.shrink_to_fit();
        self.sources.shrink_to_fit();
    }

    /// A port of which nothing is in the tables but its name.
    pub(super) fn new(id: u32, port: &str) -> Self {
        Self { name: port.into(), id, frontends: Vec::new(), backends: Vec::new(), sources: Vec::new() }
    }
}

pub(super) fn range_of(row: &Frontend) -> Range {
    Range { offset: row.offset, length: row.length }
}

/// The row, with what the pod adopts: what it had going when the first policy came to isolate it may finish (rule 52).
fn adopting(old: Option<&Endpoint>, mut row: Endpoint, clock: fn() -> u32) -> Endpoint {
    row.policy.adopts_until = match old.filter(|old| old.ifindex() == row.ifindex() && row.is_isolated()) {
        _ if row.policy.live == EndpointPolicy::CUT => 0,
        None => 0,
        Some(old) if old.is_isolated() => old.policy.adopts_until,
        Some(_open) => clock().saturating_add(EndpointPolicy::ADOPTION),
    };
    row
}

/// [`Settings::POLICIES`] where policies apply to one of the pods.
pub(super) fn enforced(endpoints: &BTreeMap<Addr, Endpoint>) -> u32 {
    if endpoints.values().any(Endpoint::is_isolated) { Settings::POLICIES } else { 0 }
}
