//! What can go wrong between the agent and an API server. Each is retried; none loses what is known.

use std::time::Duration;

/// Why a request gave less than it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// No connection, or one that broke before there was an answer.
    #[error("no answer: {}", root(.error))]
    Unreachable { error: kube::Error },
    #[error("it answers {status}{}", reason(.message))]
    Refused { status: u16, message: Box<str>, retry_after: Option<Duration> },
    #[error("nothing came for {waited:?}")]
    Silent { waited: Duration },
    /// A connection that broke in the middle of an answer.
    #[error("the answer broke off: {}", root(.error))]
    Cut { error: kube::Error },
    #[error("the answer makes no sense: {0}")]
    Garbage(#[from] Garbage),
    #[error("the credentials cannot be read: {0}")]
    Access(#[from] super::access::AccessError),
    /// Nothing went wrong yet: this host's addresses are others than when the connection was made.
    #[error("this node's addresses have changed")]
    Moved,
}

/// Bytes that no API server should send.
#[derive(Debug, thiserror::Error)]
pub(super) enum Garbage {
    #[error("no list, or not all of it: {error}")]
    NoList { error: serde_json::Error },
    #[error("no object: {error}")]
    NoObject { error: serde_json::Error },
    #[error("no watch event: {error}")]
    NoEvent { error: serde_json::Error },
    #[error("an event of type `{text}`, which does not exist")]
    NoSuchEvent { text: String },
    #[error("an object of more than {limit} bytes")]
    TooLong { limit: usize },
}

impl Fault {
    /// The server no longer knows what was asked for (410): everything is listed again.
    pub(super) fn is_expired(&self) -> bool {
        matches!(self, Self::Refused { status: 410, .. })
    }

    /// The server does not know the kind (404).
    pub(super) fn is_unknown(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// The credentials are no longer good (401): they are read again.
    pub(super) fn is_unauthorized(&self) -> bool {
        matches!(self, Self::Refused { status: 401, .. })
    }

    /// Another API server might do better.
    pub(super) fn is_of_the_server(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Cut { .. } | Self::Garbage(_) => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::Access(_) | Self::Moved => false,
        }
    }

    /// Asking the same again is likely to give the same.
    pub(super) fn is_about_the_version(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Garbage(_))
    }

    /// How long the server wants to be left alone.
    pub(super) fn retry_after(&self) -> Duration {
        match self {
            Self::Refused { retry_after, .. } => retry_after.unwrap_or_default(),
            Self::Unreachable { .. }
            | Self::Silent { .. }
            | Self::Cut { .. }
            | Self::Garbage(_)
            | Self::Access(_)
            | Self::Moved => Duration::ZERO,
        }
    }
}

/// The libraries' outer errors say little: `service error`, `client error (Connect)`.
fn root(error: &kube::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn reason(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}
