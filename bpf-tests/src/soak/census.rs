//! What there is of everything that may leak.

use std::{collections::BTreeMap, fmt, fs};

use anyhow::Result;
use ferroflow::maps::{
    Backends, Endpoints, Frontends, HashTable, Ipcache, IpcacheRanges, Maps as _, NodeAddresses, PeerClasses,
    Policy, PolicySets, Services, SourceRanges, Tunnels, kernel::KernelMaps,
};
use ferroflow_common::abi::lb::Backend;

use super::churn::Churn;
use crate::{agent::Agent, cluster::Node, cni::Runtime};

/// By node and thing.
#[derive(Debug)]
pub(super) struct Census {
    /// These are the same whenever the cluster is.
    counts: BTreeMap<(String, &'static str), usize>,
    /// Open files of the agents.
    files: BTreeMap<String, usize>,
    /// Memory of the agents' own, in KiB: shown, and not judged.
    memory: BTreeMap<String, u64>,
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

    /// The first thing of the agents that became more.
    pub(super) fn grew(&self, base: &Self) -> Option<String> {
        for (node, files) in &self.files {
            let before = base.files.get(node).copied().unwrap_or_default();
            if *files > before {
                return Some(format!("open files of {node}: {files}, not {before}"));
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
        self.memory.insert(node.name.clone(), agent.memory_kib("RssAnon")?);
        Ok(())
    }
}

fn rows<T: HashTable>(maps: &KernelMaps) -> Result<(&'static str, usize)> {
    Ok((T::NAME, maps.dump::<T>()?.len()))
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (node, files) in &self.files {
            let of_node = self.counts.iter().filter(|((of, _), count)| of == node && **count > 0);
            let counts: Vec<_> = of_node.map(|((_, what), count)| format!("{what} {count}")).collect();
            let memory = self.memory.get(node).copied().unwrap_or_default();
            writeln!(f, "  {node}: {}; open files {files}, memory {memory} KiB", counts.join(", "))?;
        }
        Ok(())
    }
}
