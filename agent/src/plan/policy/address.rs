//! Classes, and which addresses have which.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use ferroflow_common::abi::policy::{Class, Meaning, WORLD};
use ferroflow_common::addr::{Addr, Port};

use super::Assigned;
use super::element::{Blocks, Changed, ElementId, Elements, Signature};
use super::group::Groups;
use crate::model::{Family, Prefix};
use crate::plan::ids::Exhausted;

#[derive(Debug)]
pub(super) struct Addresses {
    numbers: Assigned,
    ids: HashMap<Signature, Class>,
    classes: BTreeMap<Class, State>,
    with: BTreeMap<ElementId, BTreeSet<Class>>,
    /// Of pods that some selector means.
    addresses: BTreeMap<Addr, Class>,
    /// Ranges in which an address means other blocks than in those around them.
    ranges: BTreeMap<Prefix, (Signature, Class)>,
    /// Which lengths `ranges` has.
    lengths: BTreeSet<u8>,
    /// Those for whose signatures there was no number: they are as if they meant nothing.
    refused: BTreeSet<Addr>,
    error: Option<Exhausted>,
    changes: Changes,
}

#[derive(Debug)]
struct State {
    signature: Signature,
    uses: u32,
}

/// What is other than before.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) addresses: BTreeSet<Addr>,
    pub(super) ranges: BTreeSet<Prefix>,
    pub(super) new: BTreeSet<Class>,
    pub(super) gone: BTreeSet<Class>,
}

impl Addresses {
    pub(super) fn new(numbers: Assigned) -> Self {
        Self {
            numbers,
            ids: HashMap::new(),
            classes: BTreeMap::new(),
            with: BTreeMap::new(),
            addresses: BTreeMap::new(),
            ranges: BTreeMap::new(),
            lengths: BTreeSet::new(),
            refused: BTreeSet::new(),
            error: None,
            changes: Changes::default(),
        }
    }

    /// Finds the classes of addresses anew: of those in `dirty`, or of all that have one where blocks changed.
    pub(super) fn follow(
        &mut self,
        (elements, groups): (&Elements, &Groups),
        changed: &Changed,
        mut dirty: BTreeSet<Addr>,
        now: Instant,
    ) -> Changes {
        self.error = None;
        dirty.append(&mut self.refused);
        if changed.blocks == Blocks::Others {
            self.find_ranges(elements, now);
            // What no selector means has no row of its own, whatever the blocks are.
            dirty.extend(self.addresses.keys());
        }
        for addr in dirty {
            let mut signature = groups.signature(&addr);
            if !signature.is_empty()
                && let Some((blocks, _)) = self.range_of(&addr)
            {
                let mut both = signature.into_vec();
                both.extend(blocks);
                both.sort_unstable();
                signature = both.into();
            }
            let class = if signature.is_empty() { None } else { self.class_of(&signature, elements, now) };
            if class.is_none() && !signature.is_empty() {
                self.refused.insert(addr);
            }
            let old = match class {
                Some(class) => self.addresses.insert(addr, class),
                None => self.addresses.remove(&addr),
            };
            if old != class {
                self.changes.addresses.insert(addr);
            }
            if let Some(old) = old {
                self.leave(old);
            }
        }
        let mut changes = std::mem::take(&mut self.changes);
        changes.gone.retain(|class| self.forget_unused(*class));
        changes.new.retain(|class| self.classes.contains_key(class));
        changes
    }

    pub(super) fn class(&self, addr: &Addr) -> Option<Class> {
        self.addresses.get(addr).copied()
    }

    pub(super) fn range(&self, range: &Prefix) -> Option<Class> {
        self.ranges.get(range).map(|(_, class)| *class)
    }

    pub(super) fn signature(&self, class: Class) -> &[(ElementId, Port)] {
        self.classes.get(&class).map_or(&[], |state| &state.signature)
    }

    /// The classes of addresses that mean an element.
    pub(super) fn with(&self, element: ElementId) -> impl Iterator<Item = Class> {
        self.with.get(&element).into_iter().flatten().copied()
    }

    pub(super) fn meaning(&self, class: Class, elements: &Elements) -> Option<Meaning> {
        let state = self.classes.get(&class)?;
        Some(Meaning::new(elements.fingerprint(&state.signature), &elements.text(&state.signature)))
    }

    pub(super) fn release(&mut self, class: Class, until: Instant) {
        self.numbers.rest(class, until);
    }

    pub(super) fn refused(&self) -> Option<(&Exhausted, &BTreeSet<Addr>)> {
        self.error.as_ref().map(|error| (error, &self.refused))
    }

    /// The class with this signature, with one use more.
    fn class_of(
        &mut self,
        signature: &[(ElementId, Port)],
        elements: &Elements,
        now: Instant,
    ) -> Option<Class> {
        if let Some(class) = self.ids.get(signature) {
            if let Some(state) = self.classes.get_mut(class) {
                state.uses += 1;
            }
            return Some(*class);
        }
        let class = match self.numbers.take(elements.fingerprint(signature), now) {
            Ok(class) => class,
            Err(error) => {
                self.error = Some(error);
                return None;
            }
        };
        for (element, _) in signature {
            self.with.entry(*element).or_default().insert(class);
        }
        let signature = Signature::from(signature);
        self.ids.insert(signature.clone(), class);
        self.classes.insert(class, State { signature, uses: 1 });
        self.changes.new.insert(class);
        Some(class)
    }

    fn leave(&mut self, class: Class) {
        if let Some(state) = self.classes.get_mut(&class) {
            state.uses -= 1;
            if state.uses == 0 {
                self.changes.gone.insert(class);
            }
        }
    }

    fn forget_unused(&mut self, class: Class) -> bool {
        if self.classes.get(&class).is_none_or(|state| state.uses > 0) {
            return false;
        }
        let Some(State { signature, .. }) = self.classes.remove(&class) else { return false };
        for (element, _) in &signature {
            if let Some(classes) = self.with.get_mut(element) {
                classes.remove(&class);
                if classes.is_empty() {
                    self.with.remove(element);
                }
            }
        }
        self.ids.remove(&signature);
        true
    }

    /// Every range of a block and every exception begins or ends something, if the blocks that an address in it means
    /// are others than just outside.
    fn find_ranges(&mut self, elements: &Elements, now: Instant) {
        let blocks: Vec<_> = elements.blocks().collect();
        let mut edges: BTreeSet<Prefix> =
            blocks.iter().flat_map(|(_, block)| block.except.iter().chain([&block.range])).copied().collect();
        // A short IPv6 range also contains the mapped IPv4 addresses, for which it does not speak.
        let mapped = Addr::v4([0; 4]);
        if edges.iter().any(|edge| edge.family() == Family::V6 && edge.contains(&mapped)) {
            edges.extend(Prefix::around(mapped, 0));
        }
        let mut found: BTreeMap<Prefix, (Signature, Class)> = BTreeMap::new();
        let mut around: Vec<(Prefix, Signature)> = Vec::new();
        // In this order a range comes after all that contain it.
        for edge in edges {
            while around.pop_if(|(outer, _)| !outer.contains(&edge.addr())).is_some() {}
            let means = blocks.iter().filter(|(_, block)| {
                let within = |outer: &Prefix| outer.bits() <= edge.bits() && outer.contains(&edge.addr());
                block.range.family() == edge.family()
                    && within(&block.range)
                    && !block.except.iter().any(within)
            });
            let signature: Signature = means.map(|(id, _)| (*id, Port::ZERO)).collect();
            if *signature == *around.last().map_or(&[][..], |(_, outer)| outer) {
                continue;
            }
            let class = if signature.is_empty() { None } else { self.class_of(&signature, elements, now) };
            // Where there is no number for it, it is as the world is, and not as what is around it.
            found.insert(edge, (signature.clone(), class.unwrap_or(WORLD)));
            around.push((edge, signature));
        }
        let old = std::mem::replace(&mut self.ranges, found);
        for (edge, (_, class)) in &old {
            if self.ranges.get(edge).is_none_or(|(_, new)| new != class) {
                self.changes.ranges.insert(*edge);
            }
            self.leave(*class);
        }
        self.changes.ranges.extend(self.ranges.keys().filter(|edge| !old.contains_key(edge)));
        self.lengths = self.ranges.keys().map(Prefix::bits).collect();
    }

    /// The longest range that has an address.
    fn range_of(&self, addr: &Addr) -> Option<&(Signature, Class)> {
        let skipped = match Family::of(addr) {
            Family::V4 => 96,
            Family::V6 => 0,
        };
        let lengths = self.lengths.iter().rev().filter_map(|length| length.checked_sub(skipped));
        lengths.filter_map(|length| Prefix::around(*addr, length)).find_map(|range| self.ranges.get(&range))
    }
}
