//! Builds what is measured, optimised, and measures it.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::privileged;
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, args: &[String]) -> Result<ExitCode> {
    let built = compile::run(toolchain, Profile::Release)?;
    succeed(built.cargo(toolchain, "build")?.args(["--release", "--bin", "bench"]))
        .context("the bench does not build")?;
    privileged::run(privileged::command(toolchain, &built, "bench", args)?)
}
