//! The verbs that look into the pinned maps. They need no agent: what they show is what the programs use. And those about
//! the machine, before and after an agent.

mod conntrack;
mod map;
mod node;
mod service;
mod status;
mod table;

use std::io::Write;

use clap::Subcommand;

use crate::config::{Output, Query};
use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::node::prepare::{Prepare, PrepareError};
use crate::node::remove::RemoveError;

/// What can be asked.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Whether the agent runs, how full the tables are, and what was dropped
    Status(Query),
    /// Services as the programs see them
    #[command(subcommand)]
    Service(ServiceVerb),
    /// Tracked connections
    #[command(subcommand)]
    Conntrack(ConntrackVerb),
    /// The maps themselves
    #[command(subcommand)]
    Map(MapVerb),
    /// Say what of this machine stands in the agent's way, and what to do about it; exits with 1 where a check fails
    Doctor(node::Doctor),
    /// Ready a machine for the agent: mount the BPF file system, install the network plugin
    Prepare(Prepare),
    /// Remove everything of Ferroflow from this machine, as root in the host's network namespace, once the agent has ended
    ///
    /// Services and policies stop working, and pods that Ferroflow attached lose their network. What others made stays;
    /// so do kernel settings such as forwarding, which others may rely on. A second run finds nothing.
    Cleanup(node::Cleanup),
}

#[derive(Subcommand, Debug)]
pub enum ServiceVerb {
    /// Every frontend with its backends
    List(Query),
}

#[derive(Subcommand, Debug)]
pub enum ConntrackVerb {
    /// Every flow that is tracked, by its first packet
    List(Query),
}

#[derive(Subcommand, Debug)]
pub enum MapVerb {
    /// One map's rows with their field names, as JSON
    Dump {
        /// frontends, slots, backends, services, endpoints, conntrack_v4 or conntrack_v6
        name: String,
        #[command(flatten)]
        query: Query,
    },
}

/// Answers on standard output.
///
/// # Errors
/// [`CliError`], in words for the person who asked.
pub fn run(verb: &Verb) -> Result<(), CliError> {
    let mut failed = 0;
    let mut count = |(answer, failures)| {
        failed = failures;
        answer
    };
    let (output, answer): (Output, Answer) = match verb {
        Verb::Status(query) => (query.output, status::status(query)?),
        Verb::Service(ServiceVerb::List(query)) => (query.output, service::list(&open(query)?)?),
        Verb::Conntrack(ConntrackVerb::List(query)) => (query.output, conntrack::list(&open(query)?)?),
        Verb::Map(MapVerb::Dump { name, query }) => (query.output, map::dump(&open(query)?, name)?),
        Verb::Doctor(asked) => (asked.query.output, count(node::doctor(asked)?)),
        Verb::Prepare(asked) => (Output::Table, node::prepare(asked)?),
        Verb::Cleanup(asked) => (asked.query.output, count(node::cleanup(asked)?)),
    };
    let text = match output {
        Output::Table => answer.table,
        Output::Json => serde_json::to_string_pretty(&answer.json)?,
    };
    // A reader that has seen enough (`| head`) closes the pipe: no error of ours.
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    if failed == 0 { Ok(()) } else { Err(CliError::Failed { failed }) }
}

/// One answer in both forms.
struct Answer {
    table: String,
    json: serde_json::Value,
}

fn open(query: &Query) -> Result<KernelMaps, CliError> {
    Ok(KernelMaps::open(&query.bpffs.maps())?)
}

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    Remove(#[from] RemoveError),
    #[error("{failed} failed")]
    Failed { failed: usize },
    #[error("there is no map `{name}`: ask for one of {known}")]
    NoMap { name: String, known: String },
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
