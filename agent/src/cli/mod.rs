//! The verbs that look into the pinned maps. They need no agent: what they show is what the programs use. And the one
//! that clears up after kube-proxy.

mod cleanup;
mod conntrack;
mod map;
mod policy;
mod service;
mod status;
mod table;

use std::io::Write;

use clap::{Args, Subcommand};

use crate::config::{Output, Query};
use crate::kube_proxy::{Mode, ToolError};
use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;

/// What can be asked.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Whether the agent runs, how full the tables are, and what was dropped
    Status(Query),
    /// Services as the programs see them
    #[command(subcommand)]
    Service(ServiceVerb),
    /// Policies of this node's pods, as the programs see them
    #[command(subcommand)]
    Policy(PolicyVerb),
    /// Tracked connections
    #[command(subcommand)]
    Conntrack(ConntrackVerb),
    /// The maps themselves
    #[command(subcommand)]
    Map(MapVerb),
    /// Remove the rules that kube-proxy left in the kernel, and nothing else
    ///
    /// To move a node from kube-proxy without losing a connection: start the agent beside it, stop kube-proxy, wait until
    /// the connections that it opened have ended (new ones are the agent's), then run this. Connections that still go
    /// through its rules then lose their way. Removed are the chains of kube-proxy in every iptables table (both kinds,
    /// IPv4 and IPv6) with the jumps into them, and its nftables tables; the kubelet's own chains stay. It needs root, the
    /// host's network namespace, and `nft` and `iptables` where their rules are to be found. A second run finds nothing.
    Cleanup(Cleanup),
}

#[derive(Args, Debug)]
pub struct Cleanup {
    /// Only print what would be removed
    #[arg(long)]
    dry_run: bool,

    /// Format of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Subcommand, Debug)]
pub enum ServiceVerb {
    /// Every frontend with its backends
    List(Query),
}

#[derive(Subcommand, Debug)]
pub enum PolicyVerb {
    /// Every policy set with the pods that have it
    List(Query),
    /// What becomes of a new flow of a pod, and why
    Explain(policy::Question),
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
    let (output, answer): (Output, Answer) = match verb {
        Verb::Status(query) => (query.output, status::status(query)?),
        Verb::Service(ServiceVerb::List(query)) => (query.output, service::list(&open(query)?)?),
        Verb::Policy(PolicyVerb::List(query)) => (query.output, policy::list(&open(query)?)?),
        Verb::Policy(PolicyVerb::Explain(question)) => {
            (question.query.output, policy::explain(&open(&question.query)?, question)?)
        }
        Verb::Conntrack(ConntrackVerb::List(query)) => (query.output, conntrack::list(&open(query)?)?),
        Verb::Map(MapVerb::Dump { name, query }) => (query.output, map::dump(&open(query)?, name)?),
        Verb::Cleanup(Cleanup { dry_run, output }) => {
            let mode = if *dry_run { Mode::DryRun } else { Mode::Remove };
            (*output, cleanup::cleanup(mode)?)
        }
    };
    let text = match output {
        Output::Table => answer.table,
        Output::Json => serde_json::to_string_pretty(&answer.json)?,
    };
    // A reader that has seen enough (`| head`) closes the pipe: no error of ours.
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
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
    #[error(
        "{addr} is no pod of this node, or its interface is not known yet: `ferroflow policy list` has them"
    )]
    NoPod { addr: std::net::IpAddr },
    #[error("there is no map `{name}`: ask for one of {known}")]
    NoMap { name: String, known: String },
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
