//! What users find under `kubectl describe`: notes on objects, with reason and message.
//!
//! ```text
//!   reconcile's failures, bad fields, health ──Note──▶ Recorder ──queue──▶ watch::kube::events ──▶ events.k8s.io/v1
//! ```
//!
//! Whoever notes something also logs it; without an API there is nobody to post to, and the log is all there is. Noting
//! never waits: what does not fit the queue is dropped, since an event is a courtesy and the datapath is not.

pub mod series;

use tokio::sync::mpsc::{self, Receiver, Sender};

use crate::model::{Name, ObjectId};

/// How many notes may wait to be posted.
const QUEUE: usize = 256;

/// Something that a user should know of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    pub object: ObjectId,
    pub reason: Reason,
    pub message: Box<str>,
}

/// Why; as users filter for it. Each is a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A field makes no sense; the object is served as it was before.
    InvalidObject,
    /// Another Service has the address and port, and goes first.
    ServiceConflict,
    /// The tables do not take it: they are full, or the kernel refuses.
    NotProgrammed,
    /// The tables have no room for a policy: nothing passes the pods that it selects.
    PolicyOverflow,
    /// kube-proxy's: the port for load balancers' checks is taken.
    FailedToStartServiceHealthcheck,
    /// Something of the datapath was removed on this node, and is there again.
    DatapathRepaired,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidObject => "InvalidObject",
            Self::ServiceConflict => "ServiceConflict",
            Self::NotProgrammed => "NotProgrammed",
            Self::PolicyOverflow => "PolicyOverflow",
            Self::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
            Self::DatapathRepaired => "DatapathRepaired",
        }
    }

    /// What was being done.
    pub fn action(self) -> &'static str {
        match self {
            Self::InvalidObject => "Reading",
            Self::ServiceConflict | Self::NotProgrammed | Self::PolicyOverflow => "Programming",
            Self::FailedToStartServiceHealthcheck => "Listening",
            Self::DatapathRepaired => "Repairing",
        }
    }
}

/// Takes notes from anywhere.
#[derive(Clone, Debug)]
pub struct Recorder {
    notes: Sender<Note>,
}

impl Recorder {
    /// And where the notes come out.
    pub fn new() -> (Self, Receiver<Note>) {
        let (notes, receiver) = mpsc::channel(QUEUE);
        (Self { notes }, receiver)
    }

    pub fn note(&self, note: Note) {
        if let Err(error) = self.notes.try_send(note) {
            tracing::debug!("an event is not posted: {error}");
        }
    }

    pub fn note_service(&self, service: &Name, reason: Reason, message: impl Into<Box<str>>) {
        let object = ObjectId { kind: crate::model::Kind::Service, name: service.clone() };
        self.note(Note { object, reason, message: message.into() });
    }

    /// Of a node: its events are in the namespace `default`.
    pub fn note_node(&self, node: &str, reason: Reason, message: impl Into<Box<str>>) {
        let object = ObjectId { kind: crate::model::Kind::Node, name: Name::new("default", node) };
        self.note(Note { object, reason, message: message.into() });
    }
}
