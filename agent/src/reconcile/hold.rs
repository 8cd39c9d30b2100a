//! What stays as the agent before left it, because its objects cannot be read now.
//!
//! A source keeps what an object was before its document became bad. An agent that has just started knows no such
//! version: but the tables do, and what they say of the object stays in force until the document is good again, or
//! gone.

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::addr::Addr;

use crate::model::{HostPorts, Name, Touched, Withheld, World};

#[derive(Debug, Default)]
pub(super) struct Hold {
    withheld: Withheld,
    /// What was restored and not planned since.
    services: BTreeSet<Name>,
    endpoints: BTreeSet<Addr>,
    policies: Restored,
    /// What was not planned because of a bad document.
    waiting: BTreeSet<Touched>,
}

/// Whether what was restored is still what the tables say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Restored {
    Held,
    /// Or nothing was there.
    #[default]
    Planned,
}

impl Hold {
    pub(super) fn new(
        services: impl Iterator<Item = Name>,
        endpoints: impl Iterator<Item = Addr>,
        policies: Restored,
    ) -> Self {
        let (services, endpoints) = (services.collect(), endpoints.collect());
        Self { services, endpoints, policies, ..Self::default() }
    }

    /// Replaces what is withheld; gives back what is to be looked at again.
    pub(super) fn set(&mut self, withheld: Withheld) -> BTreeSet<Touched> {
        self.withheld = withheld;
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn is_waiting(&self, key: &Touched) -> bool {
        self.waiting.contains(key)
    }

    pub(super) fn wait(&mut self, key: Touched) {
        self.waiting.insert(key);
    }

    /// It is planned now: from here on the source remembers it.
    pub(super) fn planned(&mut self, key: &Touched) {
        match key {
            Touched::Policies => {
                self.policies = Restored::Planned;
                false
            }
            Touched::Service(name) => self.services.remove(name),
            Touched::Endpoint(addr) => self.endpoints.remove(addr),
            Touched::Node
            | Touched::Pod(_)
            | Touched::Namespace(_)
            | Touched::NetworkPolicy(_)
            | Touched::ClusterNetworkPolicy(_) => false,
        };
    }

    /// Whether what the tables have is to stay.
    pub(super) fn keeps(&self, world: &World, rows: &BTreeMap<Addr, Endpoint>, key: &Touched) -> bool {
        match key {
            // The host says what it has, not a document.
            Touched::Node
            | Touched::Pod(_)
            | Touched::Namespace(_)
            | Touched::NetworkPolicy(_)
            | Touched::ClusterNetworkPolicy(_) => false,
            Touched::Policies => self.holds_policies(),
            // The agent itself knows all ports of the host.
            Touched::Service(name) if HostPorts::are(name) => false,
            Touched::Service(name) => self.services.contains(name) && self.keeps_service(world, name),
            Touched::Endpoint(addr) => {
                let row = rows.get(addr).map(|row| row.ifindex());
                self.endpoints.contains(addr)
                    && self.withheld.pods()
                    && world.pods_at(*addr).next().is_none()
                    && world.attachment(*addr).is_none()
                    && row.is_some_and(|ifindex| world.local_route(*addr) == Some(ifindex))
            }
        }
    }

    /// Whether the tables of policies are to stay: what cannot be read may be any policy, or whom it is about, and
    /// without it they would let more pass.
    pub(super) fn holds_policies(&self) -> bool {
        self.policies == Restored::Held && self.withheld == Withheld::Any
    }

    /// Whether rows of nodes that are not known are to stay.
    pub(super) fn holds_nodes(&self) -> bool {
        self.withheld.nodes()
    }

    fn keeps_service(&self, world: &World, name: &Name) -> bool {
        match &self.withheld {
            Withheld::Some { services, pods: _, nodes: _ } => services.contains(name),
            // What is missing may be what cannot be read.
            Withheld::Any => {
                let backing = world.service(name);
                backing.is_none_or(|backing| backing.service.is_none() || backing.slices.is_empty())
            }
        }
    }
}
