//! Builds the BPF object, then the static binary that carries it.
//!
//! Each has a target folder of its own: their flags differ, and would throw out each other's cache.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::Arch;
use crate::setup;
use crate::toolchain::{Toolchain, succeed};

#[derive(Clone, Copy)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// What a build leaves. Displayed: the two paths with their sizes.
pub(crate) struct Built {
    object: PathBuf,
    binary: PathBuf,
}

impl Built {
    /// Where both are, for the environment of what uses them.
    pub(crate) fn env(&self) -> [(&'static str, &Path); 2] {
        [("FERROFLOW_OBJECT", &self.object), ("FERROFLOW_BIN", &self.binary)]
    }

    /// A cargo command for bpf-tests. It is built as the binary was, so that what both need is compiled once.
    pub(crate) fn cargo(&self, toolchain: &Toolchain, verb: &str) -> Result<Command> {
        let mut cargo = static_cargo(toolchain, &toolchain.host()?, verb, &self.object);
        cargo.args(["--package", "bpf-tests"]).envs(self.env());
        Ok(cargo)
    }

    /// A program of bpf-tests, once it is built with the same profile.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.binary.with_file_name(name)
    }
}

impl fmt::Display for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |path: &Path| {
            let bytes = fs::metadata(path).map_or(0, |found| found.len());
            format!("{:>8} KiB  {}", bytes.div_ceil(1024), path.display())
        };
        write!(f, "{}\n{}", line(&self.object), line(&self.binary))
    }
}

pub(crate) fn run(toolchain: &Toolchain, profile: Profile) -> Result<Built> {
    let linker = setup::run(toolchain)?;
    let object = object(toolchain, &linker).context("the BPF object does not build")?;
    let binary = binary(toolchain, profile, &object).context("the binary does not build")?;
    Ok(Built { object, binary })
}

/// The optimised binary for machines of an architecture, this one's or another. The object in it is the same for all.
pub(crate) fn release_for(toolchain: &Toolchain, arch: Arch) -> Result<PathBuf> {
    let compiler = arch.linker(toolchain)?;
    let linker = setup::run(toolchain)?;
    let object = object(toolchain, &linker).context("the BPF object does not build")?;
    let mut cargo = static_cargo(toolchain, arch.triple(), "build", &object);
    cargo.args(["--package", "ferroflow", "--bin", BINARY, "--release"]);
    if let Some(compiler) = compiler {
        toolchain.add_target(arch.triple())?;
        cargo.env(target_key(arch.triple(), "LINKER"), compiler);
    }
    succeed(&mut cargo).with_context(|| format!("the binary does not build for {}", arch.name()))?;
    Ok(static_target(toolchain, arch.triple(), Profile::Release).join(BINARY))
}

/// The one ELF with all programs. Always optimised: unoptimised programs do not fit the verifier's limits.
fn object(toolchain: &Toolchain, linker: &Path) -> Result<PathBuf> {
    let mut cargo = object_cargo(toolchain, "build");
    cargo.args(["--release"]).env(target_key(BPF, "LINKER"), linker);
    // The debug information becomes the BTF.
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "none");
    succeed(&mut cargo)?;
    Ok(object_target(toolchain).join(BPF).join("release").join(OBJECT))
}

/// cargo for the object; a verb that links needs the linker too.
pub(crate) fn object_cargo(toolchain: &Toolchain, verb: &str) -> Command {
    let mut cargo = toolchain.cargo();
    cargo.args([verb, "--locked", "--package", "ferroflow-ebpf", "--bin", OBJECT, "--features", "object"]);
    cargo.args(["--target", BPF, "-Zbuild-std=core"]);
    // build-std is unstable; the pinned compiler makes it reproducible all the same.
    cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", object_target(toolchain));
    cargo.env(target_key(BPF, "RUSTFLAGS"), BPF_FLAGS);
    cargo
}

fn object_target(toolchain: &Toolchain) -> PathBuf {
    toolchain.target("bpf")
}

fn binary(toolchain: &Toolchain, profile: Profile, object: &Path) -> Result<PathBuf> {
    let host = toolchain.host()?;
    let mut cargo = static_cargo(toolchain, &host, "build", object);
    cargo.args(["--package", "ferroflow", "--bin", BINARY]);
    match profile {
        Profile::Dev => {}
        Profile::Release => _ = cargo.arg("--release"),
    }
    succeed(&mut cargo)?;
    Ok(static_target(toolchain, &host, profile).join(BINARY))
}

/// cargo for what is linked statically and carries the object.
fn static_cargo(toolchain: &Toolchain, target: &str, verb: &str, object: &Path) -> Command {
    let mut cargo = toolchain.cargo();
    // Named even where it is this machine's: flags for a named target leave out build scripts and macros.
    cargo.args([verb, "--locked", "--target", target]);
    cargo.env("CARGO_TARGET_DIR", toolchain.target("static")).env("FERROFLOW_OBJECT", object);
    cargo.env(target_key(target, "RUSTFLAGS"), "-Ctarget-feature=+crt-static");
    // Half of what an idle agent has resident is its own text. The object is built apart, for speed.
    cargo.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s");
    cargo
}

fn static_target(toolchain: &Toolchain, target: &str, profile: Profile) -> PathBuf {
    let folder = match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    };
    toolchain.target("static").join(target).join(folder)
}

/// cargo's environment variable for one target's setting.
fn target_key(triple: &str, key: &str) -> String {
    format!("CARGO_TARGET_{}_{key}", triple.replace('-', "_").to_uppercase())
}

/// BTF gives maps their types; LLVM 22's in-order expansion of small copies crashes ("Post-RA pseudo instruction
/// expansion") on a copy that is aligned to more than eight bytes.
const BPF_FLAGS: &str = "-Cdebuginfo=2 -Clink-arg=--btf -Clink-arg=--disable-expand-memcpy-in-order";
const BPF: &str = "bpfel-unknown-none";
const OBJECT: &str = "ferroflow-bpf";
const BINARY: &str = "ferroflow";
