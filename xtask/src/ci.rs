//! What CI runs, in order; a part that fails does not keep the next from running.

use std::io::stdout;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::test::{Scope, Tally};
use crate::toolchain::{Toolchain, succeed};
use crate::{chart, compile, demo, image, layers, setup, test, verify, vm};

/// Runs one part and returns its tests.
type Part = fn(&Toolchain) -> Result<Tally>;

const PARTS: [(&str, Part); 11] = [
    ("setup", setup),
    ("format", format),
    ("lints", lints),
    ("layers", layers),
    ("test", all_tests),
    ("verify", verify::part),
    ("kernels", vm::part),
    ("demo", demonstrate),
    ("soak", soak),
    ("chart", chart::part),
    ("image", image::part),
];

pub(crate) fn run(toolchain: &Toolchain) -> Result<ExitCode> {
    let mut sum = Tally::default();
    let mut report = String::new();
    for (name, part) in PARTS {
        println!("\n== {name}");
        let start = Instant::now();
        let tally = part(toolchain).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Tally::failure(format!("{name}: {error:#}"))
        });
        report += &line(name, &tally, start.elapsed());
        sum += tally;
    }
    print!("\n{report}");
    Ok(sum.report())
}

fn line(name: &str, tally: &Tally, took: Duration) -> String {
    let end = if tally.failed == 0 { "ok" } else { "FAILED" };
    let Tally { passed, failed, skipped, .. } = *tally;
    let tests = if passed + skipped == 0 && failed <= 1 { String::new() } else { tally.to_string() };
    let line = format!("{name:8} {end:6} {:6.1} s  {tests}", took.as_secs_f64());
    format!("{}\n", line.trim_end())
}

fn setup(toolchain: &Toolchain) -> Result<Tally> {
    setup::run(toolchain)?;
    Ok(Tally::default())
}

fn format(toolchain: &Toolchain) -> Result<Tally> {
    check(toolchain.cargo().args(["fmt", "--all", "--check"]))
}

fn lints(toolchain: &Toolchain) -> Result<Tally> {
    let mut clippy = toolchain.cargo();
    clippy.args(["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"]);
    check(&mut clippy)?;
    check(compile::object_cargo(toolchain, "clippy").args(["--", "--deny", "warnings"]))
}

fn check(command: &mut Command) -> Result<Tally> {
    succeed(command)?;
    Ok(Tally::default())
}

fn layers(toolchain: &Toolchain) -> Result<Tally> {
    layers::run(toolchain.root())?;
    Ok(Tally::default())
}

fn all_tests(toolchain: &Toolchain) -> Result<Tally> {
    Ok(test::run(toolchain, Scope::All, None))
}

fn demonstrate(toolchain: &Toolchain) -> Result<Tally> {
    program(toolchain, "demo", &[])
}

/// Five minutes; what fails is run again with the seed that it printed.
fn soak(toolchain: &Toolchain) -> Result<Tally> {
    program(toolchain, "soak", &["--minutes", "5"].map(str::to_owned))
}

/// A program of bpf-tests that counts its checks.
fn program(toolchain: &Toolchain, name: &str, args: &[String]) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut command = demo::command(toolchain, name, args)?;
    let done = test::stream(&mut command, stdout(), |line| {
        tally += checks(name, line);
        if line.trim_end().ends_with("  NO") {
            tally.failures.push(format!("{name}: {line}"));
        }
    })?;
    if !done && tally.failed == 0 {
        tally += Tally::failure(format!("{name}: see its error above"));
    }
    Ok(tally)
}

/// Of a program's last line, `demo: 9 checks, 9 passed`.
fn checks(name: &str, line: &str) -> Tally {
    let counts = || {
        let (checks, passed) = line.trim().strip_prefix(name)?.strip_prefix(": ")?.split_once(" checks, ")?;
        let (checks, passed): (usize, usize) =
            (checks.parse().ok()?, passed.strip_suffix(" passed")?.parse().ok()?);
        Some(Tally { passed, failed: checks.checked_sub(passed)?, ..Tally::default() })
    };
    counts().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_of_programs_are_counted() {
        assert_eq!(checks("demo", "demo: 9 checks, 7 passed\n").to_string(), "7 passed, 2 failed");
        assert_eq!(checks("demo", "demo: starting"), Tally::default());
        assert_eq!(checks("soak", "soak: 10 minutes, seed 1"), Tally::default());
    }
}
