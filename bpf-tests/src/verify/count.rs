//! How many instructions the verifier processes, on every kernel.
//!
//! Kernels before 5.16 tell it only in the verifier's log, and aya shows that log only of a load that failed. So each
//! load is made to fail at its last step, after verifier and compiler: the process may open no further file, and the
//! program, which is in the kernel by then, gets no descriptor.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use aya::programs::{Program, ProgramError};
use ferroflow::datapath;
use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};

use crate::{
    run::{Constants, Programs},
    sandbox::Sandbox,
};

/// Verified instructions by program.
pub(super) type Counts = BTreeMap<String, u32>;

/// Of every program, with these load-time constants. The error names all programs that the kernel refuses, and why.
pub(super) fn counts(sandbox: &Sandbox, constants: Constants) -> Result<Counts> {
    let mut datapath = Programs::create(&sandbox.place()?, constants)?;
    let (mut counts, mut refused) = (Counts::new(), Vec::new());
    for (name, program) in datapath.programs().programs_mut() {
        match count(program) {
            Ok(count) => _ = counts.insert(name.to_owned(), count),
            Err(error) => refused.push(format!("{name}: {error:#}")),
        }
    }
    if !refused.is_empty() {
        bail!("{constants}: {} refused\n{}", refused.len(), refused.join("\n"));
    }
    Ok(counts)
}

fn count(program: &mut Program) -> Result<u32> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).context("set the limit of open files")?;
    let loaded = datapath::load_program(program);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).context("restore the limit of open files")?;
    match loaded {
        Err(ProgramError::LoadError { io_error, verifier_log })
            if io_error.raw_os_error() == Some(Errno::EMFILE as i32) =>
        {
            let log = verifier_log.to_string();
            processed(&log).with_context(|| format!("the verifier's log has no count: {log}"))
        }
        Err(error) => Err(error.into()),
        Ok(()) => bail!("the program was loaded without a descriptor for it"),
    }
}

/// Of the line `processed 12835 insns (limit 1000000) max_states_per_insn 4 ..`.
fn processed(log: &str) -> Option<u32> {
    let (_, rest) = log.rsplit_once("processed ")?;
    rest.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_in_the_last_lines() {
        let log = "verification time 31 usec\nstack depth 296+16\nprocessed 12835 insns (limit 1000000) max_states 4\n";
        assert_eq!(processed(log), Some(12_835));
        assert_eq!(processed("R3 offset is outside of the packet\n"), None);
    }
}
