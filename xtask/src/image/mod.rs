//! The container image, written without a container engine: from scratch, one static binary.
//!
//! ```text
//!   binary ──tree──▶ layer.tar.gz ┐
//!                    config.json  ├─▶ OCI image layout (image-spec 1.1) + docker's manifest.json, in one tar
//!                    manifest     ┘
//! ```
//!
//! `ctr images import`, `docker load` and `podman load` take the tar. The same binary from the same commit gives the
//! same bytes: every time is that of the commit or zero, every list is sorted, nobody's name or umask gets in.

mod arch;
mod check;
mod layer;
mod layout;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

pub(crate) use arch::Arch;

use crate::compile;
use crate::test::Tally;
use crate::toolchain::{Toolchain, output};

#[derive(Args)]
pub(crate) struct Options {
    /// For which machines, separated by commas; one tar each [default: this machine's]
    #[arg(long, value_enum, value_delimiter = ',')]
    arch: Vec<Arch>,

    /// Where the tars go [default: target/image]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Name that engines give it when they load it; the tag is the version
    #[arg(long, default_value = NAME)]
    name: String,
}

/// A registry of this name cannot exist: an image that is missing on a node is not pulled from a stranger.
const NAME: &str = "localhost/ferroflow";

/// What is said about the image.
pub(crate) struct Facts {
    pub(crate) arch: Arch,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) revision: String,
    /// RFC 3339, in UTC.
    pub(crate) created: String,
}

pub(crate) fn run(toolchain: &Toolchain, options: &Options) -> Result<()> {
    let out = options.out.clone().unwrap_or_else(|| toolchain.target("image"));
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let arches = if options.arch.is_empty() { vec![Arch::of_host(toolchain)?] } else { options.arch.clone() };
    for arch in arches {
        let facts = facts(toolchain, arch, &options.name)?;
        let binary = compile::release_for(toolchain, arch)?;
        let path = write(&binary, &facts, &out)?;
        let digest =
            check::run(&path, &facts, &binary).with_context(|| format!("{} is not sound", path.display()))?;
        let kib = fs::metadata(&path)?.len().div_ceil(1024);
        println!("{kib:>8} KiB  {}\n          {}:{}  {digest}", path.display(), facts.name, facts.version);
    }
    Ok(())
}

/// For CI: this machine's image, which is also started.
pub(crate) fn part(toolchain: &Toolchain) -> Result<Tally> {
    run(toolchain, &Options { arch: Vec::new(), out: None, name: NAME.to_owned() })?;
    Ok(Tally::default())
}

/// Writes beside the place and renames: an interrupted run leaves no half tar under the name.
fn write(binary: &Path, facts: &Facts, out: &Path) -> Result<PathBuf> {
    let binary = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let tar = layout::tar(&layer::layer(&binary)?, facts)?;
    let path = out.join(format!("ferroflow-{}-linux-{}.tar", facts.version, facts.arch.name()));
    let building = path.with_extension("tar.building");
    fs::write(&building, tar).with_context(|| format!("cannot write {}", building.display()))?;
    fs::rename(&building, &path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Of the commit; a tree without git (a source archive) says so in the labels.
fn facts(toolchain: &Toolchain, arch: Arch, name: &str) -> Result<Facts> {
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.args(args).current_dir(toolchain.root()).env("TZ", "UTC");
        output(&mut git).map(|text| text.trim().to_owned())
    };
    let dirty =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|changes| !changes.is_empty());
    let revision = git(&["rev-parse", "HEAD"]).unwrap_or_else(|_no_git| "unknown".into());
    let created = git(&["log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", "--format=%cd"]);
    Ok(Facts {
        arch,
        name: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: if dirty { format!("{revision}-dirty") } else { revision },
        created: created.unwrap_or_else(|_no_git| "1970-01-01T00:00:00Z".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Facts {
        Facts {
            arch: Arch::Amd64,
            name: NAME.into(),
            version: "1.2.3".into(),
            revision: "abc".into(),
            created: "2026-11-21T12:00:00Z".into(),
        }
    }

    fn written(binary: &[u8]) -> (PathBuf, Vec<u8>) {
        let folder = std::env::temp_dir().join(format!(
            "xtask-image-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        fs::create_dir_all(&folder).unwrap();
        let source = folder.join("binary");
        fs::write(&source, binary).unwrap();
        let path = write(&source, &example(), &folder).unwrap();
        let bytes = fs::read(&path).unwrap();
        (folder, bytes)
    }

    #[test]
    fn the_same_binary_gives_the_same_bytes() {
        let (folder, first) = written(b"\x7fELF one");
        let (_, second) = written(b"\x7fELF one");
        let (_, other) = written(b"\x7fELF two");
        fs::remove_dir_all(folder).unwrap();
        assert!(first == second);
        assert!(first != other);
    }

    #[test]
    fn what_is_written_reads_back_with_its_digests() {
        let (folder, _) = written(b"\x7fELF one");
        let path = folder.join("ferroflow-1.2.3-linux-amd64.tar");
        let tree = check::unpack(&path, &example()).unwrap();
        let names: Vec<_> = tree.entries.iter().map(String::as_str).collect();
        fs::remove_dir_all(folder).unwrap();
        assert_eq!(
            names,
            [
                "etc",
                "etc/nsswitch.conf",
                "ferroflow",
                "ferroflow-cni",
                "run",
                "tmp",
                "var",
                "var/lib",
                "var/run"
            ]
        );
        assert_eq!(tree.binary, b"\x7fELF one");
        assert_eq!(tree.config["config"]["Entrypoint"], serde_json::json!(["/ferroflow"]));
        assert_eq!(tree.config["config"]["Labels"]["org.opencontainers.image.version"], "1.2.3");
        assert_eq!(tree.config["architecture"], "amd64");
    }

    #[test]
    fn a_byte_that_changed_is_found() {
        let (folder, bytes) = written(&[7; 4096]);
        let path = folder.join("changed.tar");
        let mut refused = 0;
        // One byte in the middle of every block that holds data: names, sizes, JSON, layer.
        for at in (256..bytes.len() - 1024).step_by(512) {
            let mut changed = bytes.clone();
            if changed[at] == 0 {
                continue;
            }
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert!(check::unpack(&path, &example()).is_err(), "byte {at}");
            refused += 1;
        }
        fs::remove_dir_all(folder).unwrap();
        assert!(refused > 3, "{refused} changes were tried");
    }
}
