//! What the programs cost: instructions that the verifier walks, stack, and time per packet.
//!
//! The instructions are compared with a table in the repository, one row per kernel (`major.minor`), because a program
//! that loads here may be refused by another kernel as it grows. Times are of this machine and this minute: they are
//! shown, never compared.

mod frames;
mod paths;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::unistd::geteuid;

use crate::{
    run::{DEFAULTS, Programs, object},
    sandbox::Sandbox,
};

/// Loads every program and prints what it costs.
#[derive(Debug, Parser)]
#[command(name = "verify")]
struct Cli {
    /// Write this kernel's row of the table instead of comparing with it
    #[arg(long)]
    update: bool,
    /// The table of verified instructions
    #[arg(long, value_name = "FILE", default_value = "bpf-tests/verified.json")]
    table: PathBuf,
    /// Packets per measurement; 0 measures no time
    #[arg(long, value_name = "PACKETS", default_value_t = 1_000_000)]
    repeat: u32,
}

/// Verified instructions by kernel and program.
type Table = BTreeMap<String, Counts>;
type Counts = BTreeMap<String, u32>;

/// No program may need more: a tenth of what kernels allow, so that features have room.
const BUDGET: u32 = 100_000;
/// So many parts of a count may come and go without a look.
const DRIFT: u32 = 20;

pub fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("verify: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(geteuid().is_root(), "loading programs needs root");
    let object = object()?;
    let sandbox = Sandbox::enter()?;
    let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
    let kernel = kernel_release()?;
    let counts = counts(&mut programs)?;
    let stacks = frames::stacks(&object)?;

    println!("{:<14} {:>12} {:>14}", "PROGRAM", "VERIFIED", "STACK (bytes)");
    for (name, stack) in &stacks {
        let verified = counts.get(name).map_or_else(|| "-".into(), u32::to_string);
        println!("{name:<14} {verified:>12} {:>14}", stack.to_string());
    }
    println!();
    if cli.repeat > 0 {
        paths::print(&mut programs, cli.repeat)?;
    }

    for (name, stack) in &stacks {
        ensure!(stack.rounded <= frames::LIMIT, "{name} needs {} bytes of stack: {stack}", stack.rounded);
    }
    for (name, count) in &counts {
        ensure!(*count < BUDGET, "{name}: {count} verified instructions; the budget is {BUDGET}");
    }
    judge(cli, &kernel, counts)
}

/// Holds the counts against the table, or writes them into it.
fn judge(cli: &Cli, kernel: &str, counts: Counts) -> Result<()> {
    let mut table = read(&cli.table)?;
    if counts.is_empty() {
        println!("kernel {kernel} does not say how many instructions it verified (5.16 and newer do)");
        return Ok(());
    }
    if cli.update {
        table.insert(kernel.to_owned(), counts);
        let text = serde_json::to_string_pretty(&table)? + "\n";
        fs::write(&cli.table, text).with_context(|| format!("write {}", cli.table.display()))?;
        println!("kernel {kernel}: {} written", cli.table.display());
        return Ok(());
    }
    let Some(row) = table.get(kernel) else {
        println!("kernel {kernel} has no row in {}: nothing to compare with", cli.table.display());
        return Ok(());
    };
    let drifted = drift(row, &counts);
    ensure!(
        drifted.is_empty(),
        "the verifier's work has changed on kernel {kernel}:\n{}\nif that is meant, write the new numbers with \
         `cargo xtask verify --update` and commit {}",
        drifted.join("\n"),
        cli.table.display()
    );
    println!("kernel {kernel}: every program within {} % of {}", 100 / DRIFT, cli.table.display());
    Ok(())
}

/// What is further from the row than may be.
fn drift(row: &Counts, counts: &Counts) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = row.keys().chain(counts.keys()).collect();
    let shown = |count: Option<&u32>| count.map_or_else(|| "no program".into(), u32::to_string);
    let apart = |name: &&String| match (row.get(*name), counts.get(*name)) {
        (Some(was), Some(is)) => was.abs_diff(*is) * DRIFT > *was,
        _ => true,
    };
    let line = |name: &String| format!("  {name}: {}, was {}", shown(counts.get(name)), shown(row.get(name)));
    names.into_iter().filter(apart).map(line).collect()
}

fn read(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
}

/// Empty on kernels that do not count.
fn counts(programs: &mut Programs) -> Result<Counts> {
    let mut counts = Counts::new();
    for (name, program) in programs.datapath.programs().programs() {
        if let Some(count) = program.info()?.verified_instruction_count() {
            counts.insert(name.to_owned(), count);
        }
    }
    Ok(counts)
}

/// `6.18` of `6.18.44-something`.
fn kernel_release() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
    Ok(release.split('.').take(2).collect::<Vec<_>>().join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(&str, u32)]) -> Counts {
        of.iter().map(|&(name, count)| (name.to_owned(), count)).collect()
    }

    #[test]
    fn drift_is_told_beyond_five_percent_either_way() {
        let row = counts(&[("a", 1000), ("b", 10)]);
        assert!(drift(&row, &counts(&[("a", 1050), ("b", 10)])).is_empty());
        assert!(drift(&row, &counts(&[("a", 950), ("b", 10)])).is_empty());
        assert_eq!(
            drift(&row, &counts(&[("a", 1051), ("b", 11)])),
            ["  a: 1051, was 1000", "  b: 11, was 10"]
        );
        assert_eq!(drift(&row, &counts(&[("a", 949), ("b", 10)])).len(), 1);
    }

    #[test]
    fn a_program_that_came_or_went_is_drift() {
        let row = counts(&[("a", 1)]);
        assert_eq!(drift(&row, &counts(&[("b", 2)])), ["  a: no program, was 1", "  b: 2, was no program"]);
    }
}
