//! Sweeping flows that were idle longer than they live. The programs take no notice of them and the kernel reuses the
//! oldest when a table is full; the sweep keeps the tables' fill an honest figure.

use std::path::PathBuf;
use std::time::Duration;

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::addr::Proto;
use ferroflow_common::tcp::State;
use tokio::sync::watch;

use crate::clock;
use crate::heap;
use crate::maps::kernel::{KernelMaps, Sweep};
use crate::maps::{Backends, ConnectionCounts, MapError, Maps as _};

/// Between two sweeps: the shortest lifetime of a flow.
const INTERVAL: Duration = Duration::from_secs(10);

/// What sweeping has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// What the last sweep left, in entries; `None` before the first.
    pub left: Option<Entries>,
    /// Since this agent started.
    pub deleted: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    pub v4: u64,
    pub v6: u64,
}

/// Sweeps the tables under `maps` for as long as it is polled, on a thread of its own: a large table takes a while.
pub async fn run(maps: PathBuf, swept: watch::Sender<Swept>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let dir = maps.clone();
        let work = move || {
            let swept = sweep(&mut KernelMaps::open(&dir)?);
            // What reading whole tables took, and whatever else is free by now.
            heap::give_back();
            swept
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok([v4, v6])) => {
                tracing::debug!(?v4, ?v6, "swept the connection tables");
                let left = |sweep: Sweep| sweep.seen - sweep.deleted;
                swept.send_modify(|swept| {
                    swept.left = Some(Entries { v4: left(v4), v6: left(v6) });
                    swept.deleted += v4.deleted + v6.deleted;
                });
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the connection tables"),
            Err(error) => tracing::error!(%error, "a sweep ended early"),
        }
    }
}

/// Both families once, IPv4 first; and what the programs counted of each backend's connections is made true.
///
/// # Errors
/// The kernel's refusal.
pub fn sweep(maps: &mut KernelMaps) -> Result<[Sweep; 2], MapError> {
    let now = clock::seconds();
    let mut counts = vec![0; maps.len::<ConnectionCounts>() as usize];
    // In their order: flows ask for them in none.
    let generations = (0..maps.len::<Backends>()).map(|index| Ok(maps.read::<Backends>(index)?.generation));
    let generations = generations.collect::<Result<Vec<_>, MapError>>()?;
    let mut count = |proto, entry: &Entry| {
        let serves = generations.get(entry.backend as usize) == Some(&entry.generation);
        let closed = proto == Proto::TCP && State(entry.state).closed();
        if let Some(count) = counts.get_mut(entry.backend as usize).filter(|_| serves && !closed) {
            *count += 1;
        }
    };
    let v4 = maps.sweep_conntrack::<[u8; 4]>(now, |tuple, entry| count(tuple.proto, entry))?;
    let v6 = maps.sweep_conntrack::<[u8; 16]>(now, |tuple, entry| count(tuple.proto, entry))?;
    for (index, count) in (0..).zip(counts) {
        if maps.read::<ConnectionCounts>(index)? != count {
            maps.write::<ConnectionCounts>(index, &count)?;
        }
    }
    Ok([v4, v6])
}
