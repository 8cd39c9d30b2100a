//! What an optimised agent has resident, idle and of a large cluster.

use std::process::ExitCode;

use anyhow::Result;

use crate::compile::{self, Profile};
use crate::test;
use crate::toolchain::Toolchain;

/// Fails where it is more than the design allows.
pub(crate) fn run(toolchain: &Toolchain) -> Result<ExitCode> {
    let built = compile::run(toolchain, Profile::Release)?;
    let mut cargo = built.cargo(toolchain, "test")?;
    cargo.args(["--test", "memory", "--", "--nocapture", "--test-threads=1"]).env("BPF_TESTS_RELEASE", "1");
    Ok(test::cargo_test(&mut cargo, std::io::stdout())?.report())
}
