//! One Service: from what is desired and what is there to the work between them.

use std::fmt;
use std::time::Instant;

use ferroflow_common::abi::lb::{
    Backend, Frontend, FrontendKey, ServiceClient, Slot, SourceRange, SourceRangeKey,
};
use ferroflow_common::abi::node::Settings;

use super::diff::{Step, steps};
use super::tables::{PortState, Tables, Work, range_of};
use crate::maps::{ArrayTable as _, Backends, MapError, Maps, Slots};
use crate::model::{Family, HostPorts, Name, Prefix, Touched, World};
use crate::plan::ids::Exhausted;
use crate::plan::ranges::Range;
use crate::plan::{self, Asker, Desired, PlanError, Planned, PlannedFrontend, PortRows, slots};

/// Why a Service is not, or not in full, what it should be. It stays what it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServiceError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(
        "{} belongs to {}, which goes first ({}): change one of them",
        Place(.key),
        Owner(.owner),
        if HostPorts::are(.name) { "any Service does" } else { "the older, or the first by name" }
    )]
    Conflict { name: Name, key: FrontendKey, owner: Name },
    #[error(
        "the programs know {} ranges of cluster IPs and these are too many: {}; what is for no service there passes \
         (merge ranges of --service-cidr and of ServiceCIDR objects)",
        Settings::RANGES,
        Listed(.0)
    )]
    Ranges(Vec<Prefix>),
}

struct Listed<'a>(&'a [Prefix]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(index, range)| {
            if index == 0 { write!(f, "{range}") } else { write!(f, ", {range}") }
        })
    }
}

struct Owner<'a>(&'a Name);

impl fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if HostPorts::are(self.0) {
            write!(f, "a hostPort of the pod behind {}", self.0.name)
        } else {
            write!(f, "Service {}", self.0)
        }
    }
}

/// A frontend as users know it.
struct Place<'a>(&'a FrontendKey);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FrontendKey { addr, port, proto, scope: _ } = self.0;
        if [FrontendKey::NODE_V4, FrontendKey::NODE_V6].contains(addr) {
            write!(f, "NodePort {port}/{proto}")
        } else if self.0.is_cluster_ip() {
            write!(f, "the cluster IP {addr}")
        } else {
            write!(f, "{addr} port {port}/{proto}")
        }
    }
}

/// Frontends of one port that have the same slots.
struct Group<'a> {
    port: &'a PortState,
    rows: &'a PortRows<'a>,
    family: Family,
    /// [`Frontend::LOCAL`] and [`Frontend::MAGLEV`].
    layout: u32,
}

/// What tells frontends apart that do not have the same slots.
const LAYOUT: u32 = Frontend::LOCAL | Frontend::MAGLEV;

impl Group<'_> {
    fn has(&self, frontend: &PlannedFrontend) -> bool {
        !frontend.key.is_cluster_ip()
            && Family::of(&frontend.key.addr) == self.family
            && frontend.flags & LAYOUT == self.layout
    }
}

impl<M: Maps> Tables<M> {
    /// Makes the tables say of this Service what the world says, or leaves them as they are where there is no room.
    pub(super) fn apply_service(
        &mut self,
        world: &World,
        name: &Name,
        now: Instant,
    ) -> Result<(), ServiceError> {
        let mut desired = plan::service(world, name, &self.plan)?;
        let conflict = self.leave_to_owners(world, name, &mut desired);
        let mut ports = self.services.remove(name).unwrap_or_default();
        let mut work = Work::default();
        let result = self
            .prepare(&ports, &desired, &mut work, now)
            .and_then(|()| Ok(self.execute(name, &mut ports, &work, now)?));
        if result.is_err() {
            self.give_back(&ports, &work);
        }
        if !ports.is_empty() {
            self.services.insert(name.clone(), ports);
        }
        result.and(conflict)
    }

    /// Takes out the frontends that another Service has, still wants, and goes first for; those of one that comes
    /// later are taken over. The rest of the Service is served.
    fn leave_to_owners(
        &self,
        world: &World,
        name: &Name,
        desired: &mut Desired<'_>,
    ) -> Result<(), ServiceError> {
        let mut conflict = Ok(());
        for rows in desired {
            rows.frontends.retain(|it| {
                // All rows of a frontend go to the same Service.
                let key = match it.key.scope {
                    FrontendKey::INTERNAL | FrontendKey::RELAYED => {
                        FrontendKey { scope: FrontendKey::EXTERNAL, ..it.key }
                    }
                    _ => it.key,
                };
                let owner = self.frontends.get(&key).and_then(|row| self.owners.get(&row.service));
                let owner = owner.filter(|owner| *owner != name && self.goes_first(world, owner, name, &key));
                // A port says more than the address that it has in common.
                if let Some(owner) = owner
                    && (conflict.is_ok() || !key.is_cluster_ip())
                {
                    conflict = Err(ServiceError::Conflict { name: name.clone(), key, owner: owner.clone() });
                }
                owner.is_none()
            });
        }
        conflict
    }

    /// Whether the owner of a frontend keeps it against the Service `name`.
    fn goes_first(&self, world: &World, owner: &Name, name: &Name, key: &FrontendKey) -> bool {
        match (Asker::of(world, owner), Asker::of(world, name)) {
            (Some(has), Some(asks)) => has.wants(world, key, &self.plan) && has.rank(owner) < asks.rank(name),
            (None, Some(_)) => self.hold.keeps(world, &self.endpoints, &Touched::Service(owner.clone())),
            (_, None) => true,
        }
    }

    /// Decides every write and takes every number before the first write is made.
    fn prepare(
        &mut self,
        ports: &[PortState],
        desired: &Desired<'_>,
        work: &mut Work,
        now: Instant,
    ) -> Result<(), ServiceError> {
        let actual = ports.iter().map(|port| (&*port.name, port));
        for step in steps(desired.iter().map(|rows| (rows.name, rows)), actual) {
            match step {
                Step::Add(rows) => {
                    let used = self.owners.len() + work.names.len();
                    room("services", used, self.limits.services)?;
                    let port = PortState::new(self.ids.take(now)?, rows.name);
                    work.names.push((port.id, rows.name.into(), rows.text));
                    self.prepare_port(&port, rows, work, now)?;
                }
                Step::Keep(rows, port) => self.prepare_port(port, rows, work, now)?,
                Step::Remove(port) => {
                    let wanted = |key| desired.iter().any(|rows| wants(rows, key));
                    work.gone_frontends.extend(port.frontends.iter().filter(|key| !wanted(key)));
                    work.gone_sources.extend(port.sources.iter().map(|(key, _)| (port.id, *key)));
                    work.gone_backends.extend(port.backends.iter().map(|&index| (port.id, index)));
                    work.gone_names.push(port.id);
                }
            }
        }
        let fresh = work.frontends.iter().filter(|(key, _)| !self.frontends.contains_key(key)).count();
        if fresh > 0 {
            room("frontends", self.frontends.len() + fresh - 1, self.limits.frontends)?;
        }
        // A key that passes from one port to another is put, not removed.
        work.gone_frontends.retain(|key| !work.frontends.iter().any(|(other, _)| other == key));
        // An internal row is there as long as the external one says so.
        work.frontends.sort_by_key(|(key, _)| std::cmp::Reverse(key.scope));
        work.gone_frontends.sort_by_key(|key| key.scope);
        Ok(())
    }

    fn prepare_port(
        &mut self,
        port: &PortState,
        rows: &PortRows<'_>,
        work: &mut Work,
        now: Instant,
    ) -> Result<(), ServiceError> {
        let indices = self.prepare_backends(port, rows, work, now)?;
        prepare_sources(port, rows, work);
        let (bare, slotted): (Vec<&PlannedFrontend>, Vec<_>) =
            rows.frontends.iter().partition(|it| it.key.is_cluster_ip());
        for it in bare {
            let row = Frontend { service: port.id, offset: 0, length: 0, flags: it.flags, affinity: 0 };
            if self.frontends.get(&it.key) != Some(&row) {
                work.frontends.push((it.key, row));
            }
        }
        let mut layouts: Vec<(Family, u32)> =
            slotted.iter().map(|it| (Family::of(&it.key.addr), it.flags & LAYOUT)).collect();
        layouts.sort_unstable();
        layouts.dedup();
        for (family, layout) in layouts {
            let group = Group { port, rows, family, layout };
            let (range, layout) = self.prepare_slots(&group, &indices, work, now)?;
            for it in rows.frontends.iter().filter(|it| group.has(it)) {
                let row = Frontend {
                    service: port.id,
                    offset: range.offset,
                    length: range.length,
                    flags: (it.flags & !LAYOUT) | layout,
                    affinity: rows.affinity,
                };
                if self.frontends.get(&it.key) != Some(&row) {
                    work.frontends.push((it.key, row));
                }
            }
        }
        work.gone_frontends.extend(port.frontends.iter().filter(|key| !wants(rows, key)));
        Ok(())
    }

    /// The index of each planned backend, in their order; new ones are numbered and those that are gone released.
    fn prepare_backends(
        &mut self,
        port: &PortState,
        rows: &PortRows<'_>,
        work: &mut Work,
        now: Instant,
    ) -> Result<Vec<u32>, ServiceError> {
        let mut actual = Vec::with_capacity(port.backends.len());
        for &index in &port.backends {
            let row = self.maps.read::<Backends>(index)?;
            actual.push(((row.addr, row.port, row.proto), (index, row)));
        }
        actual.sort_unstable_by_key(|(key, (index, _))| (*key, *index));
        let mut indices = Vec::with_capacity(rows.backends.len());
        let (service, proto) = (port.id, rows.proto);
        let desired = rows.backends.iter().map(|planned| ((planned.addr, planned.port, proto), planned));
        for step in steps(desired, actual) {
            match step {
                Step::Add(&Planned { addr, port, condition: _, sets, weight: _, node }) => {
                    let index = self.indices.take(now)?;
                    let flags = Backend::LIVE | sets;
                    let mut row = Backend { addr, port, proto, flags, generation: 0, service, node };
                    // Noted before the table is read: if that fails, the index is given back.
                    work.backends.push((index, row));
                    row.generation = self.maps.read::<Backends>(index)?.generation;
                    if let Some(last) = work.backends.last_mut() {
                        last.1 = row;
                    }
                    indices.push(index);
                }
                Step::Keep(planned, (index, row)) => {
                    let flags = Backend::LIVE | planned.sets;
                    let node = planned.node;
                    if (row.flags, row.node) != (flags, node) {
                        work.marks.push((index, Backend { flags, node, ..row }));
                    }
                    indices.push(index);
                }
                Step::Remove((index, _)) => work.gone_backends.push((service, index)),
            }
        }
        Ok(indices)
    }

    /// The range of a group of frontends, and the layout it has. Where there is little room for Maglev tables, one
    /// slot a backend has to do: flows are spread as evenly, but nodes choose apart.
    fn prepare_slots(
        &mut self,
        group: &Group<'_>,
        indices: &[u32],
        work: &mut Work,
        now: Instant,
    ) -> Result<(Range, u32), ServiceError> {
        let plain = group.layout & !Frontend::MAGLEV;
        if group.layout != plain
            && let Ok(range) = self.prepare_range(group, group.layout, indices, (work, now))
        {
            return Ok((range, group.layout));
        }
        Ok((self.prepare_range(group, plain, indices, (work, now))?, plain))
    }

    /// A range that says what the layout wants: one that is there, or a fresh one.
    fn prepare_range(
        &mut self,
        group: &Group<'_>,
        layout: u32,
        indices: &[u32],
        (work, now): (&mut Work, Instant),
    ) -> Result<Range, Exhausted> {
        let positions =
            slots::positions(&group.rows.backends, group.family, layout, self.plan.maglev_lengths);
        let contents: Vec<Slot> = positions.into_iter().filter_map(|at| indices.get(at).copied()).collect();
        if contents.is_empty() {
            return Ok(Range { offset: 0, length: 0 });
        }
        if let Some((range, _)) = work.slots.iter().find(|(_, other)| *other == contents) {
            return Ok(*range);
        }
        let present = group.rows.frontends.iter().filter_map(|it| self.frontends.get(&it.key));
        let mut own = present.filter(|row| row.service == group.port.id);
        if let Some(row) = own.find(|row| self.says(row, &contents)) {
            return Ok(range_of(row));
        }
        let length = contents.len() as u32;
        if layout & Frontend::MAGLEV != 0 {
            // The last quarter is for those that must have slots.
            let (used, all) = (self.ranges.used(), u64::from(self.maps.len::<Slots>()));
            if used + u64::from(length) > all / 4 * 3 {
                return Err(Exhausted { table: Slots::NAME, asked: length, limit: all as u32 });
            }
        }
        let range = self.ranges.take(length, now)?;
        work.slots.push((range, contents));
        Ok(range)
    }

    /// Whether the frontend's slots are its own and say exactly this.
    fn says(&self, row: &Frontend, contents: &[Slot]) -> bool {
        row.length as usize == contents.len()
            && self.ranges.is_named(range_of(row))
            && (row.offset..)
                .zip(contents)
                .all(|(slot, index)| self.maps.read::<Slots>(slot).is_ok_and(|actual| actual == *index))
    }
}

fn room(table: &'static str, used: usize, limit: u32) -> Result<(), Exhausted> {
    if used >= limit as usize { Err(Exhausted { table, asked: 1, limit }) } else { Ok(()) }
}

fn wants(rows: &PortRows<'_>, key: &FrontendKey) -> bool {
    rows.frontends.iter().any(|it| it.key == *key)
}

/// Ranges that are new are there before a frontend asks for them, and those that go are gone after it.
fn prepare_sources(port: &PortState, rows: &PortRows<'_>, work: &mut Work) {
    let desired = rows.sources.iter().map(|source| {
        let data = ServiceClient { service: port.id, addr: source.prefix.addr() };
        let key = SourceRangeKey { bits: 32 + u32::from(source.prefix.bits()), data };
        (key, source.verdict)
    });
    let mut desired: Vec<(SourceRangeKey, SourceRange)> = desired.collect();
    desired.sort_unstable();
    let keyed = |rows: Vec<(SourceRangeKey, SourceRange)>| rows.into_iter().map(|row| (row.0, row));
    for step in steps(keyed(desired), keyed(port.sources.clone())) {
        match step {
            Step::Add(row) => work.sources.push(row),
            Step::Keep(row, old) if row != old => work.sources.push(row),
            Step::Keep(..) => {}
            Step::Remove((key, _)) => work.gone_sources.push((port.id, key)),
        }
    }
}
