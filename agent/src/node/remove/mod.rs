//! `ferroflow cleanup --all`: finds what is ours on the machine, and takes it away.
//!
//! Found first, as data, so that a dry run shows exactly what would go. In this order, since a runtime that still calls
//! the plugin, or a program whose tables are gone, would be worse than either:
//!
//! 1. network configurations that name the plugin
//! 2. filters at our place on clsact qdiscs, and the qdiscs that are empty without them
//! 3. pinned links (tcx, XDP, cgroup), which the kernel then detaches
//! 4. the links of pods, with their routes
//! 5. pinned maps, the plugins' programs, the directories of the agent

mod kernel;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::links::{Link, LinksError};
use super::{LOOPBACK, PLUGIN, Places};
use crate::config::Bpffs;
use crate::lock::Lock;

pub use kernel::Filter;

/// One thing of ours. Displayed: what it is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thing {
    Configuration(PathBuf),
    Filter(Filter),
    /// A clsact qdisc that holds nothing but our filters.
    Qdisc(Link),
    Pin(PathBuf),
    Link(Link),
    File(PathBuf),
    Directory(PathBuf),
}

impl std::fmt::Display for Thing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Configuration(path) => write!(f, "network configuration {}", path.display()),
            Self::Filter(filter) => write!(f, "filter {} on {}", filter.program, filter.link.name),
            Self::Qdisc(link) => write!(f, "clsact qdisc of {}", link.name),
            Self::Pin(path) => write!(f, "pin {}", path.display()),
            Self::Link(link) => write!(f, "link {}", link.name),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Directory(path) => write!(f, "directory {}", path.display()),
        }
    }
}

/// What an agent that runs means for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// It stops the cleanup: it would put back what is removed.
    Refuse,
    Ignore,
}

/// Everything that is ours, in the order in which it goes.
///
/// # Errors
/// [`RemoveError::Running`]; what cannot be looked at.
pub fn find(bpffs: &Bpffs, places: &Places, running: Running) -> Result<Vec<Thing>, RemoveError> {
    if running == Running::Refuse && Lock::is_held(&bpffs.dir) {
        return Err(RemoveError::Running { path: bpffs.dir.clone() });
    }
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| RemoveError::Io { path, source }
    };
    let configurations = places.configurations().map_err(io(&places.conf_dir))?;
    let ours = configurations.into_iter().filter(|it| it.ours);
    let mut found: Vec<_> = ours.map(|it| Thing::Configuration(it.path)).collect();
    let kernel = kernel::find()?;
    found.extend(kernel.filters.into_iter().map(Thing::Filter));
    found.extend(kernel.qdiscs.into_iter().map(Thing::Qdisc));
    let (links, rest) = pins(&bpffs.dir, &bpffs.links()).map_err(io(&bpffs.dir))?;
    found.extend(links);
    found.extend(kernel.links.into_iter().map(Thing::Link));
    found.extend(rest);
    let loopback = places.bin_dir.join(LOOPBACK);
    if fs::read_link(&loopback).is_ok_and(|to| to == Path::new(PLUGIN)) {
        found.push(Thing::File(loopback));
    }
    let program = places.bin_dir.join(PLUGIN);
    if program.exists() {
        found.push(Thing::File(program));
    }
    let own = [&places.state_dir, &places.run_dir].into_iter().filter(|dir| holds_anything(dir));
    found.extend(own.cloned().map(Thing::Directory));
    Ok(found)
}

/// Takes it away; what is gone already is no error.
///
/// # Errors
/// What the kernel or a file system refuses.
pub fn remove(thing: &Thing) -> Result<(), RemoveError> {
    let failed = |path: &Path, source| RemoveError::Io { path: path.to_owned(), source };
    match thing {
        Thing::Configuration(path) | Thing::Pin(path) | Thing::File(path) => {
            gone(fs::remove_file(path)).map_err(|source| failed(path, source))
        }
        Thing::Filter(filter) => kernel::remove_filter(filter),
        Thing::Qdisc(link) => kernel::remove_qdisc(link),
        Thing::Link(link) => kernel::remove_link(link),
        Thing::Directory(path) => remove_directory(path).map_err(|source| failed(path, source)),
    }
}

/// In a container the directory is a mount, and only what is in it goes.
fn remove_directory(path: &Path) -> io::Result<()> {
    match gone(fs::remove_dir_all(path)) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(()),
        other => other,
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A directory that is mounted and empty cannot go, and need not.
fn holds_anything(dir: &Path) -> bool {
    let empty = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    dir.is_dir() && (!empty || !is_mount(dir))
}

fn is_mount(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    dir.parent().is_some_and(|parent| device(dir) != device(parent))
}

/// The pins of links, and all else under the directory; the directories last. Nothing on another file system, whatever
/// `--bpffs` names.
fn pins(dir: &Path, links: &Path) -> io::Result<(Vec<Thing>, Vec<Thing>)> {
    if !dir.exists() {
        return Ok((Vec::new(), Vec::new()));
    }
    if statfs(dir)?.filesystem_type() != BPF_FS_MAGIC {
        return Err(io::Error::other(
            "no BPF file system: nothing of ours is there; name the agent's --bpffs",
        ));
    }
    let mut found = Vec::new();
    walk(dir, &mut found)?;
    Ok(found.into_iter().partition(|thing| matches!(thing, Thing::Pin(path) if path.starts_with(links))))
}

fn walk(dir: &Path, found: &mut Vec<Thing>) -> io::Result<()> {
    let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        } else {
            found.push(Thing::Pin(entry.path()));
        }
    }
    found.push(Thing::Directory(dir.to_owned()));
    Ok(())
}

#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error(
        "an agent is running on {path} and would put everything back: end it first (helm uninstall), or use --force"
    )]
    Running { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Netlink(#[from] LinksError),
    #[error("filter {program} on {link}: {source}")]
    Filter { program: String, link: String, source: Box<aya::programs::ProgramError> },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pins_on_a_bpf_file_system_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "").unwrap();
        assert!(pins(dir.path(), &dir.path().join("links")).is_err());
        assert_eq!(pins(&dir.path().join("nothing"), dir.path()).unwrap(), (Vec::new(), Vec::new()));
    }
}
