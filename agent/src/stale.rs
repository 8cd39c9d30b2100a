//! Connected datagram sockets of the host whose backend stopped serving (rules 31 to 33).
//!
//! The socket programs send what the host's processes connect straight to a backend, and the kernel asks no program for
//! what a connected socket sends. So the programs note such sockets, and the agent takes them from backends that are
//! gone: it looks whenever it has written to the tables, and every [`INTERVAL`] for a socket that was being connected
//! meanwhile. Their owners are told so at once, ECONNABORTED where they wait for an answer and EDESTADDRREQ where they send,
//! and connect again, to a backend that serves.
//!
//! Only the host has such sockets: what pods connect is left to the packet path, which moves a flow at its next packet.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ferroflow_common::abi::lb::Backend;
use ferroflow_common::abi::socket::Translation;
use tokio::sync::Notify;

use crate::maps::kernel::KernelMaps;
use crate::maps::{Backends, ConnectedSockets, MapError, Maps};
use crate::net::sockets::{self, Connected};

/// Between two looks without a reason: the table has room for those that are connected meanwhile.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks whenever it is told that the tables under `maps` have changed, for as long as it is polled.
pub async fn run(maps: PathBuf, changed: Arc<Notify>) {
    let mut refused = None;
    let mut closed = BTreeSet::new();
    loop {
        // That nobody told it is a reason, too.
        let _told = tokio::time::timeout(INTERVAL, changed.notified()).await;
        let (dir, before) = (maps.clone(), std::mem::take(&mut closed));
        let swept = tokio::task::spawn_blocking(move || {
            sweep(&mut KernelMaps::open(&dir)?, &before, sockets::connected, sockets::disconnect)
        });
        let error = match swept.await {
            Ok(Ok(swept)) => {
                if swept.taken > 0 {
                    let count = swept.taken;
                    tracing::info!(count, "took datagram sockets of the host from backends that are gone");
                }
                closed = swept.closed;
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = &error
            && refused.as_ref() != Some(error)
        {
            tracing::warn!(
                %error,
                "cannot take connected datagram sockets of the host from backends that are gone: their processes must \
                 connect again by themselves (it needs the capability NET_ADMIN, and a kernel with \
                 CONFIG_INET_DIAG_DESTROY and the module udp_diag)"
            );
        }
        refused = error;
    }
}

/// What a look has come to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Swept {
    /// Sockets that were taken from their backends.
    taken: usize,
    /// Sockets that were noted and are not connected; or not yet.
    closed: BTreeSet<u64>,
}

/// Takes sockets from their backends where those are gone, and forgets sockets that are closed: what was so at the look
/// `before` and still is.
fn sweep(
    maps: &mut impl Maps,
    before: &BTreeSet<u64>,
    list: impl FnOnce() -> io::Result<Vec<Connected>>,
    disconnect: impl Fn(&Connected) -> io::Result<()>,
) -> Result<Swept, StaleError> {
    let noted = maps.dump::<ConnectedSockets>()?;
    // Most hosts have none at most times.
    if noted.is_empty() {
        return Ok(Swept::default());
    }
    let connected = list().map_err(StaleError::List)?;
    let connected: BTreeMap<_, _> = connected.into_iter().map(|socket| (socket.cookie, socket)).collect();
    let mut swept = Swept::default();
    for (cookie, translation) in noted {
        let Some(socket) = connected.get(&cookie) else {
            if before.contains(&cookie) {
                maps.delete::<ConnectedSockets>(&cookie)?;
            } else {
                swept.closed.insert(cookie);
            }
            continue;
        };
        if is_stale(socket, &translation, maps.read::<Backends>(translation.index).ok()) {
            let peer = socket.peer.ip();
            disconnect(socket).map_err(|source| StaleError::Disconnect { peer, source })?;
            swept.taken += 1;
        }
    }
    Ok(swept)
}

/// Whether the socket is where it was sent through a service, and that is a backend no longer.
fn is_stale(socket: &Connected, through: &Translation, backend: Option<Backend>) -> bool {
    let there = socket.peer == through.backend && socket.port == through.backend_port;
    there && backend.is_none_or(|backend| backend.generation != through.generation)
}

#[derive(Debug, thiserror::Error)]
enum StaleError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot list sockets: {0}")]
    List(io::Error),
    #[error("cannot disconnect a socket from {peer}: {source}")]
    Disconnect { peer: IpAddr, source: io::Error },
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use ferroflow_common::addr::{Addr, Port};
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::maps::fake::{FakeMaps, Search, Sizes};

    const POD: Addr = Addr::v4([10, 244, 1, 2]);
    const DNS: Port = Port::new(5353);

    /// Backend 1 serves in its third generation; sockets 1 and up went to it, in these generations.
    fn maps(generations: &[u32]) -> FakeMaps {
        let mut maps = FakeMaps::new(Sizes { hash: 8, slots: 1, backends: 2 }, Search::Never);
        let backend = Backend { addr: POD, port: DNS, generation: 3, ..Backend::new_zeroed() };
        maps.write::<Backends>(1, &backend).unwrap();
        for (cookie, &generation) in (1..).zip(generations) {
            let through = Translation {
                backend: POD,
                backend_port: DNS,
                index: 1,
                generation,
                ..Translation::new_zeroed()
            };
            maps.put::<ConnectedSockets>(&cookie, &through).unwrap();
        }
        maps
    }

    /// What a look takes of these sockets, and what it finds closed.
    fn look(maps: &mut FakeMaps, before: &[u64], sockets: &[(u64, Addr)]) -> (Vec<u64>, Vec<u64>) {
        let taken = RefCell::new(Vec::new());
        let list = || Ok(sockets.iter().map(|&(cookie, peer)| Connected::of(cookie, peer, DNS)).collect());
        let take = |socket: &Connected| {
            taken.borrow_mut().push(socket.cookie);
            Ok(())
        };
        let swept = sweep(maps, &before.iter().copied().collect(), list, take).unwrap();
        let taken = taken.into_inner();
        assert_eq!(swept.taken, taken.len());
        (taken, swept.closed.into_iter().collect())
    }

    #[test]
    fn rule_31_a_socket_is_taken_from_a_backend_of_another_generation() {
        let mut maps = maps(&[3, 2]);
        assert_eq!(look(&mut maps, &[], &[(1, POD), (2, POD), (9, POD)]), (vec![2], vec![]));
    }

    #[test]
    fn a_socket_that_is_connected_to_something_else_is_left_alone() {
        let elsewhere = Addr::v4([10, 244, 9, 9]);
        assert_eq!(look(&mut maps(&[2]), &[], &[(1, elsewhere)]), (vec![], vec![]));
    }

    #[test]
    fn what_is_closed_at_two_looks_is_forgotten() {
        let mut maps = maps(&[3, 2]);
        assert_eq!(look(&mut maps, &[], &[(1, POD)]), (vec![], vec![2]));
        assert_eq!(maps.dump::<ConnectedSockets>().unwrap().len(), 2, "it may not be connected yet");
        assert_eq!(look(&mut maps, &[2], &[(1, POD)]), (vec![], vec![]));
        assert_eq!(maps.dump::<ConnectedSockets>().unwrap().len(), 1);
    }

    #[test]
    fn where_none_is_noted_none_is_listed() {
        let never = || panic!("nobody asks");
        let swept = sweep(&mut maps(&[]), &BTreeSet::new(), never, |_socket| Ok(())).unwrap();
        assert_eq!(swept, Swept::default());
    }
}
