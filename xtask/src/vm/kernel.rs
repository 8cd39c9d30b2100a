//! The kernels: Debian's packages for clouds, unpacked and never installed.
//!
//! apt is asked with lists and a state of its own, in the cache, so that the machine's are not touched. The mirrors are
//! those that the machine itself uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::{beside, cache, lock, remove};
use crate::toolchain::{output, succeed};

/// A kernel that Ferroflow is tested on.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) version: &'static str,
    /// The release of Debian that has it, and the package that depends on its newest image there.
    suite: &'static str,
    package: &'static str,
    /// Came with 6.7.
    pub(super) has_netkit: bool,
}

pub(crate) const KERNELS: [Kernel; 3] = [
    Kernel { version: "5.10", suite: "bullseye", package: "linux-image-cloud-amd64", has_netkit: false },
    Kernel { version: "6.1", suite: "bookworm", package: "linux-image-cloud-amd64", has_netkit: false },
    Kernel { version: "6.12", suite: "bookworm", package: "linux-image-6.12-cloud-amd64", has_netkit: true },
];

/// What its package holds.
pub(super) struct Image {
    pub(super) vmlinuz: PathBuf,
    /// `lib/modules/RELEASE`.
    pub(super) modules: PathBuf,
}

/// For the command line.
pub(crate) fn named(version: &str) -> Result<Kernel, String> {
    let known = KERNELS.map(|kernel| kernel.version).join(", ");
    let found = KERNELS.into_iter().find(|kernel| kernel.version == version);
    found.ok_or_else(|| format!("no such kernel; there are {known}"))
}

/// Downloads what is not in the cache.
pub(super) fn image(kernel: Kernel) -> Result<Image> {
    let home = cache()?.join(format!("kernel-{}", kernel.version));
    let lock = lock(&home)?;
    if home.exists() {
        eprintln!("present    kernel {} in {}", kernel.version, home.display());
    } else {
        eprintln!("missing    kernel {}: downloading Debian's package, once", kernel.version);
        download(kernel, &home).with_context(|| format!("cannot get kernel {}", kernel.version))?;
        eprintln!("installed  kernel {} in {}", kernel.version, home.display());
    }
    drop(lock);
    Ok(Image {
        vmlinuz: only_file(&home.join("boot"), "vmlinuz-")?,
        modules: only_file(&home.join("lib/modules"), "")?,
    })
}

/// Unpacks beside the place and renames, so that an interrupted download leaves nothing that looks complete.
fn download(kernel: Kernel, home: &Path) -> Result<()> {
    let building = beside(home, "building");
    remove(&building)?;
    let apt = Apt::new(building.join("apt"), kernel.suite)?;
    succeed(apt.command("apt-get").args(["--quiet", "--quiet", "update"]))?;
    let depends = output(apt.command("apt-cache").args(["depends", "--no-recommends", kernel.package]))?;
    let image = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let image = image.with_context(|| format!("{} depends on no image", kernel.package))?;
    let mut download = apt.command("apt-get");
    succeed(download.args(["--quiet", "--quiet", "download", image]).current_dir(&apt.dir))?;
    let package = only_file(&apt.dir, "linux-image-")?;
    let unpacked = building.join("unpacked");
    succeed(Command::new("dpkg-deb").arg("--extract").args([&package, &unpacked]))?;
    fs::rename(&unpacked, home).with_context(|| format!("cannot make {}", home.display()))?;
    remove(&building)
}

/// apt with a state of its own in `dir`.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(dir: PathBuf, suite: &str) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let list = dir.join("sources.list");
        fs::write(&list, sources(&mirrors()?, suite)?)
            .with_context(|| format!("cannot write {}", list.display()))?;
        Ok(Self { dir })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let in_dir = |name: &str| self.dir.join(name).display().to_string();
        for (option, value) in [
            ("Dir::Etc::sourcelist", in_dir("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::State::lists", in_dir("lists")),
            ("Dir::Cache", in_dir("cache")),
            ("Acquire::Languages", "none".to_owned()),
            // A release that is no longer updated says until when its lists are valid.
            ("Acquire::Check-Valid-Until", "false".to_owned()),
            // The cache is in a home that apt's own user cannot enter.
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            command.arg("--option").arg(format!("{option}={value}"));
        }
        command
    }
}

/// What apt says of the machine's own sources: `LABEL URI`, one a line.
fn mirrors() -> Result<String> {
    let mut apt = Command::new("apt-get");
    output(apt.args(["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]))
        .context("the kernels come from Debian, through apt")
}

/// Lines of a sources.list for a release and its security updates, on the mirrors that the machine uses.
fn sources(mirrors: &str, suite: &str) -> Result<String> {
    let mirror = |label: &str| {
        let mut lines = mirrors.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(of, _)| *of == label).map(|(_, uri)| uri)
    };
    let Some(main) = mirror("Debian") else {
        bail!("apt knows no mirror of Debian (after `apt-get update`); add one to its sources");
    };
    let security = mirror("Debian-Security").map(|uri| (uri, format!("{suite}-security")));
    let lines = [(main, suite.to_owned())].into_iter().chain(security);
    Ok(lines.map(|(uri, suite)| format!("deb [signed-by={KEYS}] {uri} {suite} main\n")).collect())
}

/// Of the package debian-archive-keyring, for every release that is of interest here.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The one entry of a directory that begins so.
fn only_file(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let named =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let found: Vec<_> = paths.filter(named).collect();
    let [path] = found.as_slice() else {
        bail!("{} has {} entries {prefix}*, not one; remove it to start anew", dir.display(), found.len());
    };
    Ok(path.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_come_from_the_machines_own_mirrors() {
        let mirrors = "Debian-Security http://a/security/\nOther http://b/\nDebian http://c/debian/\n";
        let lines = sources(mirrors, "bullseye").unwrap();
        assert_eq!(
            lines,
            format!(
                "deb [signed-by={KEYS}] http://c/debian/ bullseye main\n\
                 deb [signed-by={KEYS}] http://a/security/ bullseye-security main\n"
            )
        );
        assert!(
            sources("Other http://b/\n", "bullseye").unwrap_err().to_string().contains("no mirror of Debian")
        );
    }
}
