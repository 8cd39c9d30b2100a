//! What policies mention and addresses can be told apart by.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use ferroflow_common::addr::{Port, Proto};

use super::fingerprint;
use super::group::Look;
use crate::model::label::Selector;
use crate::model::policy::Block;
use crate::model::{Labels, Prefix};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Element {
    /// Pods by their labels and those of their namespace.
    Pods {
        scope: Scope,
        pods: Selector,
    },
    Block(Block),
    /// Pods that have a port of this name: which number it is tells them apart, too (rule 46).
    Named {
        name: Box<str>,
        proto: Proto,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Scope {
    /// One namespace.
    In(Box<str>),
    Matching(Selector),
}

impl Scope {
    pub(super) fn has(&self, namespace: &str, labels: &Labels) -> bool {
        match self {
            Self::In(name) => **name == *namespace,
            Self::Matching(selector) => selector.matches(labels),
        }
    }
}

/// A number that means an element while a set uses it.
pub(super) type ElementId = u32;

/// Which elements an address means, sorted; with the port that it has under a name, or else with [`Port::ZERO`].
pub(super) type Signature = Box<[(ElementId, Port)]>;

/// The elements that sets use.
#[derive(Debug, Default)]
pub(super) struct Elements {
    ids: HashMap<Arc<Element>, ElementId>,
    known: BTreeMap<ElementId, Known>,
    next: ElementId,
    /// Since this was last asked.
    new: BTreeSet<ElementId>,
    idle: BTreeSet<ElementId>,
}

#[derive(Debug)]
struct Known {
    element: Arc<Element>,
    users: BTreeSet<u32>,
}

/// Which elements are other than before.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) new: BTreeSet<ElementId>,
    pub(super) gone: BTreeSet<ElementId>,
    /// Blocks came or went.
    pub(super) blocks: Blocks,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Blocks {
    #[default]
    Same,
    Others,
}

impl Elements {
    /// The number of an element that a set is about to use.
    pub(super) fn intern(&mut self, element: Element) -> ElementId {
        if let Some(id) = self.ids.get(&element) {
            return *id;
        }
        let (id, element) = (self.next, Arc::new(element));
        self.next += 1;
        self.ids.insert(element.clone(), id);
        self.known.insert(id, Known { element, users: BTreeSet::new() });
        self.new.insert(id);
        self.idle.insert(id);
        id
    }

    /// A set uses these now, and no longer those.
    pub(super) fn reuse(&mut self, set: u32, used: &BTreeSet<ElementId>, no_longer: &BTreeSet<ElementId>) {
        for id in no_longer.difference(used) {
            if let Some(known) = self.known.get_mut(id)
                && known.users.remove(&set)
                && known.users.is_empty()
            {
                self.idle.insert(*id);
            }
        }
        for id in used {
            if let Some(known) = self.known.get_mut(id) {
                known.users.insert(set);
                self.idle.remove(id);
            }
        }
    }

    /// Forgets what nobody uses, and says what changed since the last time.
    pub(super) fn settle(&mut self) -> Changed {
        let gone = std::mem::take(&mut self.idle);
        let mut changed = Changed { new: std::mem::take(&mut self.new), ..Changed::default() };
        for id in gone {
            let Some(known) = self.known.remove(&id) else { continue };
            self.ids.remove(&known.element);
            // What came and went meanwhile was never seen.
            if !changed.new.remove(&id) {
                if matches!(&*known.element, Element::Block(_)) {
                    changed.blocks = Blocks::Others;
                }
                changed.gone.insert(id);
            }
        }
        if changed.new.iter().any(|id| matches!(self.get(*id), Some(Element::Block(_)))) {
            changed.blocks = Blocks::Others;
        }
        changed
    }

    pub(super) fn get(&self, id: ElementId) -> Option<&Element> {
        self.known.get(&id).map(|known| &*known.element)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ElementId, &Element)> {
        self.known.iter().map(|(id, known)| (*id, &*known.element))
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = (ElementId, &Block)> {
        self.iter().filter_map(|(id, element)| match element {
            Element::Block(block) => Some((id, block)),
            Element::Pods { .. } | Element::Named { .. } => None,
        })
    }

    /// The sets that use an element.
    pub(super) fn users(&self, id: ElementId) -> impl Iterator<Item = u32> {
        self.known.get(&id).into_iter().flat_map(|known| known.users.iter().copied())
    }

    /// The same for equal signatures, in this agent and the next.
    pub(super) fn fingerprint(&self, signature: &[(ElementId, Port)]) -> [u8; 16] {
        let mut elements: Vec<_> = signature.iter().map(|(id, port)| (self.get(*id), *port)).collect();
        elements.sort_unstable();
        fingerprint(&elements)
    }

    pub(super) fn text(&self, signature: &[(ElementId, Port)]) -> String {
        let texts = signature.iter().filter_map(|(id, port)| {
            let element = self.get(*id)?;
            Some(if *port == Port::ZERO { element.to_string() } else { format!("{element}={port}") })
        });
        texts.collect::<Vec<_>>().join("; ")
    }
}

impl Element {
    /// Whether pods that look so are meant, and with which ports.
    pub(super) fn ports_of(&self, look: &Look, labels: &Labels) -> Vec<Port> {
        match self {
            Self::Pods { scope, pods } => {
                let meant = scope.has(&look.namespace, labels) && pods.matches(&look.labels);
                if meant { vec![Port::ZERO] } else { Vec::new() }
            }
            Self::Named { name, proto } => {
                let ports = look.ports.iter().filter(|it| it.name == *name && it.proto == *proto);
                ports.map(|it| it.port).collect()
            }
            Self::Block(_) => Vec::new(),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods { scope: Scope::In(namespace), pods } => write!(f, "pods {pods} in {namespace}"),
            Self::Pods { scope: Scope::Matching(namespaces), pods } => {
                write!(f, "pods {pods} in namespaces {namespaces}")
            }
            Self::Block(Block { range, except }) if except.is_empty() => range.fmt(f),
            Self::Block(Block { range, except }) => {
                let except: Vec<_> = except.iter().map(Prefix::to_string).collect();
                write!(f, "{range} except {}", except.join(" "))
            }
            Self::Named { name, proto } => write!(f, "port {name}/{proto}"),
        }
    }
}
