//! Builds what the demo shows and runs it.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::privileged;
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, args: &[String]) -> Result<ExitCode> {
    privileged::run(command(toolchain, args)?)
}

/// The built demo, ready to start.
pub(crate) fn command(toolchain: &Toolchain, args: &[String]) -> Result<Command> {
    let built = compile::run(toolchain, Profile::Dev)?;
    succeed(built.cargo(toolchain, "build")?.args(["--bin", "demo"])).context("the demo does not build")?;
    privileged::command(toolchain, &built, "demo", args)
}
