//! `ferroflow status`.

use ferroflow_common::abi::lb::Backend;
use ferroflow_common::verdict::DropReason;
use serde::Serialize;

use super::table::table;
use super::{Answer, CliError, open};
use crate::clock;
use crate::config::Query;
use crate::lock::Lock;
use crate::maps::kernel::KernelMaps;
use crate::maps::{Backends, Endpoints, Frontends, MapError, Maps as _, Services};

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    agent: Agent,
    services: usize,
    frontends: usize,
    backends: usize,
    endpoints: usize,
    flows: usize,
    drops: Vec<Drops>,
    /// Packets that passed, and that policies in dry run would drop.
    would_drop: Vec<Drops>,
}

/// What the agent said last.
#[derive(Serialize)]
struct Agent {
    #[serde(flatten)]
    life: Life,
    /// The tables say what the objects say, or said when the agent died.
    synced: bool,
    node: String,
    version: String,
    pid: u32,
    /// Seconds since its start.
    age: u64,
    /// Table rows written since its start.
    writes: u64,
    /// Writes that failed and were tried again.
    retries: u64,
    /// Documents that are not served because they are bad.
    rejected: u32,
    /// For how many seconds the Kubernetes API has given no answers; what it said last is served meanwhile.
    api_away: Option<u64>,
    kube_proxy: OtherProxy,
    /// Ports for health checks that cannot be answered, and whether --run-dir keeps services' from being.
    health_problems: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum OtherProxy {
    Absent,
    Present,
}

/// Whether it lives now; the programs work without it.
#[derive(Serialize)]
struct Life {
    running: bool,
}

#[derive(Serialize)]
struct Drops {
    reason: &'static str,
    packets: u64,
}

pub(super) fn status(query: &Query) -> Result<Answer, CliError> {
    let maps = open(query)?;
    let agent = agent(&maps, Life { running: Lock::is_held(&query.bpffs.dir) })?;
    let drops = maps.drops()?.into_iter().filter(|(_, packets)| *packets > 0);
    let (would_drop, drops): (Vec<_>, Vec<_>) = drops.partition(|(reason, _)| reason.is_dry_run());
    let named = |(reason, packets): (DropReason, u64)| Drops { reason: reason.as_str(), packets };
    let status = Status {
        agent,
        services: maps.dump::<Services>()?.len(),
        frontends: maps.dump::<Frontends>()?.iter().filter(|(key, _)| !key.is_cluster_ip()).count(),
        backends: live_backends(&maps)?,
        endpoints: maps.dump::<Endpoints>()?.len(),
        flows: (maps.conntrack::<[u8; 4]>()?.len() + maps.conntrack::<[u8; 16]>()?.len()) / 2,
        drops: drops.into_iter().map(named).collect(),
        would_drop: would_drop.into_iter().map(named).collect(),
    };
    Ok(Answer { table: lines(&status), json: serde_json::to_value(&status)? })
}

fn lines(status: &Status) -> String {
    let Agent {
        life: Life { running },
        synced,
        node,
        version,
        pid,
        age,
        writes,
        retries,
        rejected,
        kube_proxy,
        health_problems,
        api_away,
    } = &status.agent;
    let running = match (running, synced) {
        (true, true) => format!("running (pid {pid}, for {age} s), in sync"),
        (true, false) => format!("running (pid {pid}, for {age} s), not yet in sync"),
        (false, _) => "not running; the programs go on with the tables as they are".to_owned(),
    };
    let mut lines = vec![
        ["node".to_owned(), node.clone()],
        ["version".to_owned(), version.clone()],
        ["services".to_owned(), format!("{} ({} frontends)", status.services, status.frontends)],
        ["backends".to_owned(), status.backends.to_string()],
        ["local pods".to_owned(), format!("{} addresses", status.endpoints)],
        ["flows".to_owned(), status.flows.to_string()],
        ["rows written".to_owned(), format!("{writes} since the agent's start, {retries} tried again")],
        ["rejected".to_owned(), format!("{rejected} documents")],
    ];
    if let Some(seconds) = api_away {
        let away = format!("no answers for {seconds} s; what it said last is served");
        lines.push(["Kubernetes API".to_owned(), away]);
    }
    if let OtherProxy::Present = kube_proxy {
        let what =
            "or its rules are here: what it opened is the kernel's to finish; then `ferroflow cleanup`";
        lines.push(["kube-proxy".to_owned(), what.to_owned()]);
    }
    if *health_problems > 0 {
        let what = format!(
            "{health_problems} cannot be answered (see the log): ports of others, or --run-dir is not writable"
        );
        lines.push(["health checks".to_owned(), what]);
    }
    let counted = |what: &str, drops: &Drops| {
        [format!("{what}: {}", drops.reason), format!("{} packets", drops.packets)]
    };
    lines.extend(status.drops.iter().map(|drops| counted("dropped", drops)));
    lines.extend(status.would_drop.iter().map(|drops| counted("would drop", drops)));
    table(["agent", &running], lines)
}

fn agent(maps: &KernelMaps, life: Life) -> Result<Agent, MapError> {
    let state = maps.agent_state()?;
    Ok(Agent {
        life,
        synced: state.synced != 0,
        node: text(&state.node),
        version: text(&state.version),
        pid: state.pid,
        age: u64::from(clock::seconds()).saturating_sub(state.started),
        writes: state.writes,
        retries: state.retries,
        rejected: state.rejected,
        health_problems: state.health_problems,
        kube_proxy: if state.kube_proxy == 0 { OtherProxy::Absent } else { OtherProxy::Present },
        api_away: (state.away_since != 0)
            .then(|| u64::from(clock::seconds()).saturating_sub(u64::from(state.away_since))),
    })
}

fn live_backends(maps: &KernelMaps) -> Result<usize, MapError> {
    let mut live = 0;
    for index in 1..maps.len::<Backends>() {
        let Backend { flags, .. } = maps.read::<Backends>(index)?;
        live += usize::from(flags & Backend::LIVE != 0);
    }
    Ok(live)
}

/// Text that ends with the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
