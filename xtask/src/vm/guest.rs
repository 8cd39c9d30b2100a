//! One run of a machine: starts QEMU, shows its console, counts the tests.

use std::fs::{self, File};
use std::io::stdout;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::test::{Reader, Tally, stream};

/// Runs it to its end. What it writes to its second serial port is in `returned`.
pub(super) fn run(boot: (&Path, &Path), returned: &Path, limit: Duration) -> Result<Tally> {
    let mut console = Console::default();
    let ended = stream(&mut command(boot, returned, limit), stdout(), |line| console.read(line))?;
    if !ended || !console.done {
        bail!("the machine did not get to the end, after {}", console.result());
    }
    Ok(console.result())
}

/// `boot` are the kernel and its first file system.
fn command((vmlinuz, initrd): (&Path, &Path), returned: &Path, limit: Duration) -> Command {
    let mut command = Command::new("timeout");
    command.args([
        "--kill-after=10",
        &limit.as_secs().to_string(),
        super::QEMU,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
    let accelerator = accelerator();
    command.args(["-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    // What the kernel does not know becomes the first process's environment.
    let patience = if accelerator == "tcg" { EMULATED } else { "1" };
    let append = format!("console=ttyS0 quiet panic=-1 BPF_TESTS_PATIENCE={patience}");
    command.arg("-kernel").arg(vmlinuz).arg("-initrd").arg(initrd).args(["-append", &append]);
    command.args(["-display", "none", "-serial", "stdio", "-serial"]);
    command.arg(format!("file:{}", returned.display())).stdin(Stdio::null());
    command
}

/// Hardware where the processor says that it has some: a machine may have /dev/kvm and nothing behind it.
fn accelerator() -> &'static str {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = processor.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag));
    if capable && File::options().read(true).write(true).open("/dev/kvm").is_ok() { "kvm" } else { "tcg" }
}

const MEMORY: &str = "2G";
/// So many times as long as on a real machine the tests wait.
const EMULATED: &str = "20";

/// What the lines of the console say; see bpf_tests::vm.
#[derive(Default)]
struct Console {
    tests: Reader,
    /// Among the passed.
    skips: usize,
    done: bool,
}

impl Console {
    fn read(&mut self, line: &str) {
        let line = line.trim_end();
        self.tests.read(line);
        self.skips += usize::from(line.starts_with("SKIP "));
        if let Some((name, code)) = line.strip_prefix("vm: ").and_then(|rest| rest.split_once(" ended with "))
        {
            // The harness's own line has counted what failed, where it came to write one.
            let tally = &mut self.tests.tally;
            let counted = tally.failed > 0 && code == "101";
            match (code, counted) {
                ("0", _) if name == "verify" => tally.passed += 1,
                ("0", _) | (_, true) => {}
                _ => *tally += Tally::failure(format!("{name} in the machine ended with {code}")),
            }
        }
        self.done |= line == "vm: done";
    }

    /// These kernels lack nothing that a test here needs: what is skipped all the same is a failure.
    fn result(self) -> Tally {
        let Self { tests: Reader { mut tally, .. }, skips, .. } = self;
        tally.passed = tally.passed.saturating_sub(skips);
        tally.failed += skips;
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str]) -> String {
        let mut console = Console::default();
        lines.iter().for_each(|line| console.read(line));
        console.result().to_string()
    }

    #[test]
    fn results_and_skips_of_the_console_are_counted() {
        let lines = [
            "vm: verify ended with 0\r\n",
            "SKIP associations: no SCTP\r\n",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\r\n",
            "vm: wire ended with 0\r\n",
        ];
        assert_eq!(tally(&lines), "3 passed, 1 failed");
        assert_eq!(tally(&["vm: verify ended with 1\r\n"]), "0 passed, 1 failed");
        let failed = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(tally(&[failed, "vm: wire ended with 101"]), "3 passed, 2 failed");
    }
}
