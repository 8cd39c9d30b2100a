//! `ferroflow policy list`: which policies apply to the pods of this node, as the pinned maps have it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ferroflow_common::abi::policy::{
    Class, EndpointPolicy, Meaning, PolicyKey, PortRange, RangeKey, Rules, WORLD,
};
use ferroflow_common::addr::Addr;
use ferroflow_ebpf::policy::Policies;
use serde::Serialize;

use super::table::table;
use super::{Answer, CliError};
use crate::maps::kernel::KernelMaps;
use crate::maps::{
    Endpoints, Ipcache, IpcacheRanges, MapError, Maps as _, PeerClasses, Policy, PolicySets, PortRanges,
};

/// The maps, read once.
pub(super) struct View {
    pub(super) endpoints: HashMap<Addr, EndpointPolicy>,
    pub(super) classes: HashMap<Addr, Class>,
    pub(super) ranges: Vec<(RangeKey, Class)>,
    pub(super) rules: BTreeMap<PolicyKey, Rules>,
    pub(super) port_ranges: Vec<PortRange>,
    pub(super) sets: BTreeMap<u32, Meaning>,
    pub(super) meanings: HashMap<Class, Meaning>,
}

impl View {
    pub(super) fn read(maps: &KernelMaps) -> Result<Self, MapError> {
        let rows = 0..maps.len::<PortRanges>();
        let endpoints = maps.dump::<Endpoints>()?.into_iter().map(|(addr, row)| (addr, row.policy));
        let mut ranges = maps.dump::<IpcacheRanges>()?;
        ranges.sort_unstable_by_key(|(key, _)| std::cmp::Reverse(key.bits));
        Ok(Self {
            endpoints: endpoints.collect(),
            classes: maps.dump::<Ipcache>()?.into_iter().collect(),
            ranges,
            rules: maps.dump::<Policy>()?.into_iter().collect(),
            port_ranges: rows.map(|row| maps.read::<PortRanges>(row)).collect::<Result<_, _>>()?,
            sets: maps.dump::<PolicySets>()?.into_iter().collect(),
            meanings: maps.dump::<PeerClasses>()?.into_iter().collect(),
        })
    }

    pub(super) fn set_text(&self, set: u32) -> String {
        match set {
            EndpointPolicy::OPEN => "not isolated".into(),
            EndpointPolicy::CLOSED => "closed: its policies have no room, or are not in the maps yet".into(),
            set => self.sets.get(&set).map_or_else(|| format!("#{set}"), |it| it.as_str().to_owned()),
        }
    }

    pub(super) fn class_text(&self, class: Class) -> String {
        match class {
            WORLD => "nothing that these policies mention".into(),
            class => {
                self.meanings.get(&class).map_or_else(|| format!("#{class}"), |it| it.as_str().to_owned())
            }
        }
    }
}

impl Policies for View {
    fn class(&self, addr: &Addr) -> Option<Class> {
        self.classes.get(addr).copied()
    }

    fn range_class(&self, addr: &Addr) -> Option<Class> {
        let bits = |addr: &Addr| u128::from_be_bytes(addr.bytes);
        let has = |key: &RangeKey| (bits(&key.addr) ^ bits(addr)).leading_zeros() >= key.bits;
        self.ranges.iter().find(|(key, _)| has(key)).map(|(_, class)| *class)
    }

    fn rules(&self, key: &PolicyKey) -> Option<Rules> {
        self.rules.get(key).copied()
    }

    fn port_range(&self, row: u32) -> Option<PortRange> {
        self.port_ranges.get(usize::try_from(row).ok()?).copied()
    }
}

#[derive(Serialize)]
struct SetRow {
    set: u32,
    policies: String,
    pods: Vec<IpAddr>,
    /// How many classes of peers it says something of, the others counted as one.
    classes: usize,
}

pub(super) fn list(maps: &KernelMaps) -> Result<Answer, CliError> {
    let view = View::read(maps)?;
    let rows = view.sets.keys().map(|set| {
        let has = |policy: &EndpointPolicy| policy.ingress == *set || policy.egress == *set;
        let pods = view.endpoints.iter().filter(|(_, policy)| has(policy)).map(|(addr, _)| addr.ip());
        let mut pods: Vec<_> = pods.collect();
        pods.sort_unstable();
        let classes = view.rules.keys().filter(|key| key.set == *set).count();
        SetRow { set: *set, policies: view.set_text(*set), pods, classes }
    });
    let rows: Vec<_> = rows.collect();
    let lines = rows.iter().map(|row| {
        let pods: Vec<_> = row.pods.iter().map(IpAddr::to_string).collect();
        [row.set.to_string(), row.policies.clone(), row.classes.to_string(), pods.join(" ")]
    });
    let table = table(["SET", "POLICIES", "CLASSES", "PODS"], lines);
    Ok(Answer { table, json: serde_json::to_value(&rows)? })
}
