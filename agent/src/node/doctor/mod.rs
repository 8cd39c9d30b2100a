//! `ferroflow doctor`: what the agent needs of the machine, and what stands in its way, each with the way out in words.
//!
//! It looks and changes nothing, needs no agent, and answers for the namespaces that it runs in: the host's, or a
//! container's of the host's network.

mod host;
mod kernel;
mod network;

use std::path::PathBuf;

use serde::Serialize;

use super::Places;
use crate::config::Bpffs;

/// What it is to look at.
#[derive(Clone, Debug)]
pub struct Subject {
    pub bpffs: Bpffs,
    /// Where the root of cgroup2 is; found where it is not named.
    pub cgroup: Option<PathBuf>,
    pub places: Places,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Grade {
    Ok,
    /// It works, but not for everybody or not as fast.
    Warn,
    /// The agent cannot serve.
    Fail,
}

impl Grade {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do about it; nothing where it is OK.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, grade: Grade::Ok, found: found.into(), fix: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, grade: Grade::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, grade: Grade::Fail, found: found.into(), fix: Some(fix.into()) }
    }
}

/// All checks, in the order in which an agent would stumble over them.
pub fn examine(subject: &Subject) -> Vec<Finding> {
    let mut findings = kernel::findings(subject);
    findings.extend(network::findings());
    findings.extend(host::findings(subject));
    findings
}
