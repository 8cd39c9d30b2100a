//! Sweeping flows that were idle longer than they live. The programs take no notice of them and the kernel reuses the
//! oldest when a table is full; the sweep keeps the tables' fill an honest figure.
//!
//! It also ends flows whose client is known to the other end by an address that the node had and has no longer (its lease
//! ran out, it was moved): no answer would come, and a client with one port, as of UDP, would go on for ever. The next packet
//! opens the flow anew, by the address that the node has now. The kernel's own masquerade does the same at once
//! (`net/netfilter/nf_nat_masquerade.c`); here the address has to be gone at two sweeps in a row, so that one that comes back
//! costs nothing.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::addr::{Addr, Proto};
use ferroflow_common::tcp::State;
use tokio::sync::watch;

use crate::clock;
use crate::heap;
use crate::maps::kernel::{Fate, KernelMaps, Sweep};
use crate::maps::{Backends, ConnectionCounts, MapError, Maps as _, NodeAddresses};

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

/// Addresses that stand for clients, and that the node did not have at the last sweep.
pub type Lost = BTreeSet<Addr>;

/// Sweeps the tables under `maps` for as long as it is polled, on a thread of its own: a large table takes a while.
pub async fn run(maps: PathBuf, swept: watch::Sender<Swept>) {
    let mut lost = Lost::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let (dir, mut before) = (maps.clone(), std::mem::take(&mut lost));
        let work = move || {
            let swept = sweep(&mut KernelMaps::open(&dir)?, &mut before);
            // What reading whole tables took, and whatever else is free by now.
            heap::give_back();
            swept.map(|swept| (swept, before))
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(([v4, v6], now_lost))) => {
                tracing::debug!(?v4, ?v6, "swept the connection tables");
                if v4.ended + v6.ended > 0 {
                    let entries = v4.ended + v6.ended;
                    tracing::info!(entries, "ended flows by addresses that this node has no longer");
                }
                let left = |sweep: Sweep| sweep.seen - sweep.deleted;
                swept.send_modify(|swept| {
                    swept.left = Some(Entries { v4: left(v4), v6: left(v6) });
                    swept.deleted += v4.deleted + v6.deleted;
                });
                lost = now_lost;
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the connection tables"),
            Err(error) => tracing::error!(%error, "a sweep ended early"),
        }
    }
}

/// Both families once, IPv4 first; and what the programs counted of each backend's connections is made true. `lost` is what
/// the sweep before left there.
///
/// # Errors
/// The kernel's refusal.
pub fn sweep(maps: &mut KernelMaps, lost: &mut Lost) -> Result<[Sweep; 2], MapError> {
    let now = clock::seconds();
    let mut counts = vec![0; maps.len::<ConnectionCounts>() as usize];
    // In their order: flows ask for them in none.
    let generations = (0..maps.len::<Backends>()).map(|index| Ok(maps.read::<Backends>(index)?.generation));
    let generations = generations.collect::<Result<Vec<_>, MapError>>()?;
    forget_own(maps, lost)?;
    let mut seen = Lost::new();
    let mut judge = |proto, entry: &Entry, ends: [Addr; 2]| {
        let stand_in = stand_in(entry, ends);
        seen.extend(stand_in);
        if stand_in.is_some_and(|addr| lost.contains(&addr)) {
            return Fate::Ends;
        }
        let serves = generations.get(entry.backend as usize) == Some(&entry.generation);
        let open = entry.kind == Entry::FORWARD && !(proto == Proto::TCP && State(entry.state).closed());
        if let Some(count) = counts.get_mut(entry.backend as usize).filter(|_| serves && open) {
            *count += 1;
        }
        Fate::Stays
    };
    let v4 = maps.sweep_conntrack::<[u8; 4]>(now, |tuple, entry| {
        judge(tuple.proto, entry, [tuple.src, tuple.dst].map(Addr::v4))
    })?;
    let v6 = maps.sweep_conntrack::<[u8; 16]>(now, |tuple, entry| {
        judge(tuple.proto, entry, [tuple.src, tuple.dst].map(Addr::v6))
    })?;
    // After the flows: an address that came meanwhile is not lost.
    forget_own(maps, &mut seen)?;
    *lost = seen;
    for (index, count) in (0..).zip(counts) {
        if maps.read::<ConnectionCounts>(index)? != count {
            maps.write::<ConnectionCounts>(index, &count)?;
        }
    }
    Ok([v4, v6])
}

/// Takes out what the node has now.
fn forget_own(maps: &KernelMaps, addresses: &mut Lost) -> Result<(), MapError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let own = maps.dump::<NodeAddresses>()?;
    // A table without room may lack some.
    if own.len() >= maps.capacity::<NodeAddresses>()? as usize {
        addresses.clear();
    }
    for (addr, _) in own {
        addresses.remove(&addr);
    }
    Ok(())
}

/// The address by which the other end knows the client of a flow, where that is neither the client's own nor the one that
/// the client asked: it is one of this node's, or was. `ends` are the source and the destination of the entry's tuple.
fn stand_in(entry: &Entry, [src, dst]: [Addr; 2]) -> Option<Addr> {
    if entry.flags & (Entry::PLAIN | Entry::RELAYS | Entry::RELAYED) != 0 {
        return None;
    }
    let (client, known, asked) =
        if entry.kind == Entry::FORWARD { (src, entry.src, dst) } else { (entry.dst, dst, entry.src) };
    (known != client && known != asked).then_some(known)
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    const POD: Addr = Addr::v4([10, 244, 1, 2]);
    const NODE: Addr = Addr::v4([192, 168, 50, 1]);
    const SERVICE: Addr = Addr::v4([10, 96, 0, 10]);
    const BACKEND: Addr = Addr::v4([10, 244, 2, 2]);

    /// What stands for the client in both directions of a flow whose backend knows the client by this address.
    fn of(client: Addr, asked: Addr, backend: Addr, known: Addr, flags: u8) -> [Option<Addr>; 2] {
        let entry = |kind, src, dst| Entry { kind, src, dst, flags, ..Entry::new_zeroed() };
        let forward = stand_in(&entry(Entry::FORWARD, known, backend), [client, asked]);
        [forward, stand_in(&entry(Entry::REPLY, asked, client), [backend, known])]
    }

    #[test]
    fn both_directions_of_a_masqueraded_flow_name_the_node() {
        assert_eq!(of(POD, SERVICE, BACKEND, NODE, Entry::OWN_SOURCE), [Some(NODE); 2]);
        let world = Addr::v4([203, 0, 113, 1]);
        assert_eq!(of(POD, world, world, NODE, Entry::MASQUERADED), [Some(NODE); 2]);
        let known_by_itself = of(POD, SERVICE, BACKEND, POD, 0);
        assert_eq!(known_by_itself, [None; 2]);
        let its_own_backend = of(POD, SERVICE, POD, SERVICE, 0);
        assert_eq!(its_own_backend, [None; 2], "the frontend's address is no node's");
        assert_eq!(of(POD, SERVICE, BACKEND, NODE, Entry::RELAYS), [None; 2], "a number of a node");
        assert_eq!(of(POD, BACKEND, BACKEND, POD, Entry::PLAIN), [None; 2]);
    }
}
