//! Policy sets: what the policies that select a pod say of one direction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use ferroflow_common::abi::policy::{EndpointPolicy, Meaning};
use ferroflow_common::addr::{Addr, Port};

use super::compile::{Compiled, Ports, Verdicts, compile};
use super::element::{Element, ElementId, Elements, Scope};
use super::group::is_peer;
use super::{Assigned, fingerprint};
use crate::model::policy::{Direction, Mode, Namespaces, Peer, PolicyPort, PortNumber, Rule};
use crate::model::{Name, NamedPort, NetworkPolicy, Pod, World};
use crate::plan::ids::Exhausted;

/// Which set it is.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    direction: Direction,
    /// Sorted; at least one.
    policies: Box<[Name]>,
    /// What the pod itself calls the ports that the policies name for what comes in (rule 46).
    ports: Box<[NamedPort]>,
}

#[derive(Debug)]
pub(super) struct Set {
    key: Arc<Key>,
    /// Addresses of local pods that have it.
    users: u32,
    rules: Vec<Compiled>,
    elements: BTreeSet<ElementId>,
    /// Enforced unless all of its policies are in dry run.
    mode: Mode,
}

/// The sets of an address: of what comes in and of what goes out.
type Pair = [u32; 2];

#[derive(Debug)]
pub(super) struct Sets {
    numbers: Assigned,
    ids: HashMap<Arc<Key>, u32>,
    sets: BTreeMap<u32, Set>,
    by_policy: BTreeMap<Name, BTreeSet<u32>>,
    /// What the pods of this node have, by address.
    at: BTreeMap<Addr, BTreeMap<Name, Pair>>,
    addresses: BTreeMap<Name, Box<[Addr]>>,
    /// Pods for whose policies there was no number.
    refused: BTreeSet<Name>,
    error: Option<Exhausted>,
    changed: BTreeSet<u32>,
    moved: BTreeSet<Addr>,
}

impl Sets {
    pub(super) fn new(numbers: Assigned) -> Self {
        Self {
            numbers,
            ids: HashMap::new(),
            sets: BTreeMap::new(),
            by_policy: BTreeMap::new(),
            at: BTreeMap::new(),
            addresses: BTreeMap::new(),
            refused: BTreeSet::new(),
            error: None,
            changed: BTreeSet::new(),
            moved: BTreeSet::new(),
        }
    }

    /// Finds the sets of pods anew, compiles those that are new or have a policy that changed, and gives those back,
    /// with those that are gone.
    pub(super) fn follow(
        &mut self,
        (world, now): (&World, Instant),
        elements: &mut Elements,
        subjects: BTreeSet<Name>,
        policies: &BTreeSet<Name>,
    ) -> BTreeSet<u32> {
        let mut compiled: BTreeSet<u32> =
            policies.iter().filter_map(|name| self.by_policy.get(name)).flatten().copied().collect();
        self.error = None;
        let refused = std::mem::take(&mut self.refused);
        let mut left = Vec::new();
        for name in subjects.into_iter().chain(refused) {
            let pod = world.pod(&name).filter(|pod| is_peer(pod) && world.is_local(pod));
            let pair = pod.map(|pod| self.pair(world, (&name, pod), now, &mut compiled));
            let addresses = pod.map(|pod| pod.addresses.clone()).unwrap_or_default();
            left.extend(self.place(&name, pair, addresses));
        }
        // Only now: a set may have passed from one pod to another.
        for set in left {
            self.forget_unused(set, elements);
            compiled.insert(set);
        }
        for number in &compiled {
            self.compile(*number, world, elements);
        }
        compiled
    }

    pub(super) fn get(&self, number: u32) -> Option<&Set> {
        self.sets.get(&number)
    }

    /// What applies to an address. Two pods have it only for a moment; where they do not agree, nothing passes.
    pub(super) fn of(&self, addr: Addr) -> Pair {
        let Some(pods) = self.at.get(&addr) else { return [EndpointPolicy::OPEN; 2] };
        let mut pairs = pods.values();
        let Some(first) = pairs.next() else { return [EndpointPolicy::OPEN; 2] };
        if pairs.all(|pair| pair == first) { *first } else { [EndpointPolicy::CLOSED; 2] }
    }

    pub(super) fn elements(&self, number: u32) -> impl Iterator<Item = ElementId> {
        self.sets.get(&number).into_iter().flat_map(|set| set.elements.iter().copied())
    }

    pub(super) fn policies(&self, number: u32) -> &[Name] {
        self.sets.get(&number).map_or(&[], |set| &set.key.policies)
    }

    pub(super) fn meaning(&self, number: u32) -> Option<Meaning> {
        let set = self.sets.get(&number)?;
        let names: Vec<_> = set.key.policies.iter().map(Name::to_string).collect();
        let direction = match set.key.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        Some(Meaning::new(fingerprint(&set.key), &format!("{direction} {}", names.join(" "))))
    }

    pub(super) fn addresses_of(&self, set: u32) -> impl Iterator<Item = Addr> {
        let has = move |pods: &BTreeMap<Name, Pair>| pods.values().any(|pair| pair.contains(&set));
        self.at.iter().filter(move |(_, pods)| has(pods)).map(|(addr, _)| *addr)
    }

    pub(super) fn release(&mut self, number: u32, until: Instant) {
        self.numbers.rest(number, until);
    }

    /// Why the pods that it names have no set of their own.
    pub(super) fn refused(&self) -> Option<(&Exhausted, &BTreeSet<Name>)> {
        self.error.as_ref().map(|error| (error, &self.refused))
    }

    pub(super) fn take_changed(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn take_moved(&mut self) -> BTreeSet<Addr> {
        std::mem::take(&mut self.moved)
    }

    /// The sets of a local pod; those that there were not are to be compiled.
    fn pair(
        &mut self,
        world: &World,
        (name, pod): (&Name, &Pod),
        now: Instant,
        fresh: &mut BTreeSet<u32>,
    ) -> Pair {
        Direction::ALL.map(|direction| {
            let Some(key) = key(world, name, pod, direction) else { return EndpointPolicy::OPEN };
            if let Some(number) = self.ids.get(&key) {
                return *number;
            }
            let number = match self.numbers.take(fingerprint(&key), now) {
                Ok(number) => number,
                Err(error) => {
                    self.error = Some(error);
                    self.refused.insert(name.clone());
                    return EndpointPolicy::CLOSED;
                }
            };
            let key = Arc::new(key);
            for policy in &key.policies {
                self.by_policy.entry(policy.clone()).or_default().insert(number);
            }
            self.ids.insert(key.clone(), number);
            let (rules, elements) = (Vec::new(), BTreeSet::new());
            self.sets.insert(number, Set { key, users: 0, rules, elements, mode: Mode::Enforce });
            self.changed.insert(number);
            fresh.insert(number);
            number
        })
    }

    /// Notes what a pod has now, and gives back the sets that may have lost their last user.
    fn place(&mut self, name: &Name, pair: Option<Pair>, addresses: Box<[Addr]>) -> Vec<u32> {
        let mut left = Vec::new();
        if let Some(pair) = pair {
            for addr in &addresses {
                self.count(pair, |users| users + 1);
                if let Some(old) = self.at.entry(*addr).or_default().insert(name.clone(), pair) {
                    self.count(old, |users| users - 1);
                    left.extend(old);
                    if old == pair {
                        continue;
                    }
                }
                self.moved.insert(*addr);
            }
        }
        let old = match pair {
            Some(_) => self.addresses.insert(name.clone(), addresses.clone()),
            None => self.addresses.remove(name),
        };
        for addr in old.iter().flatten().filter(|addr| pair.is_none() || !addresses.contains(addr)) {
            let Some(pods) = self.at.get_mut(addr) else { continue };
            let pair = pods.remove(name);
            if pods.is_empty() {
                self.at.remove(addr);
            }
            if let Some(pair) = pair {
                self.count(pair, |users| users - 1);
                left.extend(pair);
            }
            self.moved.insert(*addr);
        }
        left
    }

    fn count(&mut self, pair: Pair, change: impl Fn(u32) -> u32) {
        for number in pair {
            if let Some(set) = self.sets.get_mut(&number) {
                set.users = change(set.users);
            }
        }
    }

    fn forget_unused(&mut self, number: u32, elements: &mut Elements) {
        if self.sets.get(&number).is_none_or(|set| set.users > 0) {
            return;
        }
        let Some(set) = self.sets.remove(&number) else { return };
        elements.reuse(number, &BTreeSet::new(), &set.elements);
        self.ids.remove(&set.key);
        for policy in &set.key.policies {
            if let Some(sets) = self.by_policy.get_mut(policy) {
                sets.remove(&number);
                if sets.is_empty() {
                    self.by_policy.remove(policy);
                }
            }
        }
        self.changed.insert(number);
    }

    fn compile(&mut self, number: u32, world: &World, elements: &mut Elements) {
        let Some(set) = self.sets.get_mut(&number) else { return };
        let key = set.key.clone();
        let policies: Vec<_> =
            key.policies.iter().filter_map(|name| Some((name, world.policy(name)?))).collect();
        // What is only tried can add nothing to what is enforced, and take nothing away.
        let enforced = policies.iter().any(|(_, policy)| policy.mode == Mode::Enforce);
        set.mode = if enforced { Mode::Enforce } else { Mode::DryRun };
        let mut used = BTreeSet::new();
        set.rules = Vec::new();
        for (name, policy) in policies.into_iter().filter(|(_, policy)| policy.mode == set.mode) {
            for rule in policy.rules(key.direction).unwrap_or_default() {
                set.rules.push(compiled(rule, &name.namespace, &key, &mut |element| {
                    let id = elements.intern(element);
                    used.insert(id);
                    id
                }));
            }
        }
        elements.reuse(number, &used, &set.elements);
        set.elements = used;
    }
}

impl Set {
    pub(super) fn verdicts(&self, signature: &[(ElementId, Port)]) -> Verdicts {
        compile(self.rules.iter(), signature, self.mode)
    }
}

/// `None` where no policy isolates the pod that way (rule 43).
fn key(world: &World, name: &Name, pod: &Pod, direction: Direction) -> Option<Key> {
    let selects =
        |policy: &NetworkPolicy| policy.rules(direction).is_some() && policy.pods.matches(&pod.labels);
    let policies: Vec<_> = world.policies_in(&name.namespace).filter(|(_, policy)| selects(policy)).collect();
    if policies.is_empty() {
        return None;
    }
    let mut ports = Vec::new();
    if direction == Direction::Ingress {
        let rules = policies.iter().flat_map(|(_, policy)| policy.rules(direction).unwrap_or_default());
        let named = |it: &NamedPort| {
            let calls = |wanted: &PolicyPort| {
                wanted.proto == it.proto
                    && matches!(&wanted.number, PortNumber::Named(name) if *name == it.name)
            };
            rules.clone().any(|rule| rule.ports.iter().any(calls))
        };
        ports.extend(pod.ports.iter().filter(|it| named(it)).cloned());
    }
    ports.sort_unstable_by(|a, b| (&a.name, a.proto, a.port).cmp(&(&b.name, b.proto, b.port)));
    ports.dedup();
    let policies = policies.into_iter().map(|(name, _)| name.clone()).collect();
    Some(Key { direction, policies, ports: ports.into() })
}

fn compiled(
    rule: &Rule,
    namespace: &str,
    key: &Key,
    intern: &mut impl FnMut(Element) -> ElementId,
) -> Compiled {
    let peers = rule.peers.iter().map(|peer| {
        intern(match peer {
            Peer::Pods { namespaces, pods } => {
                let scope = match namespaces {
                    Namespaces::Own => Scope::In(namespace.into()),
                    Namespaces::Matching(selector) => Scope::Matching(selector.clone()),
                };
                Element::Pods { scope, pods: pods.clone() }
            }
            Peer::Block(block) => Element::Block(block.clone()),
        })
    });
    let peers: Box<[_]> = peers.collect();
    let mut ports = Vec::new();
    for PolicyPort { proto, number } in &rule.ports {
        match (number, key.direction) {
            (PortNumber::Every, _) => ports.push(Ports::Range(*proto, Port::ZERO, Port::new(u16::MAX))),
            (PortNumber::Range(first, last), _) => ports.push(Ports::Range(*proto, *first, *last)),
            (PortNumber::Named(name), Direction::Ingress) => {
                let own = key.ports.iter().filter(|it| it.name == *name && it.proto == *proto);
                ports.extend(own.map(|it| Ports::Range(*proto, it.port, it.port)));
            }
            (PortNumber::Named(name), Direction::Egress) => {
                let element = intern(Element::Named { name: name.clone(), proto: *proto });
                ports.push(Ports::OfPeer(element, *proto));
            }
        }
    }
    // A name that means nothing leaves no port, which is not the same as every port (rule 46).
    let ports = (!rule.ports.is_empty()).then(|| ports.into());
    Compiled { peers: (!peers.is_empty()).then_some(peers), ports }
}
