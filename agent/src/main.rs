//! The one binary, `ferroflow`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ferroflow::{cli, config, daemon};
use tracing_subscriber::EnvFilter;

/// The Kubernetes network in Rust and eBPF
///
/// `ferroflow agent` runs on every node and programs the kernel; the other verbs look into what the kernel has, also
/// when no agent runs.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve a node: load the programs, attach them, and keep the tables in line with the objects
    Agent(config::Agent),
    #[command(flatten)]
    Query(cli::Verb),
}

fn main() -> ExitCode {
    let outcome = match Command::parse().verb {
        Verb::Agent(config) => agent(&config),
        Verb::Query(verb) => cli::run(&verb).map_err(Into::into),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The alternative form has the causes on the same line.
            eprintln!("ferroflow: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The client of the Kubernetes API calls every fault an error; the source says which matter.
const LOG: &str = "info,kube_client=off";

fn agent(config: &config::Agent) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("FERROFLOW_LOG").unwrap_or_else(|_unset| EnvFilter::new(LOG));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(daemon::run(config))?)
}
