//! The pool on disk: what was promised outlives the agent and the machine.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use super::pool::{Pool, Record};
use crate::durable;

/// The one owner of the lease file. Changes are made in memory and are promises once [`Ledger::change`] returned;
/// changes that come together share one write.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    latest: Mutex<Versioned>,
    /// The version that is on disk; held while the next one is written.
    written: tokio::sync::Mutex<u64>,
}

#[derive(Debug, Default)]
struct Versioned {
    pool: Pool,
    version: u64,
}

const FILE: &str = "leases.json";

impl Ledger {
    /// Reads the lease file of a directory; there need not be one.
    ///
    /// # Errors
    /// [`LedgerError`]; nothing is taken for free then.
    pub fn open(dir: &Path) -> Result<Self, LedgerError> {
        let path = dir.join(FILE);
        let pool = match fs::read(&path) {
            Ok(text) => parse(&path, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Pool::default(),
            Err(source) => return Err(LedgerError::Io { path, source }),
        };
        let latest = Mutex::new(Versioned { pool, version: 0 });
        Ok(Self { path, latest, written: tokio::sync::Mutex::new(0) })
    }

    /// Changes the pool; on disk when this returns. After an error of the disk the change holds in memory only: undo
    /// it where it promised something.
    ///
    /// # Errors
    /// [`LedgerError::Io`].
    pub async fn change<T>(&self, change: impl FnOnce(&mut Pool) -> T) -> Result<T, LedgerError> {
        let (done, version) = {
            let mut latest = self.latest();
            let done = change(&mut latest.pool);
            latest.version += 1;
            (done, latest.version)
        };
        let mut written = self.written.lock().await;
        if *written < version {
            let (record, newest) = {
                let latest = self.latest();
                (latest.pool.record(), latest.version)
            };
            let path = self.path.clone();
            let writing = tokio::task::spawn_blocking(move || write(&path, &record));
            match writing.await {
                Ok(result) => result?,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
            *written = newest;
        }
        Ok(done)
    }

    pub fn look<T>(&self, look: impl FnOnce(&Pool) -> T) -> T {
        look(&self.latest().pool)
    }

    /// A panic elsewhere leaves the pool as it was between two changes.
    fn latest(&self) -> MutexGuard<'_, Versioned> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<Pool, LedgerError> {
    let record: Record = serde_json::from_slice(text)
        .map_err(|source| LedgerError::Unreadable { path: path.to_owned(), source })?;
    Pool::restore(record).map_err(|addr| LedgerError::Twice { path: path.to_owned(), addr: addr.to_string() })
}

fn write(path: &Path, record: &Record) -> Result<(), LedgerError> {
    let failed = |source| LedgerError::Io { path: path.to_owned(), source };
    let text = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
    durable::write(path, &text).map_err(failed)
}

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path}: {source}: let --state-dir be a directory that can be written and outlives the machine, and start the agent again"
    )]
    NoDirectory { path: PathBuf, source: io::Error },
    #[error(
        "{path} is no list of leases: {source}; restore it, or remove it: addresses that pods of this node have are left to them"
    )]
    Unreadable { path: PathBuf, source: serde_json::Error },
    #[error(
        "{path} gives {addr} to two containers; restore it, or remove it: addresses that pods of this node have are left to them"
    )]
    Twice { path: PathBuf, addr: String },
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use ferroflow_common::addr::Addr;

    use super::*;
    use crate::ipam::{Owner, Space};
    use crate::model::Prefix;

    fn owner(number: u32) -> Owner {
        Owner { container_id: format!("c{number}").into(), ifname: "eth0".into() }
    }

    async fn allocate(ledger: &Ledger, number: u32) {
        let ranges = [Prefix::new(Addr::v4([10, 0, 0, 0]), 24).unwrap()];
        let space = Space { ranges: &ranges, reserved: &BTreeSet::new() };
        ledger.change(|pool| pool.allocate(&owner(number), "n", space)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_was_promised_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Arc::new(Ledger::open(dir.path()).unwrap());
        let many: Vec<_> = (0..50)
            .map(|number| {
                let ledger = ledger.clone();
                tokio::spawn(async move { allocate(&ledger, number).await })
            })
            .collect();
        for one in many {
            one.await.unwrap();
        }
        ledger.change(|pool| pool.release(&owner(7))).await.unwrap();
        let again = Ledger::open(dir.path()).unwrap();
        assert_eq!(again.look(Clone::clone), ledger.look(Clone::clone));
        assert_eq!(again.look(|pool| pool.leases().count()), 49);
    }

    #[tokio::test]
    async fn a_disk_that_refuses_is_an_error_and_keeps_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        fs::create_dir(&gone).unwrap();
        let ledger = Ledger::open(&gone).unwrap();
        fs::remove_dir(&gone).unwrap();
        let refused = ledger.change(|pool| pool.release(&owner(1))).await;
        assert!(matches!(refused, Err(LedgerError::Io { .. })));
    }

    #[test]
    fn a_file_that_is_no_ledger_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let held = r#"{"containerID":"a","ifname":"eth0","network":"n","addresses":["10.0.0.2"]}"#;
        let other = held.replace("\"a\"", "\"b\"");
        for (text, word) in [
            ("{".to_owned(), "is no list of leases"),
            (String::new(), "is no list of leases"),
            (
                format!(r#"{{"leases":[{held},{other}],"resting":[],"cursors":{{}}}}"#),
                "gives 10.0.0.2 to two",
            ),
        ] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let error = Ledger::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("leases.json"), "{error}");
        }
    }
}
