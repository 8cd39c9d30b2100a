//! Runs the tests of one file that own their process: they start in the sandbox, before there is a second thread.

use std::{
    env,
    fs::File,
    io::Write as _,
    process::{self, ExitCode},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::unistd::geteuid;

use crate::{pod, sandbox::Sandbox};

pub type Test = fn(&Sandbox) -> Result<()>;

/// Whether a test that needs root is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Privilege {
    Root,
    /// The skip has been reported.
    Skip,
}

/// The `main` of a file of tests with `harness = false`; understands the arguments of `cargo test`.
pub fn main(tests: &[(&'static str, Test)]) -> ExitCode {
    pod::run_if_asked();
    let arguments = Arguments::from_args();
    if arguments.list || !geteuid().is_root() {
        let trials = tests.iter().map(|&(name, _)| Trial::test(name, move || without_root(name)));
        return libtest_mimic::run(&arguments, trials.collect()).exit_code();
    }
    match run(tests, &arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(101)
        }
    }
}

/// Fails without root, unless `BPF_TESTS=skip` allows to skip; the skip is printed and, if `BPF_TESTS_SKIPPED` names
/// a file, recorded in it.
pub fn require_root(test: &str) -> Result<Privilege> {
    if geteuid().is_root() {
        return Ok(Privilege::Root);
    }
    skip(test, "needs root")?;
    Ok(Privilege::Skip)
}

/// For a test of what this kernel lacks, whoever runs it: the skip is recorded as by [`require_root`]. `cargo xtask vm`
/// runs the test on a kernel that has it, and allows no skip there.
pub fn kernel_lacks(test: &str, what: &str) -> Result<()> {
    record(test, &format!("this kernel has no {what}"))
}

/// For a test that this machine cannot run: fails, unless `BPF_TESTS=skip`; the skip is recorded as by
/// [`require_root`].
pub fn skip(test: &str, why: &str) -> Result<()> {
    if env::var_os("BPF_TESTS").is_none_or(|value| value != "skip") {
        bail!("{test} {why}; set BPF_TESTS=skip to go on without it");
    }
    record(test, why)
}

fn record(test: &str, why: &str) -> Result<()> {
    let line = format!("SKIP {test}: {why}\n");
    print!("{line}");
    if let Some(path) = env::var_os("BPF_TESTS_SKIPPED") {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open BPF_TESTS_SKIPPED={}", path.display()))?;
        file.write_all(line.as_bytes()).context("record a skipped test")?;
    }
    Ok(())
}

fn run(tests: &[(&'static str, Test)], arguments: &Arguments) -> Result<ExitCode> {
    let sandbox = Arc::new(Sandbox::enter()?);
    sandbox.exit_on_signals()?;
    let trials = tests.iter().map(|&(name, test)| {
        let sandbox = sandbox.clone();
        Trial::test(name, move || test(&sandbox).map_err(|error| Failed::from(format!("{error:#}"))))
    });
    let conclusion = libtest_mimic::run(arguments, trials.collect());
    match Arc::into_inner(sandbox) {
        Some(sandbox) => drop(sandbox),
        None => eprintln!("process {}: a test still holds the sandbox", process::id()),
    }
    Ok(conclusion.exit_code())
}

fn without_root(test: &str) -> Result<(), Failed> {
    let (Privilege::Root | Privilege::Skip) = require_root(test).map_err(|error| format!("{error:#}"))?;
    Ok(())
}
