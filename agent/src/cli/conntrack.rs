//! `ferroflow conntrack list`.

use std::net::SocketAddr;

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::lb::Backend;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::tcp::State;
use serde::Serialize;

use super::service::socket;
use super::table::table;
use super::{Answer, CliError};
use crate::clock;
use crate::maps::kernel::KernelMaps;
use crate::maps::{Backends, Maps as _};

/// A flow by its first packet. One of no service, which is there for the policies of its ends, has its destination for
/// a frontend and for a backend.
#[derive(Serialize)]
struct Row {
    protocol: String,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    /// Whom the backend sees: the client, or what stands in for it.
    seen: SocketAddr,
    state: &'static str,
    /// Seconds until an idle flow is gone.
    expires: u32,
    /// `false` where the backend stopped serving since: the next packet of a UDP flow moves.
    backend_serves: bool,
}

pub(super) fn list(maps: &KernelMaps) -> Result<Answer, CliError> {
    let now = clock::seconds();
    let v4 =
        maps.conntrack::<[u8; 4]>()?.into_iter().map(|(tuple, entry)| row::<V4>(maps, &tuple, &entry, now));
    let v6 =
        maps.conntrack::<[u8; 16]>()?.into_iter().map(|(tuple, entry)| row::<V6>(maps, &tuple, &entry, now));
    let mut rows: Vec<Row> = v4.chain(v6).flatten().collect();
    rows.sort_by_key(|row| (row.client, row.frontend));
    let lines = rows.iter().map(|row| {
        [
            row.protocol.clone(),
            row.client.to_string(),
            row.frontend.to_string(),
            if row.backend_serves { row.backend.to_string() } else { format!("{} (gone)", row.backend) },
            row.seen.to_string(),
            row.state.to_owned(),
            format!("{}s", row.expires),
        ]
    });
    let table = table(["PROTOCOL", "CLIENT", "FRONTEND", "BACKEND", "SEEN AS", "STATE", "EXPIRES"], lines);
    Ok(Answer { table, json: serde_json::to_value(&rows)? })
}

/// `None` for the reply half of a flow and for what has expired.
fn row<F: Family>(maps: &KernelMaps, tuple: &Tuple<F::Bytes>, entry: &Entry, now: u32) -> Option<Row> {
    if entry.kind != Entry::FORWARD || entry.expires < now {
        return None;
    }
    let plain = entry.flags & Entry::PLAIN != 0;
    let backend = if plain { None } else { maps.read::<Backends>(entry.backend).ok() };
    Some(Row {
        protocol: tuple.proto.to_string(),
        client: socket(F::addr(tuple.src), tuple.src_port),
        frontend: socket(F::addr(tuple.dst), tuple.dst_port),
        backend: socket(entry.dst, entry.dst_port),
        seen: socket(entry.src, entry.src_port),
        state: State(entry.state).name(tuple.proto),
        expires: entry.expires - now,
        backend_serves: plain
            || backend.is_some_and(|Backend { generation, .. }| generation == entry.generation),
    })
}
