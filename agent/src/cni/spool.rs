//! Removals that could not be told to the agent: one file each, which it takes as soon as it runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::protocol::Removal;
use crate::durable;
use crate::net::pod;

/// Leaves a removal for the agent; the same one twice is one.
///
/// # Errors
/// Where it cannot be written.
pub(super) fn put(state_dir: &Path, removal: &Removal) -> io::Result<()> {
    let dir = dir(state_dir);
    fs::create_dir_all(&dir)?;
    durable::write(&path(&dir, removal), &serde_json::to_vec(removal)?)
}

/// Whether a removal waits.
pub(super) fn has(state_dir: &Path, removal: &Removal) -> bool {
    path(&dir(state_dir), removal).exists()
}

/// What waits. A file that is no removal is left where it is and reported.
///
/// # Errors
/// Where the directory cannot be read; there need not be one.
pub(super) fn list(state_dir: &Path) -> io::Result<Vec<Removal>> {
    let entries = match fs::read_dir(dir(state_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        match fs::read(&path).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(removal)) => found.push(removal),
            Ok(Err(error)) => tracing::warn!("{}: no removal: {error}; remove the file", path.display()),
            // Another taker was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Forgets a removal that has been done.
///
/// # Errors
/// Where the file cannot be removed.
pub(super) fn done(state_dir: &Path, removal: &Removal) -> io::Result<()> {
    durable::remove(&path(&dir(state_dir), removal))
}

fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("spool")
}

fn path(dir: &Path, removal: &Removal) -> PathBuf {
    dir.join(format!("{}.json", pod::host_interface(&removal.owner)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipam::Owner;

    #[test]
    fn what_is_left_is_found_until_it_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let removal = |id: &str| Removal { owner: Owner { container_id: id.into(), ifname: "eth0".into() } };
        assert_eq!(list(dir.path()).unwrap(), []);
        for id in ["a", "b", "a"] {
            put(dir.path(), &removal(id)).unwrap();
        }
        fs::write(dir.path().join("spool/bad.json"), "{").unwrap();
        let mut found = list(dir.path()).unwrap();
        found.sort_by(|a, b| a.owner.cmp(&b.owner));
        assert_eq!(found, [removal("a"), removal("b")]);
        done(dir.path(), &removal("a")).unwrap();
        done(dir.path(), &removal("a")).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [removal("b")]);
    }
}
