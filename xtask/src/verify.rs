//! Builds what measures the programs' cost and runs it.

use std::process::ExitCode;

use anyhow::Result;

use crate::demo;
use crate::test::Tally;
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, args: &[String]) -> Result<ExitCode> {
    demo::run(toolchain, "verify", args)
}

/// For CI: the numbers with fewer packets, as the times are of no consequence there.
pub(crate) fn part(toolchain: &Toolchain) -> Result<Tally> {
    succeed(&mut demo::command(toolchain, "verify", &["--repeat".into(), "100000".into()])?)?;
    Ok(Tally::default())
}
