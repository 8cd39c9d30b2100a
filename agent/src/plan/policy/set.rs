//! Policy sets: what the policies that select a pod say of one direction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use ferroflow_common::abi::policy::{Cause, EndpointPolicy, Meaning};
use ferroflow_common::addr::{Addr, Port};

use super::compile::{Compiled, Isolation, Layer, Ports, Verdicts, compile};
use super::element::{Element, ElementId, Elements, Scope};
use super::group::is_peer;
use super::{Assigned, fingerprint};
use crate::model::policy::{Direction, Live, Mode, Namespaces, Peer, PolicyPort, PortNumber, Rule};
use crate::model::tier::{Action, Tier, TierRule};
use crate::model::{ClusterNetworkPolicy, Kind, Name, NamedPort, NetworkPolicy, ObjectId, Pod, World};
use crate::plan::ids::Exhausted;

/// Which set it is.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    direction: Direction,
    /// Sorted; at least one.
    policies: Box<[ObjectId]>,
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
    isolation: Isolation,
    /// Names of its policies, with their tiers.
    text: String,
    /// Cut, where one of its policies wants that.
    live: Live,
}

/// The sets of an address: of what comes in and of what goes out.
type Pair = [u32; 2];

#[derive(Debug)]
pub(super) struct Sets {
    numbers: Assigned,
    /// Of policies that do not say.
    live: Live,
    ids: HashMap<Arc<Key>, u32>,
    sets: BTreeMap<u32, Set>,
    by_policy: BTreeMap<ObjectId, BTreeSet<u32>>,
    /// What the pods of this node have, by address.
    at: BTreeMap<Addr, BTreeMap<Name, Pair>>,
    addresses: BTreeMap<Name, Box<[Addr]>>,
    /// Pods for whose policies there was no number, and those.
    refused: BTreeMap<Name, BTreeSet<ObjectId>>,
    error: Option<Exhausted>,
    changed: BTreeSet<u32>,
    moved: BTreeSet<Addr>,
}

impl Sets {
    pub(super) fn new(numbers: Assigned, live: Live) -> Self {
        Self {
            numbers,
            live,
            ids: HashMap::new(),
            sets: BTreeMap::new(),
            by_policy: BTreeMap::new(),
            at: BTreeMap::new(),
            addresses: BTreeMap::new(),
            refused: BTreeMap::new(),
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
        policies: &BTreeSet<ObjectId>,
    ) -> BTreeSet<u32> {
        let mut compiled: BTreeSet<u32> =
            policies.iter().filter_map(|name| self.by_policy.get(name)).flatten().copied().collect();
        self.error = None;
        let refused = std::mem::take(&mut self.refused);
        let mut left = Vec::new();
        for name in subjects.into_iter().chain(refused.into_keys()) {
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

    /// What becomes of established flows of the pods that have a set.
    pub(super) fn live(&self, number: u32) -> Live {
        self.sets.get(&number).map_or(Live::Finish, |set| set.live)
    }

    pub(super) fn elements(&self, number: u32) -> impl Iterator<Item = ElementId> {
        self.sets.get(&number).into_iter().flat_map(|set| set.elements.iter().copied())
    }

    pub(super) fn policies(&self, number: u32) -> &[ObjectId] {
        self.sets.get(&number).map_or(&[], |set| &set.key.policies)
    }

    pub(super) fn meaning(&self, number: u32) -> Option<Meaning> {
        let set = self.sets.get(&number)?;
        Some(Meaning::new(fingerprint(&set.key), &set.text))
    }

    pub(super) fn addresses_of(&self, set: u32) -> impl Iterator<Item = Addr> {
        let has = move |pods: &BTreeMap<Name, Pair>| pods.values().any(|pair| pair.contains(&set));
        self.at.iter().filter(move |(_, pods)| has(pods)).map(|(addr, _)| *addr)
    }

    pub(super) fn release(&mut self, number: u32, until: Instant) {
        self.numbers.rest(number, until);
    }

    /// Why the pods that it names have no set of their own.
    pub(super) fn refused(&self) -> Option<(&Exhausted, &BTreeMap<Name, BTreeSet<ObjectId>>)> {
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
                    self.refused.entry(name.clone()).or_default().extend(key.policies);
                    return EndpointPolicy::CLOSED;
                }
            };
            let key = Arc::new(key);
            for policy in &key.policies {
                self.by_policy.entry(policy.clone()).or_default().insert(number);
            }
            self.ids.insert(key.clone(), number);
            self.sets.insert(number, Set::new(key));
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
        let mut used = BTreeSet::new();
        let mut intern = |element| {
            let id = elements.intern(element);
            used.insert(id);
            id
        };
        let mut rules = namespaced_rules(world, &key, set.isolation(world), &mut intern);
        rules.extend(cluster_rules(world, &key, &mut intern));
        // Those of a layer stay in their order.
        rules.sort_by_key(|rule| rule.layer);
        set.rules = rules;
        elements.reuse(number, &used, &set.elements);
        set.elements = used;
        set.isolation = set.isolation(world);
        let live = key.policies.iter().map(|id| live_of(world, id).unwrap_or(self.live)).max();
        let turned = std::mem::replace(&mut set.live, live.unwrap_or_default()) != set.live;
        set.text = text(world, &key);
        self.changed.insert(number);
        if turned {
            let users: Vec<_> = self.addresses_of(number).collect();
            self.moved.extend(users);
        }
    }
}

impl Set {
    /// Not compiled yet.
    fn new(key: Arc<Key>) -> Self {
        let (rules, elements, text) = (Vec::new(), BTreeSet::new(), String::new());
        Self { key, users: 0, rules, elements, isolation: Isolation::None, text, live: Live::Finish }
    }

    pub(super) fn verdicts(&self, signature: &[(ElementId, Port)]) -> Verdicts {
        compile(&self.rules, signature, self.isolation)
    }

    fn isolation(&self, world: &World) -> Isolation {
        let modes = self.key.policies.iter().filter_map(|id| Some(namespaced_policy(world, id)?.mode));
        // Enforced is the lower one.
        match modes.min() {
            None => Isolation::None,
            Some(Mode::Enforce) => Isolation::Enforced,
            Some(Mode::DryRun) => Isolation::Tried,
        }
    }
}

pub(super) fn namespaced(name: &Name) -> ObjectId {
    ObjectId { kind: Kind::NetworkPolicy, name: name.clone() }
}

pub(super) fn of_cluster(name: &str) -> ObjectId {
    ObjectId { kind: Kind::ClusterNetworkPolicy, name: Name::new("default", name) }
}

fn namespaced_policy<'a>(world: &'a World, id: &ObjectId) -> Option<&'a NetworkPolicy> {
    world.policy(&id.name).filter(|_| id.kind == Kind::NetworkPolicy)
}

fn cluster_policy<'a>(world: &'a World, id: &ObjectId) -> Option<&'a ClusterNetworkPolicy> {
    world.cluster_policy(&id.name.name).filter(|_| id.kind == Kind::ClusterNetworkPolicy)
}

fn live_of(world: &World, id: &ObjectId) -> Option<Live> {
    let of_cluster = || cluster_policy(world, id).and_then(|it| it.live);
    namespaced_policy(world, id).and_then(|it| it.live).or_else(of_cluster)
}

/// `ingress Admin:first shop/web`: names by which the command line finds what a [`Cause`] names.
fn text(world: &World, key: &Key) -> String {
    let mut text = match key.direction {
        Direction::Ingress => "ingress".to_owned(),
        Direction::Egress => "egress".to_owned(),
    };
    for id in &key.policies {
        match cluster_policy(world, id) {
            Some(policy) => text.extend([" ", policy.tier.name(), ":", &id.name.name]),
            None => text.extend([" ", &id.name.namespace, "/", &id.name.name]),
        }
    }
    text
}

/// What is only tried can add nothing to what is enforced, and take nothing away.
fn namespaced_rules(
    world: &World,
    key: &Key,
    isolation: Isolation,
    intern: &mut impl FnMut(Element) -> ElementId,
) -> Vec<Compiled> {
    let mode = if isolation == Isolation::Enforced { Mode::Enforce } else { Mode::DryRun };
    let mut rules = Vec::new();
    for (place, id) in key.policies.iter().enumerate() {
        let Some(policy) = namespaced_policy(world, id).filter(|policy| policy.mode == mode) else {
            continue;
        };
        for (index, rule) in policy.rules(key.direction).unwrap_or_default().iter().enumerate() {
            let (peers, ports) = compiled(rule, &id.name.namespace, key, intern);
            let (layer, cause) = (Layer::Namespaced, Cause::new(place, index));
            rules.push(Compiled { layer, action: Action::Accept, cause, peers, ports });
        }
    }
    rules
}

/// In the order in which they are asked: by priority, then by name, then as they are written.
fn cluster_rules(world: &World, key: &Key, intern: &mut impl FnMut(Element) -> ElementId) -> Vec<Compiled> {
    let policies = key.policies.iter().enumerate();
    let mut policies: Vec<_> =
        policies.filter_map(|(place, id)| Some((cluster_policy(world, id)?, place))).collect();
    policies.sort_by_key(|(policy, place)| (policy.priority, *place));
    let mut rules = Vec::new();
    for (policy, place) in policies {
        let layer = match policy.tier {
            Tier::Admin => Layer::Admin,
            Tier::Baseline => Layer::Baseline,
        };
        for (index, TierRule { action, about }) in policy.rules(key.direction).iter().enumerate() {
            let (peers, ports) = compiled(about, "", key, intern);
            rules.push(Compiled { layer, action: *action, cause: Cause::new(place, index), peers, ports });
        }
    }
    rules
}

/// `None` where no policy has a say (rule 43).
fn key(world: &World, name: &Name, pod: &Pod, direction: Direction) -> Option<Key> {
    let selects =
        |policy: &NetworkPolicy| policy.rules(direction).is_some() && policy.pods.matches(&pod.labels);
    let namespaced_ones = world.policies_in(&name.namespace).filter(|(_, policy)| selects(policy));
    let namespace = world.namespace_labels(&name.namespace);
    let selects = |policy: &ClusterNetworkPolicy| {
        !policy.rules(direction).is_empty()
            && policy.subject.namespaces.matches(&namespace)
            && policy.subject.pods.matches(&pod.labels)
    };
    let of_the_cluster = world.cluster_policies().filter(|(_, policy)| selects(policy));
    let (mut policies, mut rules) = (Vec::new(), Vec::new());
    for (name, policy) in namespaced_ones {
        policies.push(namespaced(name));
        rules.extend(policy.rules(direction).unwrap_or_default());
    }
    for (name, policy) in of_the_cluster {
        policies.push(of_cluster(name));
        rules.extend(policy.rules(direction).iter().map(|rule| &rule.about));
    }
    if policies.is_empty() {
        return None;
    }
    policies.sort_unstable();
    let mut ports = Vec::new();
    if direction == Direction::Ingress {
        let named = |it: &NamedPort| {
            let calls = |wanted: &PolicyPort| {
                wanted.proto == it.proto
                    && matches!(&wanted.number, PortNumber::Named(name) if *name == it.name)
            };
            rules.iter().any(|rule| rule.ports.iter().any(calls))
        };
        ports.extend(pod.ports.iter().filter(|it| named(it)).cloned());
    }
    ports.sort_unstable_by(|a, b| (&a.name, a.proto, a.port).cmp(&(&b.name, b.proto, b.port)));
    ports.dedup();
    Some(Key { direction, policies: policies.into(), ports: ports.into() })
}

/// Any of the peers, or everybody; any of the ports, or everything.
type Parts = (Option<Box<[ElementId]>>, Option<Box<[Ports]>>);

fn compiled(rule: &Rule, namespace: &str, key: &Key, intern: &mut impl FnMut(Element) -> ElementId) -> Parts {
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
    ((!peers.is_empty()).then_some(peers), ports)
}
