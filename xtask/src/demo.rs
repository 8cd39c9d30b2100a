//! Builds programs of bpf-tests, such as the demo, and runs them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::compile::{self, Built, Profile};
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, name: &str, args: &[String]) -> Result<ExitCode> {
    let mut command = command(toolchain, name, args)?;
    let status =
        command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The built program, ready to start. Only it needs root: nothing is built as root unless xtask runs so.
pub(crate) fn command(toolchain: &Toolchain, name: &str, args: &[String]) -> Result<Command> {
    let built = compile::run(toolchain, Profile::Dev)?;
    succeed(built.cargo(toolchain, "build")?.args(["--bin", name]))
        .with_context(|| format!("{name} does not build"))?;
    let program = built.program(toolchain, name)?;
    if !is_root()? {
        bail!("{}", needs_root(&built, name, &program.display().to_string(), args));
    }
    let mut command = Command::new(program);
    command.args(args).current_dir(toolchain.root()).envs(built.env());
    Ok(command)
}

fn needs_root(built: &Built, name: &str, program: &str, args: &[String]) -> String {
    let env = built.env().map(|(name, path)| format!("{name}={}", path.display())).join(" ");
    let command = format!("sudo {env} {program} {}", args.join(" "));
    format!(
        "{name} makes namespaces and loads BPF programs, which needs root. All is built; run it with:\n  {}",
        command.trim_end()
    )
}

/// The owner of a process's folder is its effective user.
fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("/proc is not mounted; mount it")?.uid() == 0)
}
