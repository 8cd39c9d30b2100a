//! Pinned maps that the object has otherwise: other sizes were asked for, or another version lays them out otherwise.
//!
//! ```text
//!   maps/backends            as it is, used by the programs that are attached
//!   next/backends            as the object has it: made, filled, then renamed over the other
//! ```
//!
//! The programs that are attached go on with the old map, which is the kernel's as long as they are; what they note of
//! connections until they are swapped is copied once more when they were. A crash before a renaming changes nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::{MapData, MapError};

use super::DatapathError;
use crate::config::Bpffs;
use crate::maps::transfer::{self, Existing};

/// Maps that are made anew.
#[derive(Debug, Default)]
pub(super) struct Moving {
    maps: PathBuf,
    /// Names of pins have no dots: the kernel reserves them.
    next: PathBuf,
    names: BTreeSet<String>,
}

/// A map that was replaced while programs still used it.
#[derive(Debug)]
pub(super) struct Former {
    name: String,
    old: MapData,
    new: MapData,
}

impl Moving {
    /// None yet. What an agent left that was killed meanwhile is removed.
    pub(super) fn new(bpffs: &Bpffs) -> Result<Self, DatapathError> {
        let moving = Self { maps: bpffs.maps(), next: bpffs.dir.join("next"), names: BTreeSet::new() };
        moving.leave()?;
        Ok(moving)
    }

    /// Where the loader is to make or find the maps that are not at their own names.
    pub(super) fn pins(&self) -> impl Iterator<Item = (&str, PathBuf)> {
        self.names.iter().map(|name| (name.as_str(), self.next.join(name)))
    }

    /// Notes which map is in the way; whether it is one that was not known to be.
    pub(super) fn note(&mut self, error: &EbpfError) -> bool {
        let EbpfError::MapError(MapError::IncompatiblePinnedMap { name, property, expected, actual }) = error
        else {
            return false;
        };
        tracing::info!(map = %name, property, from = actual, to = expected, "a map is made anew");
        // Where the directory cannot be made, the loader says that it cannot pin.
        let _exists = fs::create_dir(&self.next);
        self.names.insert(name.clone())
    }

    /// Fills the new maps and puts them in the place of the old ones; those are needed until no program uses them.
    pub(super) fn switch(self) -> Result<Vec<Former>, DatapathError> {
        let filled = self.names.iter().map(|name| self.fill(name)).collect::<Result<Vec<_>, _>>();
        if filled.is_ok() {
            for name in &self.names {
                let path = self.next.join(name);
                fs::rename(&path, self.maps.join(name))
                    .map_err(|source| DatapathError::Io { path, source })?;
            }
        }
        self.leave()?;
        filled
    }

    fn fill(&self, name: &str) -> Result<Former, DatapathError> {
        let (old, new) = (MapData::from_pin(self.maps.join(name))?, MapData::from_pin(self.next.join(name))?);
        let rows = transfer::copy(&old, &new, Existing::Replaced)
            .map_err(|source| DatapathError::Move { map: name.to_owned(), source })?;
        tracing::info!(map = %name, rows, "moved to the new map");
        Ok(Former { name: name.to_owned(), old, new })
    }

    /// Removes the directory of what is being made, with what is in it.
    fn leave(&self) -> Result<(), DatapathError> {
        match fs::remove_dir_all(&self.next) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(DatapathError::Io { path: self.next.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

impl Former {
    /// What programs have added since.
    pub(super) fn follow(&self) -> Result<(), DatapathError> {
        let copied = transfer::copy(&self.old, &self.new, Existing::Kept);
        copied.map(drop).map_err(|source| DatapathError::Move { map: self.name.clone(), source })
    }
}
