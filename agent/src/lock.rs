//! One agent per directory of pinned maps.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The right to write under a directory, held as long as the value lives; the kernel takes it back when the process
/// dies, however it dies.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

impl Lock {
    /// Takes it, on a directory that exists.
    ///
    /// # Errors
    /// [`LockError::Held`] while another agent has it.
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: dir.to_owned(), source };
        let file = File::open(dir).map_err(io)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_file, Errno::EWOULDBLOCK)) => Err(LockError::Held { path: dir.to_owned() }),
            Err((_file, errno)) => Err(io(errno.into())),
        }
    }

    /// Whether an agent holds the directory at present.
    pub fn is_held(dir: &Path) -> bool {
        File::open(dir).is_ok_and(|file| {
            matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_file, Errno::EWOULDBLOCK)))
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(
        "another agent is running on {path}: give each agent directories of its own (--bpffs, --state-dir)"
    )]
    Held { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Lock::is_held(dir.path()));
        let lock = Lock::acquire(dir.path()).unwrap();
        assert!(Lock::is_held(dir.path()));
        assert!(matches!(Lock::acquire(dir.path()), Err(LockError::Held { .. })));
        drop(lock);
        assert!(!Lock::is_held(dir.path()));
    }
}
