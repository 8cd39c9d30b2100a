//! One Service: from what is desired and what is there to the work between them.

use std::time::Instant;

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey, Slot};

use super::diff::{Step, steps};
use super::tables::{PortState, Tables, Work, range_of};
use crate::maps::{Backends, MapError, Maps, Slots};
use crate::model::{Family, Name, World};
use crate::plan::ids::Exhausted;
use crate::plan::{self, Desired, PlanError, Planned, PortRows, slots};

/// Why a Service is not, or not in full, what it should be. It stays what it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServiceError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{addr} port {port}/{proto} belongs to Service {owner}, which had it first: change one of them",
        addr = .key.addr, port = .key.port, proto = .key.proto)]
    Conflict { key: FrontendKey, owner: Name },
}

impl<M: Maps> Tables<M> {
    /// Makes the tables say of this Service what the world says, or leaves them as they are where there is no room.
    pub(super) fn apply_service(
        &mut self,
        world: &World,
        name: &Name,
        now: Instant,
    ) -> Result<(), ServiceError> {
        let mut desired = match world.service(name) {
            Some(backing) => plan::service(name, backing)?,
            None => Desired::new(),
        };
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

    /// Takes out the frontends that another Service has and still wants: who came first keeps them. The rest of the
    /// Service is served.
    fn leave_to_owners(
        &self,
        world: &World,
        name: &Name,
        desired: &mut Desired<'_>,
    ) -> Result<(), ServiceError> {
        let mut conflict = Ok(());
        for rows in desired {
            rows.frontends.retain(|key| {
                let owner = self.frontends.get(key).and_then(|row| self.owners.get(&row.service));
                let owner = owner.filter(|owner| *owner != name && wants(world, owner, key));
                if let Some(owner) = owner {
                    conflict = Err(ServiceError::Conflict { key: *key, owner: owner.clone() });
                }
                owner.is_none()
            });
        }
        conflict
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
                    let kept = |key: &&FrontendKey| !desired.iter().any(|rows| rows.frontends.contains(key));
                    work.gone_frontends.extend(port.frontends.iter().filter(kept));
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
        let service = port.id;
        for family in Family::ALL {
            let keys = || rows.frontends.iter().filter(|key| Family::of(&key.addr) == family);
            if keys().next().is_none() {
                continue;
            }
            let contents: Vec<Slot> =
                slots::positions(&rows.backends, family).filter_map(|at| indices.get(at).copied()).collect();
            let row = if contents.is_empty() {
                // Rule 14: nobody is there, and the client is told so.
                Frontend { service, offset: 0, length: 0, flags: Frontend::REJECT, affinity: 0 }
            } else {
                let present = keys().filter_map(|key| self.frontends.get(key));
                let offset =
                    present.filter(|row| row.service == service).find(|row| self.says(row, &contents));
                let offset = match offset.map(|row| row.offset) {
                    Some(offset) => offset,
                    None => self.prepare_slots(contents.clone(), work, now)?,
                };
                Frontend { service, offset, length: contents.len() as u32, flags: 0, affinity: 0 }
            };
            let changed = keys().filter(|key| self.frontends.get(key) != Some(&row));
            work.frontends.extend(changed.map(|key| (*key, row)));
        }
        let gone = port.frontends.iter().filter(|key| !rows.frontends.contains(key));
        work.gone_frontends.extend(gone);
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
            actual.push(((row.addr, row.port, row.proto), index));
        }
        actual.sort_unstable();
        let mut indices = Vec::with_capacity(rows.backends.len());
        let (service, proto) = (port.id, rows.proto);
        let desired = rows.backends.iter().map(|planned| ((planned.addr, planned.port, proto), planned));
        for step in steps(desired, actual) {
            match step {
                Step::Add(&Planned { addr, port, role: _ }) => {
                    let index = self.indices.take(now)?;
                    let flags = Backend::LIVE;
                    let mut row = Backend { addr, port, proto, flags, generation: 0, service, reserved: 0 };
                    // Noted before the table is read: if that fails, the index is given back.
                    work.backends.push((index, row));
                    row.generation = self.maps.read::<Backends>(index)?.generation;
                    if let Some(last) = work.backends.last_mut() {
                        last.1 = row;
                    }
                    indices.push(index);
                }
                Step::Keep(_, index) => indices.push(index),
                Step::Remove(index) => work.gone_backends.push((service, index)),
            }
        }
        Ok(indices)
    }

    fn prepare_slots(
        &mut self,
        contents: Vec<Slot>,
        work: &mut Work,
        now: Instant,
    ) -> Result<u32, ServiceError> {
        let range = self.ranges.take(contents.len() as u32, now)?;
        work.slots.push((range, contents));
        Ok(range.offset)
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

/// Whether a Service, as it now is, has this frontend.
fn wants(world: &World, name: &Name, key: &FrontendKey) -> bool {
    let service = world.service(name).and_then(|backing| backing.service.as_ref());
    service.is_some_and(|service| {
        service.ports.iter().any(|port| plan::frontends(service, port).any(|it| it == *key))
    })
}
