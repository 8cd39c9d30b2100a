//! Builds what the demo shows and runs it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::compile::{self, Built, Profile};
use crate::toolchain::{Toolchain, succeed};

pub(crate) fn run(toolchain: &Toolchain, args: &[String]) -> Result<ExitCode> {
    let mut demo = command(toolchain, args)?;
    let status = demo.status().with_context(|| format!("cannot start {}", demo.get_program().display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The built demo, ready to start. Only the demo itself needs root: nothing is built as root unless xtask runs so.
pub(crate) fn command(toolchain: &Toolchain, args: &[String]) -> Result<Command> {
    let built = compile::run(toolchain, Profile::Dev)?;
    succeed(built.cargo(toolchain, "build")?.args(["--bin", "demo"])).context("the demo does not build")?;
    let program = built.program(toolchain, "demo")?;
    if !is_root()? {
        bail!("{}", needs_root(&built, &program.display().to_string(), args));
    }
    let mut demo = Command::new(program);
    demo.args(args).current_dir(toolchain.root()).envs(built.env());
    Ok(demo)
}

fn needs_root(built: &Built, program: &str, args: &[String]) -> String {
    let env = built.env().map(|(name, path)| format!("{name}={}", path.display())).join(" ");
    let command = format!("sudo {env} {program} {}", args.join(" "));
    format!(
        "the demo makes network namespaces and loads BPF programs, which needs root. All is built; run it with:\n  {}",
        command.trim_end()
    )
}

/// The owner of a process's folder is its effective user.
fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("/proc is not mounted; mount it")?.uid() == 0)
}
