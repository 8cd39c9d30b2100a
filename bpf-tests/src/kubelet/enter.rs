//! The part that runs in the container's namespaces, before the container's own program.

use std::{
    fs,
    fs::File,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, fchdir, pivot_root},
};

use super::{Mount, NO_SOURCE, Propagation, Spec};

/// Read-only in a container that is not privileged, as the OCI runtimes have it.
const READ_ONLY: [&str; 5] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];
const DEVICES: [&str; 4] = ["null", "zero", "random", "urandom"];

/// Does not return where it succeeds.
pub(crate) fn enter(path: &Path) -> Result<()> {
    let spec: Spec = serde_json::from_slice(&fs::read(path)?)?;
    // What a container mounts for the host has to get there; otherwise nothing of it does.
    let gives = spec.mounts.iter().any(|mount| mount.propagation == Propagation::Bidirectional);
    if !gives {
        change("/".as_ref(), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    }
    bind(&spec.root, &spec.root)?;
    system(&spec)?;
    spec.mounts.iter().try_for_each(|mount| volume(&spec.root, mount))?;
    let before = File::open("/")?;
    chdir(&spec.root).context("enter the image")?;
    pivot_root(".", ".").context("make the image the root")?;
    // It lies on the new one; what happens to its mounts must not happen to the host's.
    fchdir(&before).context("enter the host's root")?;
    change(".".as_ref(), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    umount2(".", MntFlags::MNT_DETACH).context("let go of the host's root")?;
    chdir("/").context("enter the root")?;
    remount("/".as_ref(), MsFlags::MS_RDONLY)?;
    let error = Command::new("/ferroflow").args(&spec.args).env_clear().envs(&spec.environment).exec();
    Err(error).context("execute /ferroflow")
}

/// What every container has: /proc of its own processes, /sys, /dev.
fn system(spec: &Spec) -> Result<()> {
    let of = |path: &str| spec.root.join(path);
    for dir in ["proc", "sys", "dev"] {
        fs::create_dir_all(of(dir))?;
    }
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let locked = if spec.privileged { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    mount(Some("proc"), &of("proc"), Some("proc"), plain, NO_SOURCE).context("mount /proc")?;
    mount(Some("sysfs"), &of("sys"), Some("sysfs"), plain | locked, NO_SOURCE).context("mount /sys")?;
    mount(Some("tmpfs"), &of("dev"), Some("tmpfs"), MsFlags::MS_NOSUID, NO_SOURCE).context("mount /dev")?;
    for device in DEVICES {
        let path = of("dev").join(device);
        File::create(&path)?;
        bind(&Path::new("/dev").join(device), &path)?;
    }
    if !spec.privileged {
        for path in READ_ONLY.iter().map(|path| of(path)).filter(|path| path.exists()) {
            bind(&path, &path)?;
            remount(&path, MsFlags::MS_RDONLY | plain)?;
        }
    }
    Ok(())
}

fn volume(root: &Path, volume: &Mount) -> Result<()> {
    let target = inside(root, &volume.target);
    fs::create_dir_all(&target).with_context(|| format!("make {}", target.display()))?;
    bind(&volume.source, &target)?;
    let propagation = match volume.propagation {
        Propagation::None => MsFlags::MS_PRIVATE,
        Propagation::HostToContainer => MsFlags::MS_SLAVE,
        Propagation::Bidirectional => MsFlags::MS_SHARED,
    };
    change(&target, propagation | MsFlags::MS_REC)?;
    if volume.writable { Ok(()) } else { remount(&target, MsFlags::MS_RDONLY) }
}

/// The place of a path in the image, with the image's own link followed in it and not on the host.
fn inside(root: &Path, path: &Path) -> PathBuf {
    let path = path.strip_prefix("/").unwrap_or(path);
    match path.strip_prefix("var/run") {
        Ok(rest) => root.join("run").join(rest),
        Err(_other) => root.join(path),
    }
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, NO_SOURCE, flags, NO_SOURCE)
        .with_context(|| format!("bind {} to {}", source.display(), target.display()))
}

fn change(target: &Path, propagation: MsFlags) -> Result<()> {
    mount(NO_SOURCE, target, NO_SOURCE, propagation, NO_SOURCE)
        .with_context(|| format!("{}: {propagation:?}", target.display()))
}

fn remount(target: &Path, flags: MsFlags) -> Result<()> {
    mount(NO_SOURCE, target, NO_SOURCE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, NO_SOURCE)
        .with_context(|| format!("remount {}: {flags:?}", target.display()))
}
