//! What the kinds say together.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::mpsc::Sender;

use super::super::{Contact, Event, Problem};
use crate::model::Kind;

/// Joins what each kind reports into one word of the source.
#[derive(Debug)]
pub(super) struct Voice {
    events: Sender<Event>,
    /// Kinds that have not been listed yet.
    awaited: BTreeSet<Kind>,
    problems: BTreeMap<Kind, Box<[Problem]>>,
    /// Kinds that get no answers.
    lost: BTreeSet<Kind>,
}

impl Voice {
    pub(super) fn new(events: Sender<Event>, kinds: impl Iterator<Item = Kind>) -> Self {
        Self { events, awaited: kinds.collect(), problems: BTreeMap::new(), lost: BTreeSet::new() }
    }

    pub(super) async fn problems(&mut self, kind: Kind, problems: Box<[Problem]>) {
        self.problems.insert(kind, problems);
        self.say(Event::Problems(self.problems.values().flatten().cloned().collect())).await;
    }

    pub(super) async fn listed(&mut self, kind: Kind) {
        if self.awaited.remove(&kind) && self.awaited.is_empty() {
            self.say(Event::Synced).await;
        }
    }

    pub(super) async fn lost(&mut self, kind: Kind, why: &str) {
        if self.lost.insert(kind) {
            tracing::warn!("the Kubernetes API gives no {kind:?} objects: {why}; trying again");
            if self.lost.len() == 1 {
                self.say(Event::Contact(Contact::Lost)).await;
            }
        }
    }

    pub(super) async fn reached(&mut self, kind: Kind) {
        if self.lost.remove(&kind) {
            tracing::info!("the Kubernetes API gives {kind:?} objects again");
            if self.lost.is_empty() {
                self.say(Event::Contact(Contact::Regained)).await;
            }
        }
    }

    async fn say(&self, event: Event) {
        // A receiver that is gone ends the source.
        let _closed = self.events.send(event).await;
    }
}
