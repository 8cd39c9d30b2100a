//! What a process of tests takes from the host, so that nothing of it stays behind.
//!
//! Mounts live in a private mount namespace and network namespaces have no name: both vanish with the process,
//! even after `kill -9`. Only cgroups and one empty directory outlive that; the next run sweeps them.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::Pid,
};

use crate::cgroup;

/// Prefix of every name left where others can see it, before the process id.
pub const PREFIX: &str = "ferroflow-test-";

/// Private mounts of this process. Dropping it removes what is left of every cluster.
#[derive(Debug)]
pub struct Sandbox {
    dir: PathBuf,
    cgroups: PathBuf,
}

/// The places of one cluster.
#[derive(Debug)]
pub struct Place {
    /// Ordinary files: manifests, logs.
    pub dir: PathBuf,
    /// On a bpffs.
    pub bpffs: PathBuf,
    pub cgroup: PathBuf,
}

impl Sandbox {
    /// Enters a private mount namespace. Call it before the process has a second thread: only threads made later
    /// share it.
    pub fn enter() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;

        sweep_directories();
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}", process::id()));
        fs::create_dir_all(dir.as_path()).with_context(|| format!("create {}", dir.display()))?;
        mount_new("tmpfs", &dir)?;
        let bpffs = dir.join("bpffs");
        fs::create_dir(&bpffs).context("create the directory of the bpffs")?;
        mount_new("bpf", &bpffs)?;

        let cgroups = match cgroup::mount_point()? {
            Some(mounted) => mounted,
            None => {
                let mounted = dir.join("cgroup");
                fs::create_dir(&mounted).context("create the directory of the cgroups")?;
                mount_new("cgroup2", &mounted)?;
                mounted
            }
        };
        cgroup::sweep(&cgroups, PREFIX)?;
        // A process of the same id may have been killed before us.
        remove_cgroups_of(&cgroups, Pid::this());
        Ok(Self { dir, cgroups })
    }

    /// Room for one more cluster.
    pub fn place(&self) -> Result<Place> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        let place = Place {
            dir: self.dir.join(&number),
            bpffs: self.dir.join("bpffs").join(&number),
            cgroup: self.cgroups.join(format!("{PREFIX}{}-{number}", process::id())),
        };
        for dir in [&place.dir, &place.bpffs] {
            fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(place)
    }

    /// On SIGINT, SIGTERM and SIGHUP: kill what runs in the cgroups, remove them, exit with 130.
    pub fn exit_on_signals(&self) -> Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let (dir, cgroups) = (self.dir.clone(), self.cgroups.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Registered before this returns, so no signal can come too early.
        let (mut interrupt, mut terminate, mut hangup) = runtime.block_on(async {
            anyhow::Ok((
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ))
        })?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
            });
            eprintln!("interrupted: cleaning up");
            clean(&dir, &cgroups);
            process::exit(130);
        })?;
        Ok(())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        clean(&self.dir, &self.cgroups);
    }
}

fn clean(dir: &Path, cgroups: &Path) {
    remove_cgroups_of(cgroups, Pid::this());
    for mounted in [dir.join("bpffs"), dir.join("cgroup"), dir.to_path_buf()] {
        // What is busy goes with the mount namespace.
        let _busy = umount2(&mounted, MntFlags::MNT_DETACH);
    }
    // Not empty if the unmounting failed; the next run sweeps it.
    let _left = fs::remove_dir(dir);
}

fn remove_cgroups_of(cgroups: &Path, pid: Pid) {
    for entry in fs::read_dir(cgroups).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().and_then(|name| cgroup::owner(name, PREFIX)) == Some(pid)
            && let Err(error) = cgroup::remove(&entry.path())
        {
            eprintln!("{error:#}");
        }
    }
}

/// Seen from outside a mount namespace the directories of dead processes are empty.
fn sweep_directories() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| cgroup::owner(name, PREFIX));
        if owner.is_some_and(|pid| !cgroup::is_alive(pid)) {
            let _other = fs::remove_dir(entry.path());
        }
    }
}

fn mount_new(kind: &str, target: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(kind), target, Some(kind), MsFlags::empty(), none)
        .with_context(|| format!("mount {kind} on {}", target.display()))
}
