//! What CI runs, in order; a part that fails does not keep the next from running.

use std::io::{Write, stdout};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::test::{Scope, Tally};
use crate::toolchain::{Toolchain, succeed};
use crate::{chart, compile, demo, image, layers, setup, test, verify, vm};

/// Runs one part, writes to `show` what is to be seen of it and returns its tests.
type Part = fn(&Toolchain, &mut dyn Write) -> Result<Tally>;

/// Parts of one row run side by side. The first shows what it does as it does it, the others when they have ended: they
/// print nothing on their own.
const PARTS: [&[(&str, Part)]; 10] = [
    &[("setup", setup)],
    &[("format", format)],
    &[("lints", lints)],
    &[("layers", layers)],
    &[("test", all_tests)],
    &[("verify", |toolchain, _show| verify::part(toolchain))],
    // An emulated machine keeps one processor busy; the soak lasts as long as it is asked to.
    &[("kernels", |toolchain, _show| vm::part(toolchain)), ("soak", soak)],
    &[("demo", demonstrate)],
    &[("chart", |toolchain, _show| chart::part(toolchain))],
    &[("image", |toolchain, _show| image::part(toolchain))],
];

pub(crate) fn run(toolchain: &Toolchain) -> Result<ExitCode> {
    let mut sum = Tally::default();
    let mut report = String::new();
    for row in PARTS {
        for (name, tally, took) in side_by_side(toolchain, row)? {
            report += &line(name, &tally, took);
            sum += tally;
        }
    }
    print!("\n{report}");
    Ok(sum.report())
}

/// The name of each part, its tests and how long it took.
fn side_by_side(
    toolchain: &Toolchain,
    row: &'static [(&'static str, Part)],
) -> Result<Vec<(&'static str, Tally, Duration)>> {
    let Some((first, others)) = row.split_first() else { return Ok(Vec::new()) };
    let names: Vec<_> = row.iter().map(|(name, _)| *name).collect();
    println!("\n== {}", names.join(", and beside it: "));
    thread::scope(|scope| {
        let others: Vec<_> = others
            .iter()
            .map(|part| {
                scope.spawn(|| {
                    let mut shown = Vec::new();
                    (one(toolchain, part, &mut shown), shown)
                })
            })
            .collect();
        let mut done = vec![one(toolchain, first, &mut stdout())];
        for (other, name) in others.into_iter().zip(&names[1..]) {
            println!("\n== {name}");
            let Ok((result, shown)) = other.join() else { anyhow::bail!("{name} panicked") };
            stdout().write_all(&shown)?;
            done.push(result);
        }
        Ok(done)
    })
}

fn one(
    toolchain: &Toolchain,
    (name, part): &(&'static str, Part),
    show: &mut dyn Write,
) -> (&'static str, Tally, Duration) {
    let start = Instant::now();
    let tally = part(toolchain, show).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::failure(format!("{name}: {error:#}"))
    });
    (name, tally, start.elapsed())
}

fn line(name: &str, tally: &Tally, took: Duration) -> String {
    let end = if tally.failed == 0 { "ok" } else { "FAILED" };
    let Tally { passed, failed, skipped, .. } = *tally;
    let tests = if passed + skipped == 0 && failed <= 1 { String::new() } else { tally.to_string() };
    let line = format!("{name:8} {end:6} {:6.1} s  {tests}", took.as_secs_f64());
    format!("{}\n", line.trim_end())
}

fn setup(toolchain: &Toolchain, _show: &mut dyn Write) -> Result<Tally> {
    setup::run(toolchain)?;
    Ok(Tally::default())
}

fn format(toolchain: &Toolchain, _show: &mut dyn Write) -> Result<Tally> {
    check(toolchain.cargo().args(["fmt", "--all", "--check"]))
}

fn lints(toolchain: &Toolchain, _show: &mut dyn Write) -> Result<Tally> {
    let mut clippy = toolchain.cargo();
    clippy.args(["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"]);
    check(&mut clippy)?;
    check(compile::object_cargo(toolchain, "clippy").args(["--", "--deny", "warnings"]))
}

fn check(command: &mut Command) -> Result<Tally> {
    succeed(command)?;
    Ok(Tally::default())
}

fn layers(toolchain: &Toolchain, _show: &mut dyn Write) -> Result<Tally> {
    layers::run(toolchain.root())?;
    Ok(Tally::default())
}

fn all_tests(toolchain: &Toolchain, _show: &mut dyn Write) -> Result<Tally> {
    Ok(test::run(toolchain, Scope::All, None))
}

fn demonstrate(toolchain: &Toolchain, show: &mut dyn Write) -> Result<Tally> {
    program(toolchain, ("demo", &[]), show)
}

/// What fails is run again with the seed that it printed.
fn soak(toolchain: &Toolchain, show: &mut dyn Write) -> Result<Tally> {
    program(toolchain, ("soak", &["--minutes", "10"].map(str::to_owned)), show)
}

/// A program of bpf-tests that counts its checks.
fn program(toolchain: &Toolchain, (name, args): (&str, &[String]), show: &mut dyn Write) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut command = demo::command(toolchain, name, args)?;
    let done = test::stream(&mut command, show, |line| {
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
