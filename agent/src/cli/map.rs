//! `ferroflow map dump`: the rows of a map with their field names, where bpftool is not at hand.

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::family::{Family, V4, V6};
use serde_json::{Value, json};

use super::{Answer, CliError};
use crate::maps::kernel::KernelMaps;
use crate::maps::{
    ArrayTable, Backends, Endpoints, Frontends, HashTable, MapError, Maps as _, RelayNodes, Services, Slots,
};

const CONNTRACK: [&str; 2] = ["conntrack_v4", "conntrack_v6"];

pub(super) fn dump(maps: &KernelMaps, name: &str) -> Result<Answer, CliError> {
    let rows = match name {
        Frontends::NAME => hash::<Frontends>(
            maps,
            |key, value| json!({ "key": frontend_key(key), "value": frontend(value) }),
        )?,
        Services::NAME => {
            hash::<Services>(maps, |id, name| json!({ "key": id, "value": { "text": name.as_str() } }))?
        }
        Endpoints::NAME => hash::<Endpoints>(
            maps,
            |addr, endpoint| json!({ "key": addr.to_string(), "value": { "ifindex": endpoint.ifindex() } }),
        )?,
        RelayNodes::NAME => {
            hash::<RelayNodes>(maps, |number, addr| json!({ "key": number, "value": addr.to_string() }))?
        }
        Slots::NAME => array::<Slots>(maps, |&slot| (slot != 0).then(|| json!(slot)))?,
        Backends::NAME => array::<Backends>(maps, backend)?,
        name if name == CONNTRACK[0] => flows::<V4>(&maps.conntrack()?),
        name if name == CONNTRACK[1] => flows::<V6>(&maps.conntrack()?),
        _ => {
            let known = [
                Frontends::NAME,
                Slots::NAME,
                Backends::NAME,
                Services::NAME,
                Endpoints::NAME,
                RelayNodes::NAME,
            ];
            let known = known.iter().chain(&CONNTRACK).copied().collect::<Vec<_>>().join(", ");
            return Err(CliError::NoMap { name: name.to_owned(), known });
        }
    };
    let table = rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    Ok(Answer { table, json: Value::Array(rows) })
}

fn hash<T: HashTable>(
    maps: &KernelMaps,
    row: impl Fn(&T::Key, &T::Value) -> Value,
) -> Result<Vec<Value>, MapError> {
    let mut rows = maps.dump::<T>()?;
    rows.sort_by_key(|(key, _)| *key);
    Ok(rows.iter().map(|(key, value)| row(key, value)).collect())
}

/// The rows of an array that say something.
fn array<T: ArrayTable>(
    maps: &KernelMaps,
    row: impl Fn(&T::Value) -> Option<Value>,
) -> Result<Vec<Value>, MapError> {
    let mut rows = Vec::new();
    for index in 0..maps.len::<T>() {
        if let Some(value) = row(&maps.read::<T>(index)?) {
            rows.push(json!({ "key": index, "value": value }));
        }
    }
    Ok(rows)
}

fn frontend_key(key: &FrontendKey) -> Value {
    let FrontendKey { addr, port, proto, scope } = *key;
    json!({ "addr": addr.to_string(), "port": port.host(), "proto": proto.to_string(), "scope": scope })
}

fn frontend(value: &Frontend) -> Value {
    let Frontend { service, offset, length, flags, affinity } = *value;
    json!({ "service": service, "offset": offset, "length": length, "flags": flags, "affinity": affinity })
}

fn backend(value: &Backend) -> Option<Value> {
    let Backend { addr, port, proto, flags, generation, service, node } = *value;
    (generation != 0 || flags != 0).then(|| {
        json!({
            "addr": addr.to_string(), "port": port.host(), "proto": proto.to_string(), "flags": flags,
            "generation": generation, "service": service, "node": node,
        })
    })
}

fn flows<F: Family>(rows: &[(Tuple<F::Bytes>, Entry)]) -> Vec<Value> {
    let row = |(tuple, entry): &(Tuple<F::Bytes>, Entry)| {
        json!({
            "key": {
                "src": F::addr(tuple.src).to_string(), "dst": F::addr(tuple.dst).to_string(),
                "src_port": tuple.src_port.host(), "dst_port": tuple.dst_port.host(),
                "proto": tuple.proto.to_string(),
            },
            "value": {
                "src": entry.src.to_string(), "dst": entry.dst.to_string(),
                "src_port": entry.src_port.host(), "dst_port": entry.dst_port.host(), "kind": entry.kind,
                "state": entry.state, "epoch": entry.epoch, "backend": entry.backend,
                "generation": entry.generation, "expires": entry.expires,
            },
        })
    };
    rows.iter().map(row).collect()
}
