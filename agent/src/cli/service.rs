//! `ferroflow service list`.

use std::collections::HashMap;
use std::net::SocketAddr;

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::addr::{Addr, Port};
use serde::Serialize;

use super::table::table;
use super::{Answer, CliError};
use crate::maps::kernel::KernelMaps;
use crate::maps::{Backends, Frontends, MapError, Maps as _, Services, Slots};

/// A frontend and where its connections go.
#[derive(Serialize)]
struct Row {
    service: String,
    frontend: SocketAddr,
    protocol: String,
    backends: Vec<SocketAddr>,
    /// What happens without backends: `reject` or `drop`.
    otherwise: &'static str,
}

pub(super) fn list(maps: &KernelMaps) -> Result<Answer, CliError> {
    let names: HashMap<u32, String> = maps
        .dump::<Services>()?
        .into_iter()
        .map(|(id, name)| (id, name.as_str().unwrap_or("(not UTF-8)").to_owned()))
        .collect();
    let mut rows = Vec::new();
    for (key, frontend) in maps.dump::<Frontends>()?.into_iter().filter(|(key, _)| !key.is_cluster_ip()) {
        rows.push(row(maps, &names, &key, &frontend)?);
    }
    rows.sort_by(|a, b| (&a.service, a.frontend, &a.protocol).cmp(&(&b.service, b.frontend, &b.protocol)));
    let lines = rows.iter().map(|row| {
        let backends: Vec<_> = row.backends.iter().map(SocketAddr::to_string).collect();
        let backends =
            if backends.is_empty() { format!("none: {}", row.otherwise) } else { backends.join(" ") };
        [row.service.clone(), row.frontend.to_string(), row.protocol.clone(), backends]
    });
    let table = table(["SERVICE", "FRONTEND", "PROTOCOL", "BACKENDS"], lines);
    Ok(Answer { table, json: serde_json::to_value(&rows)? })
}

fn row(
    maps: &KernelMaps,
    names: &HashMap<u32, String>,
    key: &FrontendKey,
    frontend: &Frontend,
) -> Result<Row, MapError> {
    let mut backends = Vec::new();
    for slot in frontend.offset..frontend.offset.saturating_add(frontend.length) {
        let Backend { addr, port, .. } = maps.read::<Backends>(maps.read::<Slots>(slot)?)?;
        backends.push(socket(addr, port));
    }
    backends.sort_unstable();
    // A backend with weight has several slots.
    backends.dedup();
    Ok(Row {
        service: names.get(&frontend.service).cloned().unwrap_or_else(|| format!("#{}", frontend.service)),
        frontend: socket(key.addr, key.port),
        protocol: key.proto.to_string(),
        backends,
        otherwise: if frontend.flags & Frontend::REJECT != 0 { "reject" } else { "drop" },
    })
}

pub(super) fn socket(addr: Addr, port: Port) -> SocketAddr {
    SocketAddr::new(addr.ip(), port.host())
}
