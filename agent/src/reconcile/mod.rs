//! Makes the tables say what the plan says: restore first, then one touched key at a time, retried until it succeeds.
//!
//! ```text
//!   Change ──▶ World ──Touched──▶ queue ──key──▶ plan ──rows──▶ diff with what was written ──Work──▶ maps
//!                                   ▲                                                        │
//!                                   └───────── failed: later, and longer each time ◀─────────┘
//! ```
//!
//! Nothing is written before every source has sent all it has (rule 13): until then the tables stay what they were
//! when the last agent died, and what is not there yet cannot be mistaken for what is gone.

mod diff;
mod hold;
mod policy;
mod queue;
mod restore;
mod service;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::addr::Addr;

use crate::events::{Note, Reason};
use crate::maps::{MapError, Maps};
use crate::model::{Change, HostPorts, Kind, Name, ObjectId, Touched, Withheld, World};
use crate::plan::policy::Concern;
use crate::plan::{self, endpoints};
use policy::PolicyError;
use queue::Queue;
use service::ServiceError;
use tables::Tables;

pub use tables::Limits;

#[derive(Clone, Debug)]
pub struct Config {
    /// This node's name.
    pub node: Box<str>,
    pub limits: Limits,
    pub plan: plan::Config,
    /// How long a released id, index or slot range rests: longer than a program runs on one packet.
    pub grace: Duration,
    /// Seconds of `CLOCK_MONOTONIC`, which the programs stamp flows with.
    pub clock: fn() -> u32,
}

/// The one writer of the tables. It has no clock and no tasks of its own: a loop tells it what changed, and calls
/// [`Reconciler::tick`] when [`Reconciler::due`] says so.
#[derive(Debug)]
pub struct Reconciler<M> {
    world: World,
    tables: Tables<M>,
    queue: Queue,
    synced: bool,
    failures: u64,
    /// For the users of the objects; not taken yet.
    notes: BTreeSet<Note>,
}

/// Why something is not in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing<'a> {
    /// It has not been looked at since it changed.
    Waiting,
    /// With the reason.
    Refused(&'a str),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Service ports with an id.
    pub services: usize,
    pub frontends: usize,
    pub backends: usize,
    pub slots: u64,
    pub endpoints: usize,
    pub policy_sets: usize,
    /// Rows of rules, and addresses with classes of their own.
    pub policy_rules: usize,
    pub peers: usize,
    /// Keys that wait to be looked at.
    pub pending: usize,
    /// Keys that failed and will be tried again.
    pub failing: usize,
    /// How often something failed.
    pub failures: u64,
    pub writes: u64,
}

impl<M: Maps> Reconciler<M> {
    /// Starts from what is in the tables; writes nothing.
    ///
    /// # Errors
    /// Where the tables cannot be read.
    pub fn restore(maps: M, config: &Config, now: Instant) -> Result<Self, MapError> {
        let tables = restore::restore(maps, config)?;
        let mut queue = Queue::default();
        // Everything that was there is planned once, so that what is gone by now is removed.
        for name in tables.services.keys() {
            queue.touch(Touched::Service(name.clone()), now);
        }
        for addr in tables.endpoints.keys() {
            queue.touch(Touched::Endpoint(*addr), now);
        }
        queue.touch(Touched::Node, now);
        queue.touch(Touched::Policies, now);
        let world = World::new(config.node.clone());
        Ok(Self { world, tables, queue, synced: false, failures: 0, notes: BTreeSet::new() })
    }

    /// Takes a change in; it is written at the next [`Reconciler::tick`].
    pub fn handle(&mut self, change: Change, now: Instant) {
        for key in self.world.apply(change) {
            match self.tables.policies.touch(&key) {
                Concern::Policies => self.queue.touch(Touched::Policies, now),
                Concern::None => self.queue.touch(key, now),
            }
        }
    }

    /// What documents are bad about. What the agent before served of it stays, until they are good or gone.
    pub fn hold(&mut self, withheld: Withheld, now: Instant) {
        for key in self.tables.hold.set(withheld) {
            self.queue.touch(key, now);
        }
    }

    /// Every source has sent all it has: from now on the tables follow.
    pub fn synced(&mut self) {
        self.synced = true;
    }

    /// When [`Reconciler::tick`] has something to do; a time that has passed means now.
    pub fn due(&self) -> Option<Instant> {
        self.queue.due().filter(|_| self.synced)
    }

    /// Plans and writes what is due, but not more at once than a loop can wait for; [`Reconciler::due`] says whether
    /// there is more.
    pub fn tick(&mut self, now: Instant) {
        if !self.synced {
            return;
        }
        // First: what is written of a pod says what applies to it.
        self.tables.policies.plan(&self.world, now);
        for key in self.queue.take(KEYS_PER_TICK, now) {
            let tables = &mut self.tables;
            if tables.hold.keeps(&self.world, &tables.endpoints, &key) {
                tracing::warn!("{key}: stays as it was: something of it cannot be read");
                self.queue.succeeded(&key);
                tables.hold.wait(key);
                continue;
            }
            tables.hold.planned(&key);
            match self.apply(&key, now) {
                Ok(()) => self.queue.succeeded(&key),
                Err(error) => {
                    self.failures += 1;
                    self.notes.extend(notes(&key, &error));
                    self.queue.failed(key, error.to_string().into(), now);
                }
            }
            for name in std::mem::take(&mut self.tables.displaced) {
                self.queue.touch(Touched::Service(name), now);
            }
            // Another service may wait for the address.
            if std::mem::take(&mut self.tables.freed) {
                self.queue.hurry(now);
            }
        }
        if let Err(error) = self.tables.judge_again() {
            self.failures += 1;
            self.queue.failed(Touched::Policies, error.to_string().into(), now);
        }
    }

    pub fn stats(&self) -> Stats {
        let tables = &self.tables;
        let [policy_sets, policy_rules, peers] = tables.policies.counts();
        Stats {
            policy_sets,
            policy_rules,
            peers,
            services: tables.owners.len(),
            frontends: tables.frontends.len() - tables.cluster_ips,
            backends: tables.indices.used(),
            slots: tables.ranges.used(),
            endpoints: tables.endpoints.len(),
            pending: self.queue.dirty(),
            failing: self.queue.failing().len(),
            failures: self.failures,
            writes: tables.maps.writes(),
        }
    }

    /// Why the ports of the host of an attachment are not in the tables; `None` where they are.
    pub fn missing_host_ports(&self, interface: &str) -> Option<Missing<'_>> {
        let key = Touched::Service(HostPorts::name(interface));
        let failed = self.queue.failing().find(|(failing, _)| **failing == key);
        match failed {
            Some((_, error)) => Some(Missing::Refused(error)),
            None => self.queue.has(&key).then_some(Missing::Waiting),
        }
    }

    /// Whether the tables say of a Service what its objects say.
    pub fn is_programmed(&self, service: &Name) -> bool {
        let key = Touched::Service(service.clone());
        !self.queue.has(&key) && !self.tables.hold.is_waiting(&key)
    }

    /// The rows of that table; in [`Stats`] those that only say that an address is a cluster IP do not count.
    pub fn frontend_rows(&self) -> usize {
        self.tables.frontends.len()
    }

    /// What is not in the tables as it should be, and why.
    pub fn failing(&self) -> impl Iterator<Item = (&Touched, &str)> {
        self.queue.failing()
    }

    /// What users are to be told of objects since this was called last.
    pub fn take_notes(&mut self) -> BTreeSet<Note> {
        std::mem::take(&mut self.notes)
    }

    /// The local pods as they are in the table.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.tables.endpoints.values()
    }

    /// The interface that the table has for a local address.
    pub fn served_by(&self, addr: Addr) -> Option<u32> {
        self.tables.endpoints.get(&addr).map(|endpoint| endpoint.ifindex())
    }

    /// The interfaces that pods leave the node by, where they are masqueraded.
    pub fn exits(&self) -> BTreeSet<u32> {
        plan::masquerade::devices(&self.world, &self.tables.plan.world)
    }

    /// Whether the row of a local address says what its pod's policies say, or keeps everything out because they cannot be
    /// followed.
    pub fn is_guarded(&self, addr: Addr) -> bool {
        let planned = self.tables.policies.endpoint(&self.world, addr);
        let row = self.tables.endpoints.get(&addr);
        let is_planned =
            |row: &Endpoint| (row.policy.ingress, row.policy.egress) == (planned.ingress, planned.egress);
        !self.world.is_strangers(addr) && row.is_some_and(is_planned)
    }

    pub fn world(&self) -> &World {
        &self.world
    }

    pub fn maps(&self) -> &M {
        &self.tables.maps
    }

    pub fn maps_mut(&mut self) -> &mut M {
        &mut self.tables.maps
    }

    fn apply(&mut self, key: &Touched, now: Instant) -> Result<(), KeyError> {
        match key {
            Touched::Service(name) => Ok(self.tables.apply_service(&self.world, name, now)?),
            Touched::Endpoint(addr) => {
                let tables = &mut self.tables;
                // While policies are held, so are those of the pods that are known.
                let held = tables.endpoints.get(addr).filter(|_| tables.hold.holds_policies());
                let policy =
                    held.map_or_else(|| tables.policies.endpoint(&self.world, *addr), |row| row.policy);
                let desired = endpoints::endpoint(&self.world, *addr, policy);
                tables.apply_endpoint(*addr, desired)?;
                if tables.policies.has_left() {
                    self.queue.touch(Touched::Policies, now);
                }
                Ok(())
            }
            Touched::Node => {
                let rows = plan::node::rows(&self.world, &self.tables.plan);
                self.tables.apply_node(&rows)?;
                if rows.surplus.is_empty() { Ok(()) } else { Err(ServiceError::Ranges(rows.surplus).into()) }
            }
            // Those of single objects are noted where they arrive.
            Touched::Policies
            | Touched::Pod(_)
            | Touched::Namespace(_)
            | Touched::NetworkPolicy(_)
            | Touched::ClusterNetworkPolicy(_) => Ok(self.tables.apply_policies(&self.world, now)?),
        }
    }
}

/// Why a key is not in the tables as it should be.
#[derive(Debug, thiserror::Error)]
enum KeyError {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Of a Service or of policies; the rest is nobody's object.
fn notes(key: &Touched, error: &KeyError) -> Vec<Note> {
    match (key, error) {
        (Touched::Service(name), KeyError::Service(error)) if !HostPorts::are(name) => {
            vec![note(name, error)]
        }
        (_, KeyError::Policy(PolicyError::NoRoom { problems })) => {
            let reason = Reason::PolicyOverflow;
            let note =
                |object: &ObjectId, text: &str| Note { object: object.clone(), reason, message: text.into() };
            problems.iter().flat_map(|it| it.policies.iter().map(|policy| note(policy, &it.text))).collect()
        }
        (_, KeyError::Service(_) | KeyError::Policy(PolicyError::Map(_)) | KeyError::Map(_)) => Vec::new(),
    }
}

fn note(name: &Name, error: &ServiceError) -> Note {
    let reason = match error {
        ServiceError::Conflict { .. } => Reason::ServiceConflict,
        ServiceError::Plan(_)
        | ServiceError::Exhausted(_)
        | ServiceError::Map(_)
        | ServiceError::Ranges(_) => Reason::NotProgrammed,
    };
    let object = ObjectId { kind: Kind::Service, name: name.clone() };
    Note { object, reason, message: error.to_string().into() }
}

/// A few milliseconds' worth.
const KEYS_PER_TICK: usize = 512;
