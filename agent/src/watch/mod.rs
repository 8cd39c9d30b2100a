//! Where the objects come from: sources that turn Kubernetes objects into [`Change`]s.
//!
//! Two sources share one converter: [`mod@file`], a directory of ordinary Kubernetes YAML, and [`mod@kube`], the
//! Kubernetes API.

pub mod cluster_policy;
pub mod convert;
mod directory;
mod document;
mod exposure;
mod fault;
pub mod file;
pub mod kube;
mod list;
pub mod policy;
mod weights;

use std::collections::BTreeSet;
use std::fmt;
use std::time::SystemTime;

use tokio::sync::mpsc::Sender;

use crate::model::{Change, Kind, Name, ObjectId, Withheld};

pub use fault::{Fault, Invalid};

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Change(Change),
    /// When the endpoints of a Service changed in the cluster, which led to the change that was sent just before
    /// (rule 42).
    Triggered {
        service: Name,
        at: SystemTime,
    },
    /// Everything that the source at present refuses; replaces what it said before. What an object was before it
    /// became bad stays in force.
    Problems(Box<[Problem]>),
    /// Every object that exists has been sent, bad ones apart. Sent once.
    Synced,
    /// Whether the source can be asked; sent when it changes. What it said stays in force.
    Contact(Contact),
}

/// Whether a source can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contact {
    Lost,
    Regained,
}

/// Something that is not served, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `web.yaml, document 2 (line 14), Service default/web`.
    pub place: Box<str>,
    pub message: Box<str>,
    /// Which object it is; `None` where it may be any.
    pub object: Option<ObjectId>,
    /// The Service that the object is, or of which it is a part; `None` also where nothing of it is missing.
    pub service: Option<Name>,
}

/// What the problems keep from being known.
pub fn withheld(problems: &[Problem]) -> Withheld {
    let (mut services, mut pods, mut nodes) = (BTreeSet::new(), BTreeSet::new(), false);
    for problem in problems {
        match &problem.object {
            None => return Withheld::Any,
            Some(ObjectId { kind: Kind::Pod, name }) => {
                pods.insert(name.clone());
            }
            Some(ObjectId { kind: Kind::Node, .. }) => nodes = true,
            Some(_) => services.extend(problem.service.clone()),
        }
    }
    Withheld::Some { services, pods, nodes }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// What goes with a change whose object says when it came about (rule 42): only slices that are there do.
fn triggered(change: &Change, at: Option<SystemTime>) -> Option<Event> {
    let Change::EndpointSlice(name, Some(slice)) = change else { return None };
    let service = Name::new(name.namespace.clone(), slice.service.clone());
    Some(Event::Triggered { service, at: at? })
}

pub trait Source {
    /// Sends what there is and then what changes, until the receiver is closed. What goes wrong is retried here and
    /// reported as [`Event::Problems`]: a receiver could do nothing about it.
    fn run(self, events: Sender<Event>) -> impl Future<Output = ()> + Send;
}
