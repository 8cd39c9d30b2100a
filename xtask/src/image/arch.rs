//! The machines that images are made for.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::toolchain::{Toolchain, installed};

/// As image indexes and `kubernetes.io/arch` call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    pub(crate) const fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    pub(crate) fn of_host(toolchain: &Toolchain) -> Result<Self> {
        let host = toolchain.host()?;
        let found = Self::value_variants().iter().copied().find(|arch| arch.triple() == host);
        found.with_context(|| format!("no image for {host}: name one with --arch"))
    }

    /// The C compiler that links for it from another machine, under the name that Debian, Ubuntu and Fedora give it.
    const fn cross_compiler(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu-gcc",
            Self::Arm64 => "aarch64-linux-gnu-gcc",
        }
    }

    const fn packages(self) -> &'static str {
        match self {
            Self::Amd64 => "gcc-x86-64-linux-gnu libc6-dev-amd64-cross",
            Self::Arm64 => "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        }
    }

    /// The linker to name to cargo; none for this machine's own.
    ///
    /// # Errors
    /// Where there is none, with the packages that bring it.
    pub(crate) fn linker(self, toolchain: &Toolchain) -> Result<Option<&'static str>> {
        if toolchain.host()? == self.triple() {
            return Ok(None);
        }
        let compiler = self.cross_compiler();
        if !installed(compiler) {
            bail!(
                "no compiler for {} on this machine: `{compiler}` is missing; install {} (Debian, Ubuntu), or build \
                 the image on such a machine",
                self.name(),
                self.packages()
            );
        }
        Ok(Some(compiler))
    }
}
