//! Runs the tests and sums what the test binaries print.
//!
//! A test that cannot run on this machine appends a line `SKIP name: reason` to the file that `BPF_TESTS_SKIPPED`
//! names, and returns. The test harness counts it as passed; here it is taken out of the passed and into the skipped.

use std::fs;
use std::io::{BufRead, BufReader, Write, stdout};
use std::ops::AddAssign;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::toolchain::Toolchain;

#[derive(Clone, Copy)]
pub(crate) enum Scope {
    /// What needs neither root nor a BPF linker.
    Unit,
    All,
}

/// How many tests ended how. Displayed: the closing line.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// What failed, in its own words.
    pub(crate) failures: Vec<String>,
}

impl Tally {
    /// Something that is no test, which could not be done.
    pub(crate) fn failure(words: String) -> Self {
        Self { failed: 1, failures: vec![words], ..Self::default() }
    }

    /// Of one line `test result: ok. 3 passed; 0 failed; 1 ignored; ..`, zero of any other.
    pub(crate) fn of_line(line: &str) -> Self {
        let Some((_, counts)) = line.split_once("test result: ") else { return Self::default() };
        let count = |what: &str| {
            let number = counts.split_once(what).and_then(|(before, _)| before.trim_end().rsplit(' ').next());
            number.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        let failures = Vec::new();
        Self { passed: count("passed"), failed: count("failed;"), skipped: count("ignored"), failures }
    }

    /// The harness counted each of these as passed.
    fn skip(&mut self, tests: usize) {
        self.passed = self.passed.saturating_sub(tests);
        self.skipped += tests;
    }

    /// Prints what failed, far below which the run may have gone on, and the closing line.
    pub(crate) fn report(self) -> ExitCode {
        for words in &self.failures {
            println!("\nFAILED {}", words.trim_end());
        }
        println!("\n{self}");
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }
}

impl std::iter::Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            sum += tally;
            sum
        })
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// Runs all tests, also after one failed. A step that could not run counts as one failure.
pub(crate) fn run(toolchain: &Toolchain, scope: Scope, filter: Option<&str>) -> Tally {
    let mut tally = or_failed(units(toolchain, filter));
    if matches!(scope, Scope::All) {
        tally += or_failed(kernel(toolchain, filter));
    }
    tally
}

fn or_failed(step: Result<Tally>) -> Tally {
    step.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::failure(format!("{error:#}"))
    })
}

/// The default members' unit and doc tests.
fn units(toolchain: &Toolchain, filter: Option<&str>) -> Result<Tally> {
    cargo_test(toolchain.cargo().args(["test", "--locked", "--no-fail-fast", "--"]).args(filter), stdout())
}

/// The programs in this machine's kernel.
fn kernel(toolchain: &Toolchain, filter: Option<&str>) -> Result<Tally> {
    let built = compile::run(toolchain, Profile::Dev)?;
    let list = toolchain.target("bpf-tests-skipped");
    fs::write(&list, "").with_context(|| format!("cannot write {}", list.display()))?;
    let mut cargo = built.cargo(toolchain, "test")?;
    cargo.env("BPF_TESTS_SKIPPED", &list).args(["--no-fail-fast", "--"]).args(filter);
    let mut tally = cargo_test(&mut cargo, stdout())?;
    let skips = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let skips = skips.lines().filter(|line| line.starts_with("SKIP ")).inspect(|line| println!("{line}"));
    tally.skip(skips.count());
    Ok(tally)
}

/// Runs `cargo test`. What fails without a test having failed, a build or a crash, is one failure.
pub(crate) fn cargo_test(cargo: &mut Command, show: impl Write) -> Result<Tally> {
    let mut reader = Reader::default();
    let done = stream(cargo, show, |line| reader.read(line))?;
    if !done && reader.tally.failed == 0 {
        reader.tally += Tally::failure("without a test having failed: see its error above".to_owned());
    }
    Ok(reader.tally)
}

/// Reads what programs of tests print, line by line.
#[derive(Default)]
pub(crate) struct Reader {
    pub(crate) tally: Tally,
    /// Lines that are still taken down of the last failure.
    left: usize,
}

impl Reader {
    /// Of each failure: an agent's log may follow.
    const LINES: usize = 40;

    pub(crate) fn read(&mut self, line: &str) {
        self.tally += Tally::of_line(line);
        if let Some(name) = line.strip_prefix("---- ") {
            self.tally.failures.push(format!("{}\n", name.trim_end().trim_end_matches('-').trim_end()));
            self.left = Self::LINES;
        } else if line.trim_end() == "failures:" {
            self.left = 0;
        } else if let (Some(last), 1..) = (self.tally.failures.last_mut(), self.left) {
            *last += line.trim_end();
            last.push('\n');
            self.left -= 1;
        }
    }
}

/// Copies a command's output to `show` as it comes, and gives each line to `see`. Returns whether the command succeeded.
pub(crate) fn stream(command: &mut Command, mut show: impl Write, mut see: impl FnMut(&str)) -> Result<bool> {
    let program = command.get_program().to_owned();
    let cannot = || format!("cannot run {}", program.display());
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(cannot)?;
    let mut lines = BufReader::new(child.stdout.take().with_context(cannot)?);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).with_context(cannot)? > 0 {
        show.write_all(&line).context("cannot show what it prints")?;
        see(&String::from_utf8_lossy(&line));
        line.clear();
    }
    Ok(child.wait().with_context(cannot)?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed() {
        let mut tally = Tally::default();
        for line in [
            "running 4 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: \x1b[31mFAILED\x1b(B\x1b[m. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            tally += Tally::of_line(line);
        }
        assert_eq!(tally, Tally { passed: 15, failed: 2, skipped: 1, failures: Vec::new() });
        assert_eq!(tally.to_string(), "15 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn what_failed_is_taken_down_to_a_length() {
        let mut reader = Reader::default();
        let log = "a line of its log\n".repeat(100);
        let text = format!(
            "\nfailures:\n\n---- one ----\nno answer\n\n---- two ----\n{log}\nfailures:\n    one\n    two\n"
        );
        text.split_inclusive('\n').for_each(|line| reader.read(line));
        let [one, two] = &*reader.tally.failures else { panic!("{:?}", reader.tally) };
        assert_eq!(one, "one\nno answer\n\n");
        assert_eq!(two.lines().count(), 1 + Reader::LINES);
    }

    #[test]
    fn skips_come_out_of_the_passed() {
        let mut tally = Tally { passed: 3, ..Tally::default() };
        tally.skip(2);
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn a_run_that_dies_without_a_result_is_a_failure() {
        let tally = |script| cargo_test(Command::new("sh").args(["-c", script]), Vec::new()).unwrap();
        let line = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored'";
        assert_eq!(tally(line).to_string(), "1 passed, 0 failed");
        assert_eq!(tally(&format!("{line}; exit 101")).to_string(), "1 passed, 1 failed");
    }
}
