//! Builds what feeds mutated input to programs and agent, and runs it.

use std::process::ExitCode;

use anyhow::Result;

use crate::demo;
use crate::toolchain::Toolchain;

pub(crate) fn run(toolchain: &Toolchain, args: &[String]) -> Result<ExitCode> {
    demo::run(toolchain, "fuzz", args)
}
