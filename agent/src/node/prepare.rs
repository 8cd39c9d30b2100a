//! `ferroflow prepare`: what a node must have before its first agent, done by the chart's init container.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use clap::Args;

use super::{LOOPBACK, PLUGIN};
use crate::config::Bpffs;
use crate::datapath::{self, DatapathError};

#[derive(Args, Clone, Debug)]
pub struct Prepare {
    #[command(flatten)]
    pub bpffs: Bpffs,

    /// Put the network plugin into this directory, where the container runtime looks for it
    #[arg(long = "cni-bin-dir", env = "FERROFLOW_CNI_BIN_DIR", value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// Mounts the BPF file system where there is none, and installs this binary as the network plugin. Again changes nothing.
///
/// # Errors
/// What the kernel or a file system refuses, with the path.
pub fn run(asked: &Prepare) -> Result<Vec<String>, PrepareError> {
    datapath::prepare(&asked.bpffs)?;
    let mut done = vec![format!("{} is on a BPF file system", asked.bpffs.dir.display())];
    if let Some(dir) = &asked.bin_dir {
        let own = std::env::current_exe().and_then(fs::read).map_err(PrepareError::Own)?;
        let failed = |source| PrepareError::Io { path: dir.clone(), source };
        done.push(install(&own, dir).map_err(failed)?);
        done.push(install_loopback(dir).map_err(failed)?);
    }
    Ok(done)
}

/// A runtime that starts the plugin meanwhile gets the old one or the new one, whole.
fn install(binary: &[u8], dir: &Path) -> io::Result<String> {
    let path = dir.join(PLUGIN);
    if fs::read(&path).is_ok_and(|there| there == binary) {
        return Ok(format!("{} is this version", path.display()));
    }
    fs::create_dir_all(dir)?;
    let fresh = dir.join(format!(".{PLUGIN}.{}", std::process::id()));
    let written = fs::write(&fresh, binary)
        .and_then(|()| fs::set_permissions(&fresh, Permissions::from_mode(0o755)))
        .and_then(|()| File::open(&fresh)?.sync_all())
        .and_then(|()| fs::rename(&fresh, &path));
    if let Err(error) = written {
        // What is half written is nobody's.
        let _gone = fs::remove_file(&fresh);
        return Err(error);
    }
    Ok(format!("installed {}", path.display()))
}

/// containerd has the plugin of this name set up every pod's loopback interface. One that is there is somebody's.
fn install_loopback(dir: &Path) -> io::Result<String> {
    let path = dir.join(LOOPBACK);
    match symlink(PLUGIN, &path) {
        Ok(()) => Ok(format!("installed {}: there was none", path.display())),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(format!("{} is there", path.display()))
        }
        Err(error) => Err(error),
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error("cannot read this program's own file: {0}")]
    Own(io::Error),
    #[error("cannot install the network plugin in {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_is_replaced_whole_and_only_where_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bin").join(PLUGIN);
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        install(b"one", &dir.path().join("bin")).unwrap();
        let first = inode();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
        install(b"one", &dir.path().join("bin")).unwrap();
        assert_eq!(inode(), first);
        // The old one may be running: its file is left as it is, under no name.
        let running = File::open(&path).unwrap();
        install(b"two", &dir.path().join("bin")).unwrap();
        assert_eq!(io::read_to_string(running).unwrap(), "one");
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path().join("bin")).unwrap().count(), 1);
    }

    #[test]
    fn the_loopback_plugin_is_ours_only_where_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOOPBACK);
        for _again in 0..2 {
            install_loopback(dir.path()).unwrap();
            assert_eq!(fs::read_link(&path).unwrap(), Path::new(PLUGIN));
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"the distribution's").unwrap();
        install_loopback(dir.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"the distribution's");
    }
}
