//! What the programs cost: instructions that the verifier walks, stack, and time per packet.
//!
//! The instructions are compared with a table in the repository, which has rows for every kernel (`major.minor`) and
//! combination of load-time constants, because a program that loads here may be refused by another kernel as it grows. Times are of this machine and this minute: they are
//! shown, never compared.

mod count;
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
    run::{Constants, DEFAULTS, Programs, object},
    sandbox::Sandbox,
    verify::{
        count::{Counts, counts},
        frames::Stack,
    },
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

/// Verified instructions by program, for each kernel and what the agent is told (`6.1 --log-drops`); and bytes of
/// stack, as old kernels add them up, in the row [`STACK`], which is the same for all.
type Table = BTreeMap<String, Counts>;

const STACK: &str = "stack";

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
    let kernel = kernel_release()?;
    let stacks = frames::stacks(&object)?;
    let mut rows = Table::new();
    for constants in Constants::ALL {
        rows.insert(format!("{kernel} {constants}").trim_end().to_owned(), counts(&sandbox, constants)?);
    }
    print(&rows, &stacks);
    if cli.repeat > 0 {
        paths::print(&mut Programs::load(&sandbox.place()?, DEFAULTS)?, cli.repeat)?;
    }

    for (name, stack) in &stacks {
        ensure!(stack.rounded <= frames::LIMIT, "{name} needs {} bytes of stack: {stack}", stack.rounded);
    }
    for (row, counts) in &rows {
        for (name, count) in counts {
            ensure!(*count < BUDGET, "{row}: {name}: {count} verified instructions; the budget is {BUDGET}");
        }
    }
    rows.insert(STACK.to_owned(), stacks.iter().map(|(name, stack)| (name.clone(), stack.rounded)).collect());
    judge(cli, &kernel, rows)
}

/// A column for each row of the table, most options last.
fn print(rows: &Table, stacks: &BTreeMap<String, Stack>) {
    print!("{:<14} {:>14}", "PROGRAM", "STACK (bytes)");
    let width = |row: &str| row.len().max(8);
    rows.keys().for_each(|row| print!("  {row:>0$}", width(row)));
    println!();
    for (name, stack) in stacks {
        print!("{name:<14} {:>14}", stack.to_string());
        for (row, counts) in rows {
            let count = counts.get(name).map_or_else(|| "-".into(), u32::to_string);
            print!("  {count:>0$}", width(row));
        }
        println!();
    }
    println!();
}

/// Holds the rows against the table, or writes them into it.
fn judge(cli: &Cli, kernel: &str, rows: Table) -> Result<()> {
    let mut table = read(&cli.table)?;
    if cli.update {
        table.extend(rows);
        let text = serde_json::to_string_pretty(&table)? + "\n";
        fs::write(&cli.table, text).with_context(|| format!("write {}", cli.table.display()))?;
        println!("kernel {kernel}: {} written", cli.table.display());
        return Ok(());
    }
    if !table.contains_key(kernel) {
        println!("kernel {kernel} has no row in {}: nothing to compare with", cli.table.display());
        return Ok(());
    }
    let drifted: Vec<_> = rows
        .iter()
        .flat_map(|(name, counts)| {
            let lines = drift(table.get(name).unwrap_or(&Counts::new()), counts);
            lines.into_iter().map(move |line| format!("  {name}: {line}"))
        })
        .collect();
    ensure!(
        drifted.is_empty(),
        "the verifier's work has changed on kernel {kernel}:\n{}\nif that is meant, write the new numbers with \
         `cargo xtask verify --update` (`cargo xtask vm --update` for other kernels) and commit {}",
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
    let line = |name: &String| format!("{name}: {}, was {}", shown(counts.get(name)), shown(row.get(name)));
    names.into_iter().filter(apart).map(line).collect()
}

fn read(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
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
        assert_eq!(drift(&row, &counts(&[("a", 1051), ("b", 11)])), ["a: 1051, was 1000", "b: 11, was 10"]);
        assert_eq!(drift(&row, &counts(&[("a", 949), ("b", 10)])).len(), 1);
    }

    #[test]
    fn a_program_that_came_or_went_is_drift() {
        let row = counts(&[("a", 1)]);
        assert_eq!(drift(&row, &counts(&[("b", 2)])), ["a: no program, was 1", "b: 2, was no program"]);
    }
}
