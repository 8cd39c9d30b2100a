//! What is done wrong on purpose.

use std::time::Duration;

/// What happens to one request instead of, or on top of, its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A refusal, with `Retry-After` in seconds.
    Status(u16, Option<u32>),
    /// The watch begins and says that its version is too old.
    ExpiredEvent,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The body comes in small pieces with this pause between them.
    Slow(Duration),
    /// After so many bytes of the body comes what is no JSON, and the body ends.
    Garbage(usize),
    /// The request is taken and never answered.
    Hang,
    /// The head of the answer comes, its body never does.
    HangInBody,
}

/// Which requests a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    List,
    Watch,
    /// `POST`, `PATCH`.
    Write,
}

/// A fault that waits for its requests.
#[derive(Clone, Debug)]
pub(super) struct Armed {
    pub(super) verb: Verb,
    /// End of the path, `pods`; any where it is empty.
    pub(super) path: String,
    pub(super) fault: Fault,
    /// How many requests are still to get it.
    pub(super) left: usize,
}
