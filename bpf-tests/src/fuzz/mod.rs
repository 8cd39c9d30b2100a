//! Bytes that nobody should send, at everything that reads bytes from outside.
//!
//! ```text
//!  corpus/ (packets, documents, requests) ─▶ mutate ─┬─▶ programs:  packets, through every program of the kernel
//!                                                    ├─▶ documents: YAML, through source, plan and tables
//!                                                    └─▶ requests:  lines, at the socket of a real agent
//! ```
//! Each target counts what it executes. A run is repeated by its seed; the test of `tests/fuzz.rs` is a short one, and
//! `cargo xtask fuzz --minutes N` as long a one as is wanted.

mod documents;
mod mutate;
mod programs;
mod requests;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::unistd::geteuid;

use crate::packets::node;
use crate::sandbox::Sandbox;

/// Feeds mutated packets, documents and requests to the programs, the directory source and an agent's socket.
#[derive(Debug, Parser)]
#[command(name = "fuzz")]
struct Cli {
    /// How long, over all targets
    #[arg(long, default_value_t = 1, value_name = "N")]
    minutes: u64,
    /// Another one gives other bytes; that of a run that failed, the same
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// When a target is to end.
#[derive(Clone, Copy, Debug)]
pub enum Effort {
    Executions(u64),
    Until(Instant),
}

impl Effort {
    fn goes_on(self, executed: u64) -> bool {
        match self {
            Self::Executions(wanted) => executed < wanted,
            Self::Until(end) => Instant::now() < end,
        }
    }
}

/// What a target did.
#[derive(Clone, Debug)]
pub struct Report {
    pub target: &'static str,
    pub executions: u64,
    /// What became of the input, by kind.
    pub outcomes: Vec<(&'static str, u64)>,
}

pub fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fuzz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(geteuid().is_root(), "network namespaces and BPF programs need root");
    let sandbox = Sandbox::enter()?;
    sandbox.exit_on_signals()?;
    for (target, begin) in TARGETS {
        let share = Duration::from_secs(cli.minutes * 60) / TARGETS.len() as u32;
        let report = begin(&sandbox, cli.seed, Effort::Until(Instant::now() + share))
            .with_context(|| format!("{target}, --seed {}", cli.seed))?;
        println!("{report}");
    }
    println!("fuzz: nothing found");
    Ok(())
}

type Target = fn(&Sandbox, u64, Effort) -> Result<Report>;

const TARGETS: [(&str, Target); 3] =
    [("programs", programs), ("documents", documents), ("requests", requests::run)];

/// Packets through every program, on a node with services and flows.
///
/// # Errors
/// What a program made of a packet that it should not have, with the packet.
pub fn programs(sandbox: &Sandbox, seed: u64, effort: Effort) -> Result<Report> {
    let place = sandbox.place()?;
    let (here, _others) = node::namespace()?;
    here.run(move |_| programs::run(&place, seed, effort))?
}

/// YAML through the directory source and what follows it.
///
/// # Errors
/// What the source did not say, with where the document is kept.
pub fn documents(sandbox: &Sandbox, seed: u64, effort: Effort) -> Result<Report> {
    documents::run(&sandbox.place()?.dir, seed, effort)
}

/// Lines at the socket of a real agent.
///
/// # Errors
/// What the agent did not answer, with the line; or that it died.
pub fn requests(sandbox: &Sandbox, seed: u64, effort: Effort) -> Result<Report> {
    requests::run(sandbox, seed, effort)
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { target, executions, outcomes } = self;
        write!(f, "{target}: {executions} executions")?;
        outcomes.iter().try_for_each(|(kind, count)| write!(f, ", {count} {kind}"))
    }
}

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
}
