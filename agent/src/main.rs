//! The one binary, `ferroflow`.

use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ferroflow::cni::plugin;
use ferroflow::{cli, config, daemon, health, heap};
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
    Agent(Box<config::Agent>),
    /// Answer healthCheckNodePort from a file of the agent, which starts this by itself
    #[command(hide = true)]
    Health(health::answering::Options),
    /// Attach a pod to the network: what container runtimes run (CNI specification 1.1.0)
    ///
    /// The command is in the environment (CNI_COMMAND: ADD, DEL, CHECK, GC, STATUS or VERSION), the network
    /// configuration on standard input. The result, or an error with its code, is JSON on standard output. The same
    /// binary under the name `ferroflow-cni` does this without the verb.
    Cni,
    #[command(flatten)]
    Query(cli::Verb),
}

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    match Path::new(&called).file_name().and_then(|name| name.to_str()) {
        Some(plugin::NAME) => return plugin::main(),
        Some(plugin::LOOPBACK) => return plugin::loopback(),
        Some(_) | None => {}
    }
    let outcome = match Command::parse().verb {
        Verb::Agent(config) => agent(&config),
        Verb::Health(options) => health(&options),
        Verb::Cni => return plugin::main(),
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
    heap::share();
    Ok(runtime()?.block_on(daemon::run(config))?)
}

fn health(options: &health::answering::Options) -> anyhow::Result<()> {
    Ok(runtime()?.block_on(health::answering::run(options))?)
}

/// With the log on standard error.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let filter = EnvFilter::try_from_env("FERROFLOW_LOG").unwrap_or_else(|_unset| EnvFilter::new(LOG));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
