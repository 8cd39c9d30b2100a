//! What the agent tells the process that answers health checks: one file, replaced as a whole.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ferroflow_common::addr::Port;
use serde::{Deserialize, Serialize};

use super::{Check, Verdict};
use crate::model::Name;

/// Seconds without a word of the agent after which this node no longer counts as healthy: what is known of endpoints is
/// too old to send them new connections.
pub const STALE: u32 = 60;

/// The state of the health checks of services. There is no file where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The process that is to answer; 0 before there is one.
    pub pid: u32,
    /// Which build of the binary that is.
    pub build: String,
    /// Seconds of `CLOCK_MONOTONIC` when it was written.
    pub stamp: u32,
    pub healthy: bool,
    pub(super) checks: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    port: u16,
    namespace: Box<str>,
    name: Box<str>,
    ipv4: usize,
    ipv6: usize,
}

impl Told {
    pub fn set_checks(&mut self, checks: &BTreeMap<Port, Check>) {
        let row = |(port, check): (&Port, &Check)| Row {
            port: port.host(),
            namespace: (*check.service.namespace).into(),
            name: (*check.service.name).into(),
            ipv4: check.ipv4,
            ipv6: check.ipv6,
        };
        self.checks = checks.iter().map(row).collect();
    }

    pub fn checks(&self) -> BTreeMap<Port, Check> {
        let check = |row: &Row| {
            let service = Name::new(row.namespace.clone(), row.name.clone());
            (Port::new(row.port), Check { service, ipv4: row.ipv4, ipv6: row.ipv6 })
        };
        self.checks.iter().map(check).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.checks.is_empty()
    }

    /// Whether the node is healthy as far as this can tell at `now`.
    pub fn verdict(&self, now: u32) -> Verdict {
        Verdict::from(self.healthy && now.saturating_sub(self.stamp) <= STALE)
    }

    /// `None` where there is no file.
    ///
    /// # Errors
    /// Where it cannot be read, or is none of ours.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// Where it cannot be written; the file is then what it was.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        replace(path, &serde_json::to_vec(self)?)
    }
}

/// Ports that cannot be answered and why, in a file beside: the process has no other way to say it to an agent that did
/// not start it.
pub fn problems_path(path: &Path) -> PathBuf {
    path.with_extension("problems")
}

/// Writes a file so that readers see the old or the new one.
///
/// # Errors
/// Where it cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = fs::File::create(&draft)?;
    file.write_all(bytes)?;
    fs::rename(draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_40_what_was_told_is_read_back_and_grows_stale() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("health.json");
        assert_eq!(Told::read(&path).unwrap(), None);
        let service = Name::new("shop", "web");
        let checks = BTreeMap::from([(Port::new(31_000), Check { service, ipv4: 2, ipv6: 1 })]);
        let mut told = Told { pid: 7, build: "x".into(), stamp: 1_000, healthy: true, ..Told::default() };
        told.set_checks(&checks);
        told.write(&path).unwrap();
        let read = Told::read(&path).unwrap().unwrap();
        assert_eq!((&read, read.checks()), (&told, checks));
        assert_eq!(read.verdict(1_000 + STALE), Verdict::Healthy);
        assert_eq!(read.verdict(1_001 + STALE), Verdict::Unhealthy);
        assert_eq!(Told { healthy: false, ..read }.verdict(1_000), Verdict::Unhealthy);
        fs::write(&path, "{").unwrap();
        assert!(Told::read(&path).is_err());
    }
}
