//! Pods that no policy can tell apart: those of one namespace with the same labels and the same named ports. They are
//! matched once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ferroflow_common::addr::{Addr, Port};

use super::element::{Changed, Element, ElementId, Elements, Scope, Signature};
use crate::model::{Labels, Name, NamedPort, Network, Pod, World};

/// What policies can see of a pod, but for its address.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Look {
    pub(super) namespace: Arc<str>,
    pub(super) labels: Labels,
    pub(super) ports: Arc<[NamedPort]>,
}

type GroupId = u32;

#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Pods that have addresses.
    pods: BTreeMap<Name, Member>,
    ids: HashMap<Arc<Look>, GroupId>,
    groups: BTreeMap<GroupId, Group>,
    by_namespace: BTreeMap<Arc<str>, BTreeSet<GroupId>>,
    /// How many pods of a group are at an address.
    at: BTreeMap<(Addr, GroupId), u32>,
    next: GroupId,
    /// Addresses whose groups changed.
    dirty: BTreeSet<Addr>,
    /// Groups whose signatures changed.
    altered: BTreeSet<GroupId>,
}

#[derive(Clone, Debug)]
struct Member {
    group: GroupId,
    addresses: Box<[Addr]>,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Local,
    Remote,
}

#[derive(Debug)]
struct Group {
    look: Arc<Look>,
    signature: Vec<(ElementId, Port)>,
    pods: u32,
}

/// What came of pods that changed.
#[derive(Debug, Default)]
pub(super) struct Regrouped {
    /// Pods that are on this node, or were.
    pub(super) local: BTreeSet<Name>,
    /// Groups that have to be matched against every element.
    pub(super) fresh: BTreeSet<GroupId>,
}

impl Groups {
    /// Puts pods into their groups.
    pub(super) fn follow(
        &mut self,
        world: &World,
        pods: &BTreeSet<Name>,
        namespaces: &BTreeSet<Box<str>>,
    ) -> Regrouped {
        let mut regrouped = Regrouped::default();
        for name in pods {
            let pod = world.pod(name).filter(|pod| is_peer(pod));
            let place = pod.map(|pod| if world.is_local(pod) { Place::Local } else { Place::Remote });
            // The new group comes first, so that a pod that stays in its own does not empty it.
            let new = pod.zip(place).map(|(pod, place)| Member {
                group: self.group(name, pod, &mut regrouped.fresh),
                addresses: pod.addresses.clone(),
                place,
            });
            if let Some(new) = &new {
                self.link(new);
            }
            let old = match new.clone() {
                Some(new) => self.pods.insert(name.clone(), new),
                None => self.pods.remove(name),
            };
            if let Some(old) = &old {
                self.unlink(old);
            }
            if old.iter().chain(&new).any(|member| member.place == Place::Local) {
                regrouped.local.insert(name.clone());
            }
        }
        let groups = namespaces.iter().filter_map(|namespace| self.by_namespace.get(&**namespace));
        regrouped.fresh.extend(groups.flatten());
        regrouped.fresh.retain(|group| self.groups.contains_key(group));
        regrouped
    }

    /// Brings the signatures up to date: those of fresh groups as a whole, those of others by what changed.
    pub(super) fn match_elements(
        &mut self,
        world: &World,
        elements: &Elements,
        changed: &Changed,
        fresh: &BTreeSet<GroupId>,
    ) {
        if !changed.gone.is_empty() {
            for (id, group) in &mut self.groups {
                let before = group.signature.len();
                group.signature.retain(|(element, _)| !changed.gone.contains(element));
                if group.signature.len() != before {
                    self.altered.insert(*id);
                }
            }
        }
        let new: Vec<_> = changed.new.iter().filter_map(|id| Some((*id, elements.get(*id)?))).collect();
        if !new.is_empty() {
            for (namespace, ids) in &self.by_namespace {
                let labels = world.namespace_labels(namespace);
                let new: Vec<_> = new.iter().filter(|(_, it)| may_match(it, namespace, &labels)).collect();
                for id in ids.iter().filter(|id| !new.is_empty() && !fresh.contains(id)) {
                    let Some(group) = self.groups.get_mut(id) else { continue };
                    let look = &group.look;
                    let found = new.iter().flat_map(|(id, element)| pairs(*id, element, look, &labels));
                    let found: Vec<_> = found.collect();
                    if !found.is_empty() {
                        group.signature.extend(found);
                        group.signature.sort_unstable();
                        self.altered.insert(*id);
                    }
                }
            }
        }
        for id in fresh {
            let Some(group) = self.groups.get_mut(id) else { continue };
            let labels = world.namespace_labels(&group.look.namespace);
            let found = elements.iter().flat_map(|(id, it)| pairs(id, it, &group.look, &labels));
            let mut signature: Vec<_> = found.collect();
            signature.sort_unstable();
            if signature != group.signature {
                group.signature = signature;
                self.altered.insert(*id);
            }
        }
    }

    /// Addresses whose pods' part of a signature may have changed since this was last asked.
    pub(super) fn take_dirty(&mut self) -> BTreeSet<Addr> {
        let mut dirty = std::mem::take(&mut self.dirty);
        let altered = std::mem::take(&mut self.altered);
        if !altered.is_empty() {
            let at = self.at.keys().filter(|(_, group)| altered.contains(group));
            dirty.extend(at.map(|(addr, _)| *addr));
        }
        dirty
    }

    /// What the pods at an address mean, together.
    pub(super) fn signature(&self, addr: &Addr) -> Signature {
        let groups =
            self.at.range((*addr, GroupId::MIN)..=(*addr, GroupId::MAX)).map(|((_, group), _)| group);
        let mut signature: Vec<_> = groups
            .filter_map(|id| self.groups.get(id))
            .flat_map(|group| group.signature.iter().copied())
            .collect();
        signature.sort_unstable();
        signature.dedup();
        signature.into()
    }

    /// The pods of this node.
    pub(super) fn local(&self) -> impl Iterator<Item = &Name> {
        self.pods.iter().filter(|(_, member)| member.place == Place::Local).map(|(name, _)| name)
    }

    /// The pods of this node in a namespace.
    pub(super) fn local_in(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        let pods = self.pods.range(Name::new(namespace, "")..);
        pods.take_while(move |(name, _)| *name.namespace == *namespace)
            .filter(|(_, member)| member.place == Place::Local)
            .map(|(name, _)| name)
    }

    fn group(&mut self, name: &Name, pod: &Pod, fresh: &mut BTreeSet<GroupId>) -> GroupId {
        let (labels, ports) = (pod.labels.clone(), pod.ports.clone());
        let look = Look { namespace: name.namespace.clone(), labels, ports };
        if let Some(id) = self.ids.get(&look) {
            return *id;
        }
        let (id, look) = (self.next, Arc::new(look));
        self.next += 1;
        self.ids.insert(look.clone(), id);
        self.by_namespace.entry(look.namespace.clone()).or_default().insert(id);
        self.groups.insert(id, Group { look, signature: Vec::new(), pods: 0 });
        fresh.insert(id);
        id
    }

    fn link(&mut self, member: &Member) {
        let Some(group) = self.groups.get_mut(&member.group) else { return };
        group.pods += 1;
        for addr in &member.addresses {
            *self.at.entry((*addr, member.group)).or_default() += 1;
            self.dirty.insert(*addr);
        }
    }

    fn unlink(&mut self, member: &Member) {
        let Some(group) = self.groups.get_mut(&member.group) else { return };
        group.pods -= 1;
        let last = group.pods == 0;
        for addr in &member.addresses {
            let at = (*addr, member.group);
            match self.at.get_mut(&at) {
                Some(pods) if *pods > 1 => *pods -= 1,
                Some(_) | None => drop(self.at.remove(&at)),
            }
            self.dirty.insert(*addr);
        }
        if last {
            let look = group.look.clone();
            self.groups.remove(&member.group);
            self.ids.remove(&look);
            if let Some(ids) = self.by_namespace.get_mut(&look.namespace) {
                ids.remove(&member.group);
                if ids.is_empty() {
                    self.by_namespace.remove(&look.namespace);
                }
            }
        }
    }
}

/// Whether selectors can mean the pod (rules 50 and 51).
pub(super) fn is_peer(pod: &Pod) -> bool {
    pod.network == Network::Own && !pod.addresses.is_empty()
}

fn may_match(element: &Element, namespace: &str, labels: &Labels) -> bool {
    match element {
        Element::Pods { scope: scope @ (Scope::In(_) | Scope::Matching(_)), .. } => {
            scope.has(namespace, labels)
        }
        Element::Named { .. } => true,
        Element::Block(_) => false,
    }
}

fn pairs(id: ElementId, element: &Element, look: &Look, labels: &Labels) -> Vec<(ElementId, Port)> {
    element.ports_of(look, labels).into_iter().map(|port| (id, port)).collect()
}
