//! How fast and how small the agent is: from a cold start to tables that are in sync, and from one change to the next.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ferroflow::{
    config::{Attach, Bpffs, Masquerade, SocketLb, Xdp},
    datapath::{self, Datapath, Options, Sources},
    maps::{self, kernel::KernelMaps},
    model::Change,
    reconcile::{Config, Limits, Reconciler},
    watch::{
        Event, Source as _,
        file::{FileSource, Timing},
    },
};
use ferroflow_common::{abi::state::AgentState, addr::Addr};

use super::{
    arena::Arena,
    scale::{Scale, changed_address},
};
use crate::{agent::Agent, sandbox::Sandbox};

/// Of the real agent, in its own process.
#[derive(Debug)]
pub(super) struct Life {
    /// From its start to tables in sync with the files.
    pub(super) cold_start: Duration,
    pub(super) memory_in_sync: f64,
    pub(super) memory_after_changes: f64,
    /// From the write of a file to a change of the tables.
    pub(super) changes: Vec<Duration>,
}

/// Of the agent's stages in this process, so that a clock can stand between them.
#[derive(Debug)]
pub(super) struct Stages {
    /// From files to objects.
    pub(super) reading: Duration,
    /// From objects to tables.
    pub(super) programming: Duration,
    /// From one changed object to tables.
    pub(super) changes: Vec<Duration>,
}

const SYNC_LIMIT: Duration = Duration::from_secs(90);
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
/// What the directory waits for further changes.
pub(super) fn settling() -> Duration {
    Timing::default().settle
}

/// Starts an agent on the first node, cold, and changes one endpoint again and again.
pub(super) fn life(arena: &mut Arena, scale: &Scale, changes: u8) -> Result<Life> {
    let node = &arena.cluster.nodes()[0];
    let tables = node.bpffs.join("maps");
    let start = Instant::now();
    let room = scale.max_endpoints().to_string();
    arena.agents.push(Agent::start(node, &["--routing", "native", "--max-endpoints", &room])?);
    let agent = arena.agents.last().context("no agent")?;
    wait_in_sync(agent, &tables)?;
    let cold_start = start.elapsed();
    let memory_in_sync = megabytes(agent)?;
    let maps = KernelMaps::open(&tables)?;
    let mut took = Vec::new();
    for version in 1..=changes {
        let before = settled(&maps)?;
        let start = Instant::now();
        scale.change(arena.cluster.manifests(), version)?;
        while maps.agent_state()?.writes == before.writes {
            ensure!(start.elapsed() < CHANGE_LIMIT, "a change is not seen within {CHANGE_LIMIT:?}");
            thread::sleep(Duration::from_micros(100));
        }
        took.push(start.elapsed());
    }
    let memory_after_changes = megabytes(agent)?;
    Ok(Life { cold_start, memory_in_sync, memory_after_changes, changes: took })
}

/// Until an agent says of itself that its tables are what its sources say.
pub(super) fn wait_in_sync(agent: &Agent, tables: &Path) -> Result<AgentState> {
    let deadline = Instant::now() + SYNC_LIMIT;
    loop {
        // Before its first start there are no tables.
        if let Ok(state) = KernelMaps::open(tables).and_then(|maps| maps.agent_state())
            && state.synced == 1
        {
            ensure!(state.rejected == 0, "{} documents are rejected\n{}", state.rejected, agent.log_tail());
            return Ok(state);
        }
        if Instant::now() > deadline {
            bail!("not in sync within {SYNC_LIMIT:?}\n{}", agent.log_tail());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// In sync, and so for some time.
fn settled(maps: &KernelMaps) -> Result<AgentState> {
    let deadline = Instant::now() + CHANGE_LIMIT;
    loop {
        let before = maps.agent_state()?;
        thread::sleep(Duration::from_millis(10));
        let state = maps.agent_state()?;
        if state == before && state.synced == 1 {
            return Ok(state);
        }
        ensure!(Instant::now() < deadline, "the tables do not settle");
    }
}

fn megabytes(agent: &Agent) -> Result<f64> {
    Ok(agent.memory_kib("VmRSS")? as f64 * 1024.0 / 1e6)
}

/// Reads, plans and writes what the agent of the first node would.
pub(super) fn stages(sandbox: &Sandbox, arena: &Arena, scale: &Scale, changes: u8) -> Result<Stages> {
    let node = &arena.cluster.nodes()[0];
    let start = Instant::now();
    let objects = read(&node.manifests, &node.name)?;
    let reading = start.elapsed();

    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    let options = Options {
        bpffs: bpffs.clone(),
        socket_lb: SocketLb::Tcp,
        attach: Attach::Auto,
        xdp: Xdp::Off,
        masquerade: Masquerade::Off,
        sources: Sources::Any,
        tunnel_port: None,
        max_endpoints: scale.max_endpoints(),
        log_drops: false,
    };
    let _programs = Datapath::load(datapath::embedded_object()?, options)?;
    let mut reconciler = reconciler(&bpffs, &node.name)?;
    let changing = changing(&objects, scale)?;
    let start = Instant::now();
    for change in objects {
        reconciler.handle(change, start);
    }
    reconciler.synced();
    write_all(&mut reconciler)?;
    let programming = start.elapsed();

    let mut took = Vec::new();
    for version in 1..=changes {
        let change = changed(changing.clone(), version)?;
        let writes = reconciler.stats().writes;
        let start = Instant::now();
        reconciler.handle(change, start);
        write_all(&mut reconciler)?;
        took.push(start.elapsed());
        ensure!(reconciler.stats().writes > writes, "a change wrote nothing");
    }
    Ok(Stages { reading, programming, changes: took })
}

fn read(manifests: &Path, node: &str) -> Result<Vec<Change>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (sender, mut events) = tokio::sync::mpsc::channel(1024);
        let source = tokio::spawn(FileSource::new(manifests, node, Timing::default()).run(sender));
        let mut changes = Vec::new();
        while let Some(event) = events.recv().await {
            match event {
                Event::Change(change) => changes.push(change),
                Event::Problems(problems) => {
                    let first = problems.first().map(ToString::to_string).unwrap_or_default();
                    bail!("{} bad documents; {first}", problems.len());
                }
                Event::Contact(_) | Event::Triggered { .. } => {}
                Event::Synced => break,
            }
        }
        source.abort();
        Ok(changes)
    })
}

fn reconciler(bpffs: &Bpffs, node: &str) -> Result<Reconciler<KernelMaps>> {
    let tables = KernelMaps::open(&bpffs.maps())?;
    let limits = Limits {
        services: tables.capacity::<maps::Services>()?,
        frontends: tables.capacity::<maps::Frontends>()?,
    };
    let plan = ferroflow::plan::Config::default();
    let config = Config { node: node.into(), limits, plan, grace: Duration::from_secs(2), clock: || 0 };
    Ok(Reconciler::restore(tables, &config, Instant::now())?)
}

pub(super) fn write_all(reconciler: &mut Reconciler<KernelMaps>) -> Result<()> {
    while reconciler.stats().pending > 0 {
        reconciler.tick(Instant::now());
    }
    if let Some((key, error)) = reconciler.failing().next() {
        bail!("{key} (and perhaps more): {error}");
    }
    Ok(())
}

/// The slice that changes, as it was read.
fn changing(objects: &[Change], scale: &Scale) -> Result<Change> {
    let service = &scale.changing().name;
    let is_it = |change: &&Change| matches!(change, Change::EndpointSlice(_, Some(slice)) if &*slice.service == service.as_str());
    objects.iter().find(is_it).cloned().with_context(|| format!("no endpoints of {service} were read"))
}

fn changed(mut change: Change, version: u8) -> Result<Change> {
    if let Change::EndpointSlice(_, Some(slice)) = &mut change
        && let Some(last) = slice.endpoints.last_mut()
    {
        last.addr = Addr::v4(changed_address(version).octets());
        return Ok(change);
    }
    bail!("the slice that is to change has no endpoints")
}
