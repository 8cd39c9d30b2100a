//! Sweeping flows that were idle longer than they live. The programs take no notice of them and the kernel reuses the
//! oldest when a table is full; the sweep keeps the tables' fill an honest figure.

use std::path::PathBuf;
use std::time::Duration;

use crate::clock;
use crate::maps::MapError;
use crate::maps::kernel::{KernelMaps, Sweep};

/// Between two sweeps: the shortest lifetime of a flow.
const INTERVAL: Duration = Duration::from_secs(10);

/// Sweeps the tables under `maps` for as long as it is polled, on a thread of its own: a large table takes a while.
pub async fn run(maps: PathBuf) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let dir = maps.clone();
        match tokio::task::spawn_blocking(move || sweep(&KernelMaps::open(&dir)?)).await {
            Ok(Ok(Sweep { seen, deleted })) => tracing::debug!(seen, deleted, "swept the connection tables"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the connection tables"),
            Err(error) => tracing::error!(%error, "a sweep ended early"),
        }
    }
}

/// Both families once.
///
/// # Errors
/// The kernel's refusal.
pub fn sweep(maps: &KernelMaps) -> Result<Sweep, MapError> {
    let now = clock::seconds();
    let v4 = maps.sweep_conntrack::<[u8; 4]>(now)?;
    let v6 = maps.sweep_conntrack::<[u8; 16]>(now)?;
    Ok(Sweep { seen: v4.seen + v6.seen, deleted: v4.deleted + v6.deleted })
}
