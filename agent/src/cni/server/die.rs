//! Deaths on demand: a test names the step at which the agent is to die as by `kill -9`. A release has none of it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Names a step of [`Step`], in builds with debug assertions.
const VARIABLE: &str = "FERROFLOW_DIE_AT";

/// Behind which step of ADD or DEL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Requested,
    Leased,
    Wired,
    Served,
    Detached,
    Released,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Leased => "leased",
            Self::Wired => "wired",
            Self::Served => "served",
            Self::Detached => "detached",
            Self::Released => "released",
        }
    }
}

pub(super) fn behind(step: Step) {
    if cfg!(debug_assertions) && std::env::var_os(VARIABLE).is_some_and(|name| name == step.name()) {
        // It does not return.
        let _died = kill(Pid::this(), Signal::SIGKILL);
    }
}
