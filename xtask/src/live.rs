//! Builds the tests of a real cluster, and runs them. They need neither the BPF object nor root.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::privileged;
use crate::toolchain::Toolchain;

pub(crate) fn run(toolchain: &Toolchain, kubeconfig: &Path, args: &[String]) -> Result<ExitCode> {
    let mut cargo = toolchain.cargo();
    cargo.args([
        "run",
        "--locked",
        "--quiet",
        "--package",
        "bpf-tests",
        "--bin",
        "live",
        "--",
        "--kubeconfig",
    ]);
    cargo.arg(std::path::absolute(kubeconfig)?).args(args);
    privileged::run(cargo)
}
