//! Builds programs of bpf-tests, such as the demo, and runs them.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::privileged;
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, name: &str, args: &[String]) -> Result<ExitCode> {
    privileged::run(command(toolchain, name, args)?)
}

/// The built program, ready to start. Only it needs root: nothing is built as root unless xtask runs so.
pub(crate) fn command(toolchain: &Toolchain, name: &str, args: &[String]) -> Result<Command> {
    let built = compile::run(toolchain, Profile::Dev)?;
    succeed(built.cargo(toolchain, "build")?.args(["--bin", name]))
        .with_context(|| format!("{name} does not build"))?;
    privileged::command(toolchain, &built, name, args)
}
