//! The tables of policies. One key stands for them all: what changed is written in an order in which no program ever
//! sees more allowed than the objects before or after the change allow.
//!
//! ```text
//!   meanings ─▶ port ranges, rules that were not there ─▶ classes of addresses, then of ranges ─▶ rules that changed
//!                                                          ─▶ endpoints ─▶ what is gone, in reverse
//! ```
//!
//! An address moves to its new class in one write, when that class has its rules; a pod to its new set likewise. Of
//! nested ranges the inner one comes first and goes last: what is left out of a range is never in it for a moment.
//!
//! Where a table has no room, the sets that lack rows are closed, and their pods with them; others are not touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroflow_common::abi::policy::{Class, EndpointPolicy, Meaning, PolicyKey, PortRange, RangeKey, Rules};
use ferroflow_common::addr::Addr;

use super::tables::Tables;
use crate::maps::{
    ArrayTable, HashTable, Ipcache, IpcacheRanges, MapError, Maps, PeerClasses, Policy, PolicySets,
    PortRanges,
};
use crate::model::policy::Live;
use crate::model::{Prefix, Touched, World};
use crate::plan::endpoints;
use crate::plan::ids::Exhausted;
use crate::plan::policy::{Changes, Concern, Known, Number, Planner, Refused, Room, Verdicts};
use crate::plan::ranges::{Range, Ranges};

/// What the tables of policies say, and what they should.
#[derive(Debug)]
pub(super) struct Policies {
    planner: Planner,
    /// Rows to look at: what is right is asked of the planner, so looking twice does no harm.
    dirty: Changes,
    addresses: BTreeMap<Addr, Class>,
    ranges: BTreeMap<RangeKey, Class>,
    rules: BTreeMap<PolicyKey, Rules>,
    sets: BTreeMap<u32, Meaning>,
    classes: BTreeMap<Class, Meaning>,
    rows: PortRows,
    /// Sets that lack rows, and why.
    closed: BTreeMap<u32, String>,
    /// They may have changed, and the programs were not told to judge live flows again.
    pub(super) unjudged: bool,
}

/// Lists of port ranges, each of which is in the table once.
#[derive(Debug)]
struct PortRows {
    free: Ranges,
    at: HashMap<Arc<[PortRange]>, Range>,
    contents: BTreeMap<Range, Arc<[PortRange]>>,
}

/// Why the tables of policies are not what they should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum PolicyError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{}", .problems.iter().map(|it| it.text.as_str()).collect::<Vec<_>>().join("; "))]
    NoRoom { problems: Vec<Refused> },
}

/// Why one row could not be written.
#[derive(Debug, thiserror::Error)]
enum RowError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
}

impl Policies {
    /// Reads what is there; all of it is looked at once.
    pub(super) fn restore<M: Maps>(maps: &M, live: Live) -> Result<Self, MapError> {
        let sets: BTreeMap<_, _> = maps.dump::<PolicySets>()?.into_iter().collect();
        let classes: BTreeMap<_, _> = maps.dump::<PeerClasses>()?.into_iter().collect();
        let fingerprints = |from: &BTreeMap<u32, Meaning>| {
            from.iter().map(|(number, meaning)| (*number, meaning.fingerprint)).collect()
        };
        let known = Known { sets: fingerprints(&sets), classes: fingerprints(&classes) };
        let rules: BTreeMap<_, _> = maps.dump::<Policy>()?.into_iter().collect();
        let addresses: BTreeMap<_, _> = maps.dump::<Ipcache>()?.into_iter().collect();
        let ranges: BTreeMap<_, _> = maps.dump::<IpcacheRanges>()?.into_iter().collect();
        let dirty = Changes {
            addresses: addresses.keys().copied().collect(),
            ranges: ranges.keys().filter_map(prefix).collect(),
            rules: rules.keys().copied().collect(),
            sets: sets.keys().copied().collect(),
            classes: classes.keys().copied().collect(),
            endpoints: BTreeSet::new(),
        };
        Ok(Self {
            planner: Planner::new(ROOM, known, live),
            dirty,
            rows: PortRows::restore(maps, rules.values()),
            addresses,
            ranges,
            rules,
            sets,
            classes,
            closed: BTreeMap::new(),
            // The agent before may have died before it told.
            unjudged: true,
        })
    }

    pub(super) fn touch(&mut self, key: &Touched) -> Concern {
        self.planner.touch(key)
    }

    /// Makes the plan follow the objects; writes nothing.
    pub(super) fn plan(&mut self, world: &World, now: Instant) {
        let Changes { addresses, ranges, rules, sets, classes, endpoints } = self.planner.update(world, now);
        self.dirty.addresses.extend(addresses);
        self.dirty.ranges.extend(ranges);
        self.dirty.rules.extend(rules);
        self.dirty.sets.extend(sets);
        self.dirty.classes.extend(classes);
        self.dirty.endpoints.extend(endpoints);
    }

    /// What a local pod's row is to say. A set that is not in the tables is closed, and so is a pod that policies may
    /// select and of which nothing but its name is known.
    pub(super) fn endpoint(&self, world: &World, addr: Addr) -> EndpointPolicy {
        if world.is_strangers(addr) {
            let closed = EndpointPolicy::CLOSED;
            return EndpointPolicy { ingress: closed, egress: closed, ..EndpointPolicy::default() };
        }
        let ready = |set: u32| {
            let others = PolicyKey { set, class: PolicyKey::OTHERS };
            let in_tables = self.rules.contains_key(&others) && !self.closed.contains_key(&set);
            if set == EndpointPolicy::OPEN || in_tables { set } else { EndpointPolicy::CLOSED }
        };
        let planned = self.planner.endpoint(addr);
        EndpointPolicy { ingress: ready(planned.ingress), egress: ready(planned.egress), ..planned }
    }

    /// Sets, rows of rules and addresses in the tables.
    pub(super) fn counts(&self) -> [usize; 3] {
        [self.sets.len(), self.rules.len(), self.addresses.len()]
    }

    /// Whether rows wait for pods that still use them.
    pub(super) fn has_left(&self) -> bool {
        self.dirty != Changes::default()
    }

    fn put_meanings<M: Maps>(&mut self, maps: &mut M) -> Result<(), MapError> {
        for number in &self.dirty.sets {
            if let Some(meaning) = self.planner.set(*number) {
                put::<PolicySets, M>(maps, &mut self.sets, *number, meaning)?;
            }
        }
        for class in &self.dirty.classes {
            if let Some(meaning) = self.planner.meaning(*class) {
                put::<PeerClasses, M>(maps, &mut self.classes, *class, meaning)?;
            }
        }
        Ok(())
    }

    /// Writes the rules of one kind; those of a set for which there is no room close it.
    fn put_rules<M: Maps>(
        &mut self,
        maps: &mut M,
        which: Which,
        (now, grace): (Instant, Duration),
    ) -> Result<(), MapError> {
        for key in self.dirty.rules.clone() {
            let Some(verdicts) = self.planner.rules(&key).cloned() else { continue };
            let which_it_is = if self.rules.contains_key(&key) { Which::Changed } else { Which::New };
            if which_it_is != which {
                continue;
            }
            match self.put_rule(maps, key, &verdicts, (now, grace)) {
                Ok(()) => {}
                Err(error @ (RowError::Exhausted(_) | RowError::Map(MapError::Full { .. }))) => {
                    self.closed.insert(key.set, error.to_string());
                }
                Err(RowError::Map(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn put_rule<M: Maps>(
        &mut self,
        maps: &mut M,
        key: PolicyKey,
        Verdicts { otherwise, cause, ranges }: &Verdicts,
        (now, grace): (Instant, Duration),
    ) -> Result<(), RowError> {
        let range = self.rows.place(maps, ranges, now)?;
        let row = Rules {
            offset: range.offset,
            length: range.length,
            otherwise: u32::from(cause.0) << 16 | *otherwise as u32,
        };
        let old = self.rules.get(&key).copied();
        if old == Some(row) {
            return Ok(());
        }
        if let Err(error) = maps.put::<Policy>(&key, &row) {
            self.rows.give_back(range);
            return Err(error.into());
        }
        self.rules.insert(key, row);
        self.rows.name(range);
        if let Some(old) = old {
            self.rows.unname(Range { offset: old.offset, length: old.length }, now + grace);
        }
        Ok(())
    }

    /// Gives addresses and ranges their classes.
    fn move_addresses<M: Maps>(&mut self, maps: &mut M) -> Result<Vec<Refused>, MapError> {
        let mut problems = Vec::new();
        let mut allow = |result: Result<(), MapError>, what: &dyn std::fmt::Display| match result {
            Err(error @ MapError::Full { .. }) => {
                let text = format!("{error}; no policy lets {what} through");
                problems.push(Refused { policies: BTreeSet::new(), text });
                Ok(())
            }
            other => other,
        };
        for addr in &self.dirty.addresses {
            if let Some(class) = self.planner.class(addr) {
                allow(put::<Ipcache, M>(maps, &mut self.addresses, *addr, class), addr)?;
            }
        }
        let mut ranges: Vec<_> = self.dirty.ranges.iter().collect();
        ranges.sort_unstable_by_key(|range| range.bits());
        for range in ranges.iter().rev() {
            if let Some(class) = self.planner.range(range) {
                allow(put::<IpcacheRanges, M>(maps, &mut self.ranges, key(range), class), range)?;
            }
        }
        for range in ranges {
            if self.planner.range(range).is_none() {
                delete::<IpcacheRanges, M>(maps, &mut self.ranges, &key(range))?;
            }
        }
        for addr in &self.dirty.addresses {
            if self.planner.class(addr).is_none() {
                delete::<Ipcache, M>(maps, &mut self.addresses, addr)?;
            }
        }
        Ok(problems)
    }

    /// Removes what nothing names any more, and gives its numbers back. The sets in `used` stay, for rows of pods that
    /// are not planned yet, and with them what is left dirty.
    fn remove<M: Maps>(
        &mut self,
        maps: &mut M,
        used: &BTreeSet<u32>,
        until: Instant,
    ) -> Result<Changes, MapError> {
        let mut left = Changes::default();
        for key in &self.dirty.rules {
            if self.planner.rules(key).is_none()
                && let Some(row) = self.rules.get(key).copied()
            {
                // A class that goes takes its rules along: its number will mean others.
                let stays = key.class == PolicyKey::OTHERS || self.planner.meaning(key.class).is_some();
                if stays && self.planner.set(key.set).is_none() && used.contains(&key.set) {
                    left.rules.insert(*key);
                    continue;
                }
                delete::<Policy, M>(maps, &mut self.rules, key)?;
                self.rows.unname(Range { offset: row.offset, length: row.length }, until);
            }
        }
        while let Some(number) = self.dirty.sets.first().copied() {
            if self.planner.set(number).is_none() && used.contains(&number) {
                left.sets.insert(number);
            } else if self.planner.set(number).is_none() {
                delete::<PolicySets, M>(maps, &mut self.sets, &number)?;
                self.planner.released(Number::Set(number), until);
            }
            self.dirty.sets.pop_first();
        }
        while let Some(class) = self.dirty.classes.first().copied() {
            if self.planner.meaning(class).is_none() {
                delete::<PeerClasses, M>(maps, &mut self.classes, &class)?;
                self.planner.released(Number::Class(class), until);
            }
            self.dirty.classes.pop_first();
        }
        Ok(left)
    }
}

impl<M: Maps> Tables<M> {
    /// Makes the tables of policies say what is planned.
    pub(super) fn apply_policies(&mut self, world: &World, now: Instant) -> Result<(), PolicyError> {
        let writes = self.maps.writes();
        let applied = self.lay_policies(world, now);
        self.policies.unjudged |= self.maps.writes() != writes;
        applied
    }

    fn lay_policies(&mut self, world: &World, now: Instant) -> Result<(), PolicyError> {
        let when = (now, self.grace);
        let policies = &mut self.policies;
        // There may be room by now.
        for set in std::mem::take(&mut policies.closed).into_keys() {
            policies.dirty.rules.extend(policies.planner.rules_of(set));
            policies.dirty.endpoints.extend(policies.planner.endpoints_of(set));
        }
        policies.put_meanings(&mut self.maps)?;
        policies.put_rules(&mut self.maps, Which::New, when)?;
        let mut problems = policies.move_addresses(&mut self.maps)?;
        policies.put_rules(&mut self.maps, Which::Changed, when)?;
        let closed = policies.closed.keys().flat_map(|set| policies.planner.endpoints_of(*set));
        let moved: BTreeSet<_> = policies.dirty.endpoints.iter().copied().chain(closed).collect();
        for addr in moved {
            let desired = endpoints::endpoint(world, addr, self.policies.endpoint(world, addr));
            // Where an interface is not known yet there is no row to change.
            if desired.is_some() {
                self.apply_endpoint(addr, desired)?;
            }
        }
        let policies = &mut self.policies;
        let used = self.endpoints.values().flat_map(|row| [row.policy.ingress, row.policy.egress]).collect();
        let left = policies.remove(&mut self.maps, &used, now + self.grace)?;
        problems.extend(policies.planner.refused());
        for (set, error) in &policies.closed {
            let selecting = policies.planner.policies(*set);
            let names: Vec<_> = selecting.iter().map(ToString::to_string).collect();
            let pods: Vec<_> = policies.planner.endpoints_of(*set).map(|addr| addr.to_string()).collect();
            let (names, pods) = (names.join(" and "), pods.join(", "));
            let text = format!("{error}; nothing passes {pods}, which {names} selects");
            problems.push(Refused { policies: selecting.iter().cloned().collect(), text });
        }
        if !problems.is_empty() {
            policies.dirty.sets.extend(left.sets);
            return Err(PolicyError::NoRoom { problems });
        }
        policies.dirty = left;
        Ok(())
    }
}

impl PortRows {
    fn restore<'a, M: Maps>(maps: &M, rules: impl Iterator<Item = &'a Rules>) -> Self {
        let free = Ranges::new(PortRanges::NAME, maps.len::<PortRanges>());
        let mut rows = Self { free, at: HashMap::new(), contents: BTreeMap::new() };
        for Rules { offset, length, .. } in rules.filter(|it| it.length > 0) {
            let range = Range { offset: *offset, length: *length };
            rows.free.name(range);
            // A range that does not exist or overlaps another is not taken in; its rules are written anew.
            let known = rows.free.is_named(range) && !rows.contents.contains_key(&range);
            let end = offset.saturating_add(*length);
            let content: Result<Vec<_>, _> = (*offset..end).map(|row| maps.read::<PortRanges>(row)).collect();
            if let (true, Ok(content)) = (known, content) {
                rows.remember(range, content.into());
            }
        }
        rows
    }

    /// Where the table has these; where it has not yet, they are written.
    fn place<M: Maps>(
        &mut self,
        maps: &mut M,
        content: &[PortRange],
        now: Instant,
    ) -> Result<Range, RowError> {
        if content.is_empty() {
            return Ok(Range { offset: 0, length: 0 });
        }
        if let Some(range) = self.at.get(content) {
            return Ok(*range);
        }
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let range = self.free.take(length, now)?;
        for (row, it) in (range.offset..).zip(content) {
            if let Err(error) = maps.write::<PortRanges>(row, it) {
                self.free.give_back(range);
                return Err(error.into());
            }
        }
        self.remember(range, content.into());
        Ok(range)
    }

    fn remember(&mut self, range: Range, content: Arc<[PortRange]>) {
        self.at.entry(content.clone()).or_insert(range);
        self.contents.insert(range, content);
    }

    fn name(&mut self, range: Range) {
        if range.length > 0 {
            self.free.name(range);
        }
    }

    fn unname(&mut self, range: Range, until: Instant) {
        self.free.unname(range, until);
        self.forget_unnamed(range);
    }

    fn give_back(&mut self, range: Range) {
        self.free.give_back(range);
        self.forget_unnamed(range);
    }

    fn forget_unnamed(&mut self, range: Range) {
        if !self.free.is_named(range)
            && let Some(content) = self.contents.remove(&range)
            && self.at.get(&content) == Some(&range)
        {
            self.at.remove(&content);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    New,
    Changed,
}

/// Makes a row say this, if it does not.
fn put<T: HashTable, M: Maps>(
    maps: &mut M,
    written: &mut BTreeMap<T::Key, T::Value>,
    key: T::Key,
    value: T::Value,
) -> Result<(), MapError> {
    if written.get(&key) != Some(&value) {
        maps.put::<T>(&key, &value)?;
        written.insert(key, value);
    }
    Ok(())
}

fn delete<T: HashTable, M: Maps>(
    maps: &mut M,
    written: &mut BTreeMap<T::Key, T::Value>,
    key: &T::Key,
) -> Result<(), MapError> {
    if written.contains_key(key) {
        maps.delete::<T>(key)?;
        written.remove(key);
    }
    Ok(())
}

fn key(range: &Prefix) -> RangeKey {
    RangeKey { bits: range.bits().into(), addr: range.addr() }
}

fn prefix(key: &RangeKey) -> Option<Prefix> {
    Prefix::mapped(key.addr, u8::try_from(key.bits).ok()?)
}

/// As the tables are made.
const ROOM: Room = Room { sets: 16_384, classes: 65_536 };
