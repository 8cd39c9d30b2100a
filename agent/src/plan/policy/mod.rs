//! Policies without identities: what the tables should say of who may talk to the pods of this node.
//!
//! ```text
//!   local pods ──┐                                            ┌─▶ policy sets   what the same policies say to pods
//!   policies ────┼─▶ elements: every selector, block and ─────┤
//!   namespaces ──┘   named port that such policies mention    ├─▶ rules         (set, class) -> verdicts by port
//!   all pods ────────▶ groups: pods that look alike ──────────┴─▶ classes       addresses that mean the same elements
//! ```
//!
//! A **class** is a set of elements: two addresses have the same class where no policy of a local pod can tell them
//! apart. An address that means no element has no class and costs nothing. A **set** is what several policies say of one
//! direction: pods that the same policies select have the same. Its **rules** for a class are complete, so that the
//! programs combine nothing.
//!
//! Pure, and told only what changed: [`Planner::touch`] takes keys in, [`Planner::update`] does what they ask for and
//! says which rows are other than before. A pod that is relabelled is matched against the elements once; a policy that
//! changes plans the sets that it is part of.
//!
//! A set is the policies of all tiers that select a pod (`ClusterNetworkPolicy`), an element is an element whatever policy
//! mentions it, and [`compile`] lays the tiers over each other. Nothing after it knows of them.

mod address;
mod compile;
mod element;
mod group;
mod set;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::Arc;
use std::time::Instant;

use ferroflow_common::abi::policy::{Class, EndpointPolicy, Meaning, PolicyKey};
use ferroflow_common::addr::Addr;

use super::ids::{Exhausted, Numbers};
use crate::model::policy::Live;
use crate::model::{Kind, Name, ObjectId, Prefix, Touched, World};
use address::Addresses;
use element::Elements;
use group::Groups;
use set::Sets;

pub use compile::Verdicts;

/// The plan of all policies, and what it was made of.
#[derive(Debug)]
pub struct Planner {
    touched: Inputs,
    elements: Elements,
    groups: Groups,
    sets: Sets,
    addresses: Addresses,
    /// What each set says of each class, where that is not what it says of the others.
    rules: BTreeMap<PolicyKey, Arc<Verdicts>>,
    pods: Pods,
}

/// Whether pods are told apart. To a cluster that never had a policy they cost nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pods {
    /// There has been no policy.
    Unseen,
    Followed,
}

/// Keys that were touched and not looked at yet.
#[derive(Debug, Default)]
struct Inputs {
    pods: BTreeSet<Name>,
    namespaces: BTreeSet<Box<str>>,
    policies: BTreeSet<ObjectId>,
}

/// Rows that may be other than they were; what they are now is asked of the [`Planner`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub addresses: BTreeSet<Addr>,
    pub ranges: BTreeSet<Prefix>,
    pub rules: BTreeSet<PolicyKey>,
    pub sets: BTreeSet<u32>,
    pub classes: BTreeSet<Class>,
    /// Addresses of local pods whose sets are others.
    pub endpoints: BTreeSet<Addr>,
}

/// How many numbers there are for sets and for classes: as many as the tables have room for, and those that rest.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub sets: u32,
    pub classes: u32,
}

/// What could not be planned, and whose policies that are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// None where it may be any.
    pub policies: BTreeSet<ObjectId>,
    pub text: String,
}

/// What an earlier agent called what.
#[derive(Debug, Default)]
pub struct Known {
    pub sets: Vec<(u32, [u8; 16])>,
    pub classes: Vec<(Class, [u8; 16])>,
}

impl Planner {
    /// Knows no object; numbers that are in use keep their meanings. `live` is for policies that do not say.
    pub fn new(room: Room, known: Known, live: Live) -> Self {
        Self {
            touched: Inputs::default(),
            elements: Elements::default(),
            groups: Groups::default(),
            sets: Sets::new(Assigned::new("policy_sets", room.sets, known.sets), live),
            addresses: Addresses::new(Assigned::new("peer_classes", room.classes, known.classes)),
            rules: BTreeMap::new(),
            pods: Pods::Unseen,
        }
    }

    /// Notes that an object has changed; whether it concerns policies at all.
    pub fn touch(&mut self, key: &Touched) -> Concern {
        match key {
            Touched::Pod(name) => self.pods == Pods::Followed && self.touched.pods.insert(name.clone()),
            Touched::Namespace(name) => self.touched.namespaces.insert(name.clone()),
            Touched::NetworkPolicy(name) => self.touched.policies.insert(set::namespaced(name)),
            Touched::ClusterNetworkPolicy(name) => self.touched.policies.insert(set::of_cluster(name)),
            Touched::Policies | Touched::Service(_) | Touched::Endpoint(_) | Touched::Node => {
                return Concern::None;
            }
        };
        Concern::Policies
    }

    /// Makes the plan follow what was touched, and says which rows to look at. What had no number to be given is left
    /// out, and asked for again at the next call.
    pub fn update(&mut self, world: &World, now: Instant) -> Changes {
        let mut touched = std::mem::take(&mut self.touched);
        if self.pods == Pods::Unseen && !touched.policies.is_empty() {
            self.pods = Pods::Followed;
            touched.pods = world.pods().map(|(name, _)| name.clone()).collect();
        }
        let regrouped = self.groups.follow(world, &touched.pods, &touched.namespaces);
        let mut subjects = regrouped.local.clone();
        for id in &touched.policies {
            if id.kind == Kind::ClusterNetworkPolicy {
                subjects.extend(self.groups.local().cloned());
            } else {
                subjects.extend(self.groups.local_in(&id.name.namespace).cloned());
            }
        }
        // Policies of namespaces select by the labels of pods alone.
        if world.cluster_policies().next().is_some() {
            subjects.extend(touched.namespaces.iter().flat_map(|name| self.groups.local_in(name)).cloned());
        }
        let sets = self.sets.follow((world, now), &mut self.elements, subjects, &touched.policies);
        let elements = self.elements.settle();
        self.groups.match_elements(world, &self.elements, &elements, &regrouped.fresh);
        let dirty = self.groups.take_dirty();
        let classes = self.addresses.follow((&self.elements, &self.groups), &elements, dirty, now);
        Changes {
            rules: self.plan_rules(&sets, &classes),
            addresses: classes.addresses,
            ranges: classes.ranges,
            sets: self.sets.take_changed(),
            classes: classes.new.into_iter().chain(classes.gone).collect(),
            endpoints: self.sets.take_moved(),
        }
    }

    /// What applies to a local pod's address; what it adopts is not for the plan to say.
    pub fn endpoint(&self, addr: Addr) -> EndpointPolicy {
        let [ingress, egress] = self.sets.of(addr);
        let cuts = [ingress, egress].into_iter().any(|set| self.sets.live(set) == Live::Cut);
        let live = if cuts { EndpointPolicy::CUT } else { EndpointPolicy::FINISH };
        EndpointPolicy { ingress, egress, adopts_until: 0, live }
    }

    /// The class of a pod's address; `None` where that of its range is right.
    pub fn class(&self, addr: &Addr) -> Option<Class> {
        self.addresses.class(addr)
    }

    /// The class of a range, but for longer ranges in it.
    pub fn range(&self, range: &Prefix) -> Option<Class> {
        self.addresses.range(range)
    }

    pub fn rules(&self, key: &PolicyKey) -> Option<&Arc<Verdicts>> {
        self.rules.get(key)
    }

    /// Who a set is.
    pub fn set(&self, number: u32) -> Option<Meaning> {
        self.sets.meaning(number)
    }

    /// Who a class is.
    pub fn meaning(&self, class: Class) -> Option<Meaning> {
        self.addresses.meaning(class, &self.elements)
    }

    /// The policies of a set.
    pub fn policies(&self, set: u32) -> &[ObjectId] {
        self.sets.policies(set)
    }

    /// The addresses of local pods that have a set.
    pub fn endpoints_of(&self, set: u32) -> impl Iterator<Item = Addr> {
        self.sets.addresses_of(set)
    }

    /// The tables no longer have the set or class: its number may be given to another after a while.
    pub fn released(&mut self, number: Number, until: Instant) {
        match number {
            Number::Set(number) => self.sets.release(number, until),
            Number::Class(number) => self.addresses.release(number, until),
        }
    }

    /// What could not be planned: pods that nothing passes, and addresses that no policy lets through, until there is
    /// room.
    pub fn refused(&self) -> Vec<Refused> {
        let pods = self.sets.refused().map(|(error, pods)| {
            let names: Vec<_> = pods.keys().map(Name::to_string).collect();
            let policies = pods.values().flatten().cloned().collect();
            Refused { policies, text: format!("{error}; nothing passes {}", names.join(", ")) }
        });
        let addresses = self.addresses.refused().map(|(error, addresses)| {
            let text = format!("{error}; policies let nothing through of {} addresses", addresses.len());
            Refused { policies: BTreeSet::new(), text }
        });
        pods.into_iter().chain(addresses).collect()
    }

    /// The rules of sets that were compiled anew, and those for new classes; those of what is gone go.
    fn plan_rules(&mut self, sets: &BTreeSet<u32>, classes: &address::Changes) -> BTreeSet<PolicyKey> {
        let mut pairs = BTreeSet::new();
        for set in sets {
            pairs.insert(PolicyKey { set: *set, class: PolicyKey::OTHERS });
            pairs.extend(self.rules_of(*set));
            let classes = self.sets.elements(*set).flat_map(|element| self.addresses.with(element));
            pairs.extend(classes.map(|class| PolicyKey { set: *set, class }));
        }
        for class in &classes.new {
            let elements = self.addresses.signature(*class).iter().map(|(element, _)| *element);
            let sets = elements.flat_map(|element| self.elements.users(element));
            pairs.extend(sets.map(|set| PolicyKey { set, class: *class }));
        }
        if !classes.gone.is_empty() {
            let gone = self.rules.keys().filter(|key| classes.gone.contains(&key.class));
            pairs.extend(gone.copied());
        }
        let mut changed = BTreeSet::new();
        for key in pairs {
            let wanted = self.compile(&key);
            if self.rules.get(&key).map(|it| &**it) != wanted.as_ref() {
                match wanted {
                    Some(verdicts) => self.rules.insert(key, Arc::new(verdicts)),
                    None => self.rules.remove(&key),
                };
                changed.insert(key);
            }
        }
        changed
    }

    /// The rows of a set.
    pub fn rules_of(&self, set: u32) -> impl Iterator<Item = PolicyKey> {
        let (first, last) = (PolicyKey { set, class: 0 }, PolicyKey { set, class: u32::MAX });
        self.rules.range(first..=last).map(|(key, _)| *key)
    }

    /// `None` where there is to be no row: the set or the class is gone, or the set says of it what it says of others.
    fn compile(&self, key: &PolicyKey) -> Option<Verdicts> {
        let set = self.sets.get(key.set)?;
        let others = set.verdicts(&[]);
        if key.class == PolicyKey::OTHERS {
            return Some(others);
        }
        let signature = self.addresses.signature(key.class);
        let own = set.verdicts(signature);
        (!signature.is_empty() && own != others).then_some(own)
    }
}

/// Whether a key is one of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    Policies,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    Set(u32),
    Class(Class),
}

/// Numbers by what they stand for: those that an earlier agent gave are given again.
#[derive(Debug)]
struct Assigned {
    numbers: Numbers,
    known: BTreeMap<[u8; 16], u32>,
}

impl Assigned {
    fn new(table: &'static str, room: u32, known: Vec<(u32, [u8; 16])>) -> Self {
        let mut used: Vec<_> = known.iter().map(|(number, _)| *number).collect();
        used.sort_unstable();
        let mut by_meaning = BTreeMap::new();
        let mut twice = BTreeSet::new();
        for (number, fingerprint) in known {
            if by_meaning.insert(fingerprint, number).is_some() {
                twice.insert(fingerprint);
            }
        }
        // Which of the two it was cannot be told: neither is trusted.
        by_meaning.retain(|fingerprint, _| !twice.contains(fingerprint));
        // The number of the others, and that of what is closed, is nobody's.
        let end = room.saturating_mul(2).clamp(2, u32::MAX - 1);
        Self { numbers: Numbers::restore(table, end, used), known: by_meaning }
    }

    fn take(&mut self, fingerprint: [u8; 16], now: Instant) -> Result<u32, Exhausted> {
        match self.known.remove(&fingerprint) {
            Some(number) => Ok(number),
            None => self.numbers.take(now),
        }
    }

    fn rest(&mut self, number: u32, until: Instant) {
        self.known.retain(|_, known| *known != number);
        self.numbers.rest(number, until);
    }
}

/// The same for equal values, in this agent and the next; should another build hash otherwise, numbers are given anew.
fn fingerprint(value: &impl Hash) -> [u8; 16] {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, value).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    (half(0) << 64 | half(1)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::policy::Verdict;
    use ferroflow_common::addr::{Port, Proto};

    use super::*;
    use crate::model::label::{Requirement, Selector};
    use crate::model::policy::{Block, Namespaces, Peer, PolicyPort, PortNumber, Rule};
    use crate::model::{Change, Labels, NetworkPolicy, Pod};

    /// A world, its plan, and a clock that stands still.
    struct Run {
        world: World,
        planner: Planner,
        now: Instant,
    }

    impl Run {
        fn new(room: Room) -> Self {
            let planner = Planner::new(room, Known::default(), Live::Finish);
            Self { world: World::new("here"), planner, now: Instant::now() }
        }

        fn take(&mut self, changes: impl IntoIterator<Item = Change>) {
            for change in changes {
                for key in self.world.apply(change) {
                    let other = matches!(key, Touched::Endpoint(_));
                    assert_eq!(self.planner.touch(&key) == Concern::None, other, "{key}");
                }
            }
        }

        fn update(&mut self) -> Changes {
            self.planner.update(&self.world, self.now)
        }

        fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Changes {
            self.take(changes);
            self.update()
        }
    }

    const ROOM: Room = Room { sets: 1000, classes: 1000 };

    fn app(value: &str) -> Selector {
        Selector::new([Requirement::equals("app", value)])
    }

    fn pod(name: &Name, node: &str, addr: Addr, labels: &[(&str, &str)]) -> Change {
        let labels = Labels::new(labels.iter().copied());
        let pod = Pod { node: node.into(), addresses: Box::new([addr]), labels, ..Pod::default() };
        Change::Pod(name.clone(), Some(pod))
    }

    fn from(peers: impl IntoIterator<Item = Peer>, port: u16) -> Rule {
        let number = PortNumber::Range(Port::new(port), Port::new(port));
        Rule {
            peers: peers.into_iter().collect(),
            ports: Box::new([PolicyPort { proto: Proto::TCP, number }]),
        }
    }

    fn ingress(name: &Name, pods: Selector, rules: impl IntoIterator<Item = Rule>) -> Change {
        let policy =
            NetworkPolicy { pods, ingress: Some(rules.into_iter().collect()), ..NetworkPolicy::default() };
        Change::NetworkPolicy(name.clone(), Some(policy))
    }

    fn near(pods: Selector) -> Peer {
        Peer::Pods { namespaces: Namespaces::Own, pods }
    }

    fn shop(name: &str) -> Name {
        Name::new("shop", name)
    }

    fn at(last: u8) -> Addr {
        Addr::v4([10, 0, 0, last])
    }

    #[test]
    fn pods_that_the_same_policies_select_share_a_set_and_others_cost_nothing() {
        let mut run = Run::new(ROOM);
        let web = [("app", "web")];
        let rules = [from([near(app("client"))], 80)];
        run.apply([
            ingress(&shop("web"), app("web"), rules),
            pod(&shop("a"), "here", at(1), &web),
            pod(&shop("b"), "here", at(2), &web),
            pod(&shop("c"), "there", at(3), &web),
            pod(&shop("d"), "there", at(4), &[("app", "client")]),
            pod(&Name::new("other", "e"), "there", at(5), &[("app", "client")]),
        ]);
        let EndpointPolicy { ingress: set, egress, .. } = run.planner.endpoint(at(1));
        assert_eq!(run.planner.endpoint(at(2)).ingress, set);
        assert_eq!((egress, run.planner.endpoint(at(3))), (EndpointPolicy::OPEN, EndpointPolicy::default()));
        assert_eq!(run.planner.policies(set), [set::namespaced(&shop("web"))]);
        assert_eq!(run.planner.set(set).unwrap().as_str(), "ingress shop/web");
        let classes: Vec<_> = (1..=5).map(|last| run.planner.class(&at(last)).is_some()).collect();
        assert_eq!(classes, [false, false, false, true, false], "only the client that the policy means");
        let class = run.planner.class(&at(4)).unwrap();
        assert_eq!(run.planner.meaning(class).unwrap().as_str(), "pods app=client in shop");
        assert_eq!(run.planner.rules(&PolicyKey { set, class }).unwrap().ranges.len(), 1);
        let others = PolicyKey { set, class: PolicyKey::OTHERS };
        let others = run.planner.rules(&others).unwrap();
        assert_eq!((others.otherwise, others.ranges.len()), (Verdict::Deny, 0));
    }

    #[test]
    fn rule_53_a_relabel_touches_one_address() {
        let mut run = Run::new(ROOM);
        run.apply([
            ingress(&shop("web"), app("web"), [from([near(app("client"))], 80)]),
            pod(&shop("a"), "here", at(1), &[("app", "web")]),
            pod(&shop("b"), "there", at(2), &[("app", "client")]),
            pod(&shop("c"), "there", at(3), &[("app", "client")]),
        ]);
        let changes = run.apply([pod(&shop("b"), "there", at(2), &[("app", "none")])]);
        let addresses = [at(2)].into();
        assert_eq!(changes, Changes { addresses, ..Changes::default() }, "the class is there for another");
        let changes = run.apply([pod(&shop("c"), "there", at(3), &[("app", "none")])]);
        assert_eq!((changes.addresses.len(), changes.rules.len(), changes.classes.len()), (1, 1, 1));
        assert_eq!(run.apply([]), Changes::default());
    }

    #[test]
    fn an_agent_that_starts_gives_the_numbers_that_the_last_one_gave() {
        let changes = || {
            [
                ingress(&shop("web"), app("web"), [from([near(app("client"))], 80)]),
                ingress(&shop("db"), app("db"), [from([near(app("web"))], 81)]),
                pod(&shop("a"), "here", at(1), &[("app", "web")]),
                pod(&shop("b"), "here", at(2), &[("app", "db")]),
                pod(&shop("c"), "there", at(3), &[("app", "client")]),
            ]
        };
        let mut first = Run::new(ROOM);
        let written = first.apply(changes());
        let known = Known {
            sets: written.sets.iter().map(|it| (*it, first.planner.set(*it).unwrap().fingerprint)).collect(),
            classes: written
                .classes
                .iter()
                .map(|it| (*it, first.planner.meaning(*it).unwrap().fingerprint))
                .collect(),
        };
        let mut second = Run { planner: Planner::new(ROOM, known, Live::Finish), ..Run::new(ROOM) };
        let mut backwards = changes();
        backwards.reverse();
        for change in backwards {
            second.apply([change]);
        }
        for last in 1..=3 {
            assert_eq!(second.planner.endpoint(at(last)), first.planner.endpoint(at(last)));
            assert_eq!(second.planner.class(&at(last)), first.planner.class(&at(last)));
        }
    }

    #[test]
    fn what_gets_no_number_is_closed_and_only_that() {
        let mut run = Run::new(Room { sets: 1, classes: 1000 });
        let policies = ["a", "b", "c", "d"].map(|it| ingress(&shop(it), app(it), []));
        run.apply(policies);
        let pods: Vec<_> = [("a", 1), ("b", 2), ("c", 3)]
            .map(|(app, last)| pod(&shop(app), "here", at(last), &[("app", app)]))
            .into();
        run.apply(pods);
        let closed: Vec<_> =
            (1..=3).map(|it| run.planner.endpoint(at(it)).ingress == EndpointPolicy::CLOSED).collect();
        assert_eq!(closed.iter().filter(|it| **it).count(), 2, "there is one number: {closed:?}");
        let refused = run.planner.refused();
        let text = &refused[0].text;
        assert!(text.contains("table `policy_sets` has no room") && text.contains("shop/c"), "{refused:?}");
        let policies: Vec<_> = refused[0].policies.iter().map(ToString::to_string).collect();
        assert_eq!(policies, ["NetworkPolicy shop/b", "NetworkPolicy shop/c"]);
    }

    #[test]
    fn huge_policies_are_laid_out_in_full() {
        let mut run = Run::new(ROOM);
        let every_other = (1..=10_000).map(|it| {
            let port = Port::new(it * 2);
            PolicyPort { proto: Proto::TCP, number: PortNumber::Range(port, port) }
        });
        let ports = Rule { peers: Box::default(), ports: every_other.collect() };
        let except = (0..1000_u16).map(|it| {
            let [high, low] = it.to_be_bytes();
            Prefix::new(Addr::v4([10, high, low, 0]), 24).unwrap()
        });
        let range = Prefix::new(Addr::v4([0; 4]), 0).unwrap();
        let block = Peer::Block(Block { range, except: except.collect() });
        run.apply([
            pod(&shop("a"), "here", at(1), &[("app", "web")]),
            ingress(&shop("web"), app("web"), [ports, from([block], 1)]),
        ]);
        let set = run.planner.endpoint(at(1)).ingress;
        let others = run.planner.rules(&PolicyKey { set, class: PolicyKey::OTHERS }).unwrap();
        assert_eq!(others.ranges.len(), 10_000);
        let inside = run.planner.range(&range).unwrap();
        assert_eq!(
            run.planner.rules(&PolicyKey { set, class: inside }).unwrap().ranges.len(),
            10_001,
            "1 and 2 touch, and are of two rules"
        );
        let left_out = Prefix::new(Addr::v4([10, 0, 7, 0]), 24).unwrap();
        assert_eq!(run.planner.range(&left_out), Some(0), "the exceptions are the world again");
    }
}
