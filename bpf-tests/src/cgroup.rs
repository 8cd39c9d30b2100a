//! The cgroup v2 subtrees that hold the processes of pods and agents.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::patience::stretched;

/// A subtree that is emptied and removed when dropped.
#[derive(Debug)]
pub struct Tree {
    path: PathBuf,
}

impl Tree {
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `name` (which may have several components) below the subtree.
    pub fn child(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("cgroup {} stays behind: {error:#}", self.path.display());
        }
    }
}

/// Where cgroup v2 is mounted: on hybrid hosts that is not `/sys/fs/cgroup`.
pub fn mount_point() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    Ok(parse_mount_point(&mounts))
}

/// Moves the calling process into the cgroup.
pub fn enter(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), "0")
}

/// Kills every process in the subtree, then removes its directories from the leaves up.
pub fn remove(path: &Path) -> Result<()> {
    let deadline = Instant::now() + stretched(Duration::from_secs(5));
    while path.exists() {
        kill_all(path);
        match remove_directories(path) {
            Ok(()) => break,
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("remove cgroup {}", path.display()));
            }
            // A killed process leaves its cgroup a moment later.
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
    Ok(())
}

/// Removes the subtrees named `<prefix><pid>-..` in `mount` whose process is gone.
pub fn sweep(mount: &Path, prefix: &str) -> Result<()> {
    for name in names(mount)? {
        if owner(&name, prefix).is_some_and(|pid| !is_alive(pid)) {
            remove(&mount.join(&name))?;
        }
    }
    Ok(())
}

/// The process id in `<prefix><pid>-..` or `<prefix><pid>`.
pub fn owner(name: &str, prefix: &str) -> Option<Pid> {
    let rest = name.strip_prefix(prefix)?;
    let digits = rest.split('-').next().unwrap_or(rest);
    digits.parse().ok().map(Pid::from_raw)
}

pub fn is_alive(pid: Pid) -> bool {
    !matches!(kill(pid, None), Err(Errno::ESRCH))
}

fn parse_mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (filesystem.split(' ').next()? == "cgroup2").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

fn kill_all(path: &Path) {
    // Kernel 5.14 and newer; it takes the subtree.
    if fs::write(path.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for child in directories(path) {
        kill_all(&child);
    }
    let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
        // It may be gone already, which is what is wanted.
        let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn remove_directories(path: &Path) -> io::Result<()> {
    for child in directories(path) {
        remove_directories(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|e| e.path())
        .collect()
}

fn names(path: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(path).with_context(|| format!("list {}", path.display()))?;
    let names: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    if names.is_empty() {
        bail!("{} is not a cgroup", path.display());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host_has_cgroup2_below_the_others() {
        let mounts = "31 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mount_point(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(parse_mount_point("31 24 0:26 / /sys/fs/cgroup rw - cgroup cgroup rw\n"), None);
    }

    #[test]
    fn the_owner_of_a_subtree_is_in_its_name() {
        assert_eq!(owner("ferroflow-test-412-3", "ferroflow-test-"), Some(Pid::from_raw(412)));
        assert_eq!(owner("ferroflow-test-412", "ferroflow-test-"), Some(Pid::from_raw(412)));
        assert_eq!(owner("system.slice", "ferroflow-test-"), None);
    }
}
