//! What there is of everything that may leak.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ferroflow::maps::{
    Backends, Endpoints, Frontends, HashTable, Ipcache, IpcacheRanges, Maps as _, NodeAddresses, PeerClasses,
    Policy, PolicySets, Services, SourceRanges, Tunnels, kernel::KernelMaps,
};
use ferroflow_common::abi::lb::Backend;

use super::churn::Churn;
use crate::{agent::Agent, cluster::Node, cni::Runtime, metrics::scrape};

/// By node and thing.
#[derive(Debug)]
pub(super) struct Census {
    /// These are the same whenever the cluster is.
    counts: BTreeMap<(String, &'static str), usize>,
    /// Open files of the agents, by kind.
    files: BTreeMap<String, BTreeMap<String, usize>>,
    /// What the agents have allocated, in bytes, and what is resident of their own, in KiB.
    memory: BTreeMap<String, (u64, u64)>,
}

impl Census {
    pub(super) fn take(churn: &Churn) -> Result<Self> {
        let mut census = Self { counts: BTreeMap::new(), files: BTreeMap::new(), memory: BTreeMap::new() };
        let world = &churn.world;
        for ((node, agent), runtime) in world.cluster.nodes().iter().zip(&world.agents).zip(&churn.runtimes) {
            census.count(node, runtime)?;
            census.measure(node, agent)?;
        }
        Ok(census)
    }

    /// The first thing of which there is another number.
    pub(super) fn differs(&self, base: &Self) -> Option<String> {
        let other = self.counts.iter().find(|(key, count)| base.counts.get(key) != Some(count));
        other.map(|((node, what), count)| {
            let before = base.counts.get(&(node.clone(), what)).copied().unwrap_or_default();
            format!("{what} of {node}: {count}, not {before}")
        })
    }

    /// By node: what its agent has allocated, in bytes.
    pub(super) fn heap(&self) -> impl Iterator<Item = (&String, u64)> {
        self.memory.iter().map(|(node, (heap, _))| (node, *heap))
    }

    /// How many kinds of things are counted.
    pub(super) fn kinds(&self) -> usize {
        self.counts.keys().map(|(_, what)| *what).collect::<BTreeSet<_>>().len()
    }

    /// The first thing of the agents that became more.
    pub(super) fn grew(&self, base: &Self) -> Option<String> {
        for (node, files) in &self.files {
            let Some(before) = base.files.get(node) else {
                return Some(format!("open files of {node}, which nobody counted before"));
            };
            let (now, then): (usize, usize) = (files.values().sum(), before.values().sum());
            if now > then {
                return Some(format!("open files of {node}: {now} ({files:?}), not {then} ({before:?})"));
            }
        }
        None
    }

    fn count(&mut self, node: &Node, runtime: &Runtime) -> Result<()> {
        let maps = KernelMaps::open(&node.bpffs.join("maps"))?;
        let links = node.netns.interfaces()?.iter().filter(|name| name.starts_with("ff")).count();
        let mut live = 0;
        for index in 1..maps.len::<Backends>() {
            live += usize::from(maps.read::<Backends>(index)?.flags & Backend::LIVE != 0);
        }
        for (what, count) in [
            rows::<Frontends>(&maps)?,
            rows::<Services>(&maps)?,
            rows::<SourceRanges>(&maps)?,
            rows::<Endpoints>(&maps)?,
            rows::<NodeAddresses>(&maps)?,
            rows::<Tunnels>(&maps)?,
            rows::<Ipcache>(&maps)?,
            rows::<IpcacheRanges>(&maps)?,
            rows::<Policy>(&maps)?,
            rows::<PolicySets>(&maps)?,
            rows::<PeerClasses>(&maps)?,
            ("backends", live),
            ("leases", runtime.leases()?.len()),
            ("removals that wait", runtime.spooled()),
            ("interfaces of pods", links),
            ("pinned links", fs::read_dir(node.bpffs.join("links"))?.count()),
            ("pinned maps", fs::read_dir(node.bpffs.join("maps"))?.count()),
        ] {
            self.counts.insert((node.name.clone(), what), count);
        }
        Ok(())
    }

    fn measure(&mut self, node: &Node, agent: &Agent) -> Result<()> {
        self.files.insert(node.name.clone(), agent.open_files()?);
        // What is under way at the moment of one reading is not at another.
        let mut least = u64::MAX;
        for _ in 0..READINGS {
            let heap = scrape(node)?.get("ferroflow_heap_bytes").copied();
            least = least.min(heap.context("the agent does not say what it has allocated")? as u64);
            thread::sleep(Duration::from_millis(100));
        }
        self.memory.insert(node.name.clone(), (least, agent.memory_kib("RssAnon")?));
        Ok(())
    }
}

/// Entries of flows in the tables of a node.
pub(super) fn flows(node: &Node) -> Result<usize> {
    let maps = KernelMaps::open(&node.bpffs.join("maps"))?;
    Ok(maps.conntrack::<[u8; 4]>()?.len() + maps.conntrack::<[u8; 16]>()?.len())
}

const READINGS: u32 = 3;

fn rows<T: HashTable>(maps: &KernelMaps) -> Result<(&'static str, usize)> {
    Ok((T::NAME, maps.dump::<T>()?.len()))
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (node, files) in &self.files {
            let of_node = self.counts.iter().filter(|((of, _), count)| of == node && **count > 0);
            let counts: Vec<_> = of_node.map(|((_, what), count)| format!("{what} {count}")).collect();
            let (heap, own) = self.memory.get(node).copied().unwrap_or_default();
            let heap = heap / 1024;
            let counts = counts.join(", ");
            let files: usize = files.values().sum();
            writeln!(f, "  {node}: {counts}; open files {files}, allocated {heap} KiB, resident {own} KiB")?;
        }
        Ok(())
    }
}
