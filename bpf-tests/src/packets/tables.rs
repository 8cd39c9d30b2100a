//! What the tables hold, as lines of text: rows by what they mean, without the numbers that one run gives and another
//! does not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::Result;
use ferroflow::maps::{
    Backends, Endpoints, Frontends, Maps, Masquerades, NodeAddresses, Services, SettingsRow, Slots,
    SourceRanges,
};
use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::abi::node::NodeAddress;
use ferroflow_common::addr::Addr;

/// Sorted lines.
///
/// ```text
/// 10.96.0.10:80/TCP -> default/web:http: 10.244.1.2:8080 10.244.2.2:8080
/// node-v4:30080/TCP internal north-south -> default/web:http: refuses
/// backend 10.244.1.2:8080 of default/web:http: cluster local
/// source 203.0.113.0/24 of default/web:http: allowed
/// pod 10.244.1.2
/// node 192.168.5.1: node-ports
/// ```
///
/// # Errors
/// Where the tables cannot be read.
pub fn lines<M: Maps>(maps: &M) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let services: BTreeMap<u32, String> = maps
        .dump::<Services>()?
        .into_iter()
        .map(|(id, name)| (id, name.as_str().unwrap_or_default().to_owned()))
        .collect();
    let name = |id: u32| services.get(&id).cloned().unwrap_or_else(|| format!("service {id}"));
    for (key, row) in maps.dump::<Frontends>()? {
        lines.push(frontend(maps, &key, &row, &name(row.service))?);
    }
    for index in 0..maps.len::<Backends>().min(BACKENDS) {
        let row = maps.read::<Backends>(index)?;
        if row.flags & Backend::LIVE != 0 {
            let sets = named(
                row.flags.into(),
                &[(Backend::CLUSTER.into(), "cluster"), (Backend::LOCAL.into(), "local")],
            );
            lines.push(format!("backend {} of {}:{sets}", socket(&row), name(row.service)));
        }
    }
    for (key, allowed) in maps.dump::<SourceRanges>()? {
        let bits = key.bits - 32 - if key.data.addr.is_v4() { 96 } else { 0 };
        let verdict = if allowed == 1 { "allowed" } else { "denied" };
        lines.push(format!("source {}/{bits} of {}: {verdict}", key.data.addr.ip(), name(key.data.service)));
    }
    lines.extend(maps.dump::<Endpoints>()?.into_iter().map(|(addr, _)| format!("pod {}", addr.ip())));
    for (addr, row) in maps.dump::<NodeAddresses>()? {
        let ports = if row.flags & NodeAddress::NODE_PORTS != 0 { ": node-ports" } else { "" };
        lines.push(format!("node {}{ports}", addr.ip()));
    }
    let own = maps.read::<Masquerades>(0)?;
    for addr in [own.v4, own.v6].into_iter().filter(|addr| *addr != Addr::UNSPECIFIED) {
        lines.push(format!("masquerade {}", addr.ip()));
    }
    let settings = maps.read::<SettingsRow>(0)?;
    let ranges = settings.ranges.iter().filter(|range| range.used != 0).count();
    lines.push(format!("service ranges: {ranges}"));
    lines.sort();
    Ok(lines)
}

/// So many rows of backends are looked at: more than a scenario has.
const BACKENDS: u32 = 1_024;

fn frontend<M: Maps>(maps: &M, key: &FrontendKey, row: &Frontend, service: &str) -> Result<String> {
    if key.is_cluster_ip() {
        return Ok(format!("{} is a cluster IP", key.addr.ip()));
    }
    let addr = match key.addr {
        FrontendKey::NODE_V4 => format!("node-v4:{}", key.port.host()),
        FrontendKey::NODE_V6 => format!("node-v6:{}", key.port.host()),
        addr => SocketAddr::new(addr.ip(), key.port.host()).to_string(),
    };
    let scope = if key.scope == FrontendKey::INTERNAL { " internal" } else { "" };
    let flags = named(
        row.flags,
        &[
            (Frontend::LOCAL, "local"),
            (Frontend::NORTH_SOUTH, "north-south"),
            (Frontend::KEEP_CLIENT, "keeps-client"),
            (Frontend::SOURCE_RANGES, "source-ranges"),
            (Frontend::MAGLEV, "maglev"),
        ],
    );
    let affinity = if row.affinity == 0 { String::new() } else { format!(" affinity {}", row.affinity) };
    let mut to = BTreeSet::new();
    for slot in row.offset..row.offset + row.length {
        to.insert(socket(&maps.read::<Backends>(maps.read::<Slots>(slot)?)?));
    }
    let to = match (to.is_empty(), row.flags & Frontend::REJECT != 0) {
        (true, true) => "refuses".to_owned(),
        (true, false) => "drops".to_owned(),
        (false, _) => to.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
    };
    Ok(format!("{addr}/{}{scope}{flags}{affinity} -> {service}: {to}", key.proto))
}

fn socket(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.addr.ip(), backend.port.host())
}

/// The names of the bits that are set, each after a space.
fn named(bits: u32, names: &[(u32, &str)]) -> String {
    names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| format!(" {name}")).collect()
}
