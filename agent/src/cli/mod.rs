//! The verbs that look into the pinned maps. They need no agent: what they show is what the programs use. And those about
//! the machine, before and after an agent.

mod cleanup;
mod conntrack;
mod explain;
mod map;
mod node;
mod policy;
mod service;
mod status;
mod table;

use std::io::Write;

use clap::Subcommand;

use crate::config::{Output, Query};
use crate::kube_proxy::ToolError;
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
    /// Policies of this node's pods, as the programs see them
    #[command(subcommand)]
    Policy(PolicyVerb),
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
    /// Remove the rules that kube-proxy left in the kernel, and nothing else; with `--all`, everything of Ferroflow instead
    ///
    /// To move a node from kube-proxy without losing a connection: start the agent beside it, stop kube-proxy, wait until
    /// the connections that it opened have ended (new ones are the agent's), then run this. Connections that still go
    /// through its rules then lose their way. Removed are the chains of kube-proxy in every iptables table (both kinds,
    /// IPv4 and IPv6) with the jumps into them, and its nftables tables; the kubelet's own chains stay. It needs root, the
    /// host's network namespace, and `nft` and `iptables` where their rules are to be found. A second run finds nothing.
    ///
    /// With `--all`, as root in the host's network namespace, once the agent has ended: services and policies stop
    /// working, and pods that Ferroflow attached lose their network. What others made stays; so do kernel settings such
    /// as forwarding, which others may rely on.
    Cleanup(node::Cleanup),
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
    /// What becomes of a new flow between two ends, and which rule of which policy says so
    Explain(explain::Question),
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
        Verb::Policy(PolicyVerb::List(query)) => (query.output, policy::list(&open(query)?)?),
        Verb::Policy(PolicyVerb::Explain(question)) => {
            (question.query.output, explain::explain(&open(&question.query)?, question)?)
        }
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
    #[error(
        "of {ends} none is a pod of this node with an interface that is known, or they have no family in common: ask on \
         the node of either"
    )]
    NoPod { ends: String },
    #[error("no pod has the name {name}: write NAMESPACE/NAME, or an address")]
    UnknownPod { name: String },
    #[error("{name} may be any of {found}: write NAMESPACE/NAME")]
    ManyPods { name: String, found: String },
    #[error(
        "the agent at {agent} does not say which pod {name} is: {source}; name it by its address, or see --agent"
    )]
    NoAgent { name: String, agent: std::net::SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    Remove(#[from] RemoveError),
    #[error("{failed} failed")]
    Failed { failed: usize },
    #[error("there is no map `{name}`: ask for one of {known}")]
    NoMap { name: String, known: String },
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
