//! Starts programs of bpf-tests that need root. Nothing is built as root unless xtask runs so.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::compile::Built;
use crate::toolchain::Toolchain;

/// A built program, ready to start.
pub(crate) fn command(toolchain: &Toolchain, built: &Built, name: &str, args: &[String]) -> Result<Command> {
    let program = built.program(name);
    if !is_root()? {
        let env = built.env().map(|(name, path)| format!("{name}={}", path.display())).join(" ");
        let command = format!("sudo {env} {} {}", program.display(), args.join(" "));
        bail!(
            "the {name} makes network namespaces and loads BPF programs, which needs root. All is built; run it with:\n  {}",
            command.trim_end()
        );
    }
    let mut command = Command::new(program);
    command.args(args).current_dir(toolchain.root()).envs(built.env());
    Ok(command)
}

/// Its exit code is ours.
pub(crate) fn run(mut command: Command) -> Result<ExitCode> {
    let status =
        command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The owner of a process's folder is its effective user.
fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("/proc is not mounted; mount it")?.uid() == 0)
}
