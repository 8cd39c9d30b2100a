//! One cluster with its changes, asked of the oracle and of the compiled tables; and what is left of it when all that
//! does not matter is taken away.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ferroflow::maps::fake::{FakeMaps, Faults, Search, Sizes};
use ferroflow::maps::{Endpoints, Ipcache, IpcacheRanges, Maps, Policy, PortRanges};
use ferroflow::model::Change;
use ferroflow::plan;
use ferroflow::reconcile::{Config, Limits, Reconciler};
use ferroflow_common::abi::policy::{EndpointPolicy, Verdict};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_ebpf::noise::Noise;
use ferroflow_ebpf::policy::{Wanted, allowed, class_of};
use ferroflow_ebpf::tables::fake::FakePolicies;
use serde_json::Value;

use super::random::{ADDRESSES, PODS, PORTS, pod_addresses};
use super::{Answer, Flow, Oracle, Way};
use crate::packets::control::change;

/// The node whose tables are compiled.
pub const NODE: &str = "here";

/// A flow of which the tables say something else than the oracle.
#[derive(Debug)]
pub struct Mismatch {
    pub pod: String,
    pub flow: String,
    pub oracle: Answer,
    /// `None` where the pod has no row.
    pub tables: Option<Verdict>,
}

/// The cluster as the agent sees it: the real reconciler, over tables in memory or in the kernel.
#[derive(Debug)]
pub struct Compiled<M = FakeMaps> {
    reconciler: Reconciler<M>,
    now: Instant,
}

/// What the programs would find.
#[derive(Debug, Default)]
pub struct Tables {
    policies: FakePolicies,
    endpoints: BTreeMap<Addr, EndpointPolicy>,
}

impl Compiled {
    /// With empty tables.
    ///
    /// # Errors
    /// As [`Compiled::restore`].
    pub fn new() -> Result<Self> {
        Self::restore(FakeMaps::new(Sizes { hash: 1000, slots: 2000, backends: 1 }, Search::EveryWrite))
    }
}

impl<M: Maps> Compiled<M> {
    /// Over tables that an agent before left; writes nothing until [`Compiled::settle`].
    ///
    /// # Errors
    /// Where the tables cannot be read.
    pub fn restore(maps: M) -> Result<Self> {
        let now = Instant::now();
        let limits = Limits { services: 1, frontends: 1 };
        let (plan, grace) = (plan::Config::default(), Duration::ZERO);
        let config = Config { node: NODE.into(), limits, plan, grace, clock: || 0 };
        let mut reconciler = Reconciler::restore(maps, &config, now)?;
        reconciler.synced();
        for addr in (0..PODS).flat_map(pod_addresses) {
            reconciler.handle(Change::LocalRoute(addr.parse::<IpAddr>()?.into(), Some(7)), now);
        }
        Ok(Self { reconciler, now })
    }

    /// Takes a change in.
    ///
    /// # Errors
    /// Where the object makes no sense to the agent.
    pub fn handle(&mut self, object: &Value) -> Result<()> {
        self.reconciler.handle(change(object)?, self.now);
        Ok(())
    }

    /// Writes what is to be written.
    ///
    /// # Errors
    /// Where not everything could be.
    pub fn settle(&mut self) -> Result<()> {
        while let Some(due) = self.reconciler.due().filter(|_| self.reconciler.failing().next().is_none()) {
            self.now = self.now.max(due);
            self.reconciler.tick(self.now);
        }
        if let Some((key, error)) = self.reconciler.failing().next() {
            bail!("{key}: {error}");
        }
        Ok(())
    }

    pub fn maps_mut(&mut self) -> &mut M {
        self.reconciler.maps_mut()
    }

    /// # Errors
    /// Where the tables cannot be read.
    pub fn tables(&self) -> Result<Tables> {
        Tables::of(self.reconciler.maps())
    }
}

impl Tables {
    /// # Errors
    /// Where the tables cannot be read.
    pub fn of(maps: &impl Maps) -> Result<Self> {
        let port_ranges = (0..maps.len::<PortRanges>()).map(|row| maps.read::<PortRanges>(row));
        let policies = FakePolicies {
            classes: maps.dump::<Ipcache>()?.into_iter().collect(),
            ranges: maps.dump::<IpcacheRanges>()?.into_iter().collect(),
            policy: maps.dump::<Policy>()?.into_iter().collect(),
            port_ranges: port_ranges.collect::<Result<_, _>>()?,
            ..FakePolicies::default()
        };
        let endpoints = maps.dump::<Endpoints>()?.into_iter().map(|(addr, row)| (addr, row.policy));
        Ok(Self { policies, endpoints: endpoints.collect() })
    }

    /// `None` where the pod has no row.
    ///
    /// # Errors
    /// Where there is no such protocol.
    pub fn ask(&self, pod: IpAddr, way: Way, flow: Flow<'_>) -> Result<Option<Verdict>> {
        let Some(policy) = self.endpoints.get(&pod.into()) else { return Ok(None) };
        let set = match way {
            Way::In => policy.ingress,
            Way::Out => policy.egress,
        };
        let proto = match flow.protocol {
            "TCP" => Proto::TCP,
            "UDP" => Proto::UDP,
            "SCTP" => Proto::SCTP,
            "ICMP" => Proto::ICMP,
            other => bail!("no such protocol: {other}"),
        };
        let class = class_of(&self.policies, &Addr::from(flow.peer));
        Ok(Some(allowed(&self.policies, set, class, Wanted { proto, port: Port::new(flow.port) })))
    }
}

/// How often the oracle gave which answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    pub passes: u64,
    pub dropped: u64,
    pub told: u64,
}

impl Asked {
    pub fn count(&mut self, answer: Answer) {
        match answer {
            Answer::Passes => self.passes += 1,
            Answer::Dropped => self.dropped += 1,
            Answer::Told => self.told += 1,
        }
    }

    pub fn total(&self) -> u64 {
        self.passes + self.dropped + self.told
    }
}

/// How a case is asked.
#[derive(Clone, Copy, Debug)]
pub struct Probes {
    /// How many flows after each change; each is asked about both ways.
    pub count: usize,
    pub seed: u64,
}

/// Asks about flows that `noise` chooses; gives the first of which the two say different things.
fn probe(
    (oracle, tables): (&Oracle, &Tables),
    probes: usize,
    noise: &mut Noise,
    asked: &mut Asked,
) -> Result<Option<Mismatch>> {
    let pods = oracle.pods_on(NODE);
    let pods: Vec<_> = pods.iter().filter(|(_, addresses)| !addresses.is_empty()).collect();
    for _ in 0..probes {
        let Some((pod, own)) = pods.get(noise.below(pods.len())) else { return Ok(None) };
        let peer: IpAddr = noise.pick(&ADDRESSES).parse()?;
        let protocol = noise.pick(&["TCP", "TCP", "UDP", "SCTP", "ICMP"]);
        let port = if protocol == "ICMP" { 0 } else { noise.pick(&PORTS) };
        let flow = Flow { peer, protocol, port };
        let Some(own) = own.iter().find(|own| own.is_ipv4() == peer.is_ipv4()) else { continue };
        for way in [Way::In, Way::Out] {
            let (said, found) = (oracle.ask(pod, way, flow), tables.ask(*own, way, flow)?);
            asked.count(said);
            let expected = match said {
                Answer::Passes => Verdict::Allow,
                Answer::Dropped => Verdict::Deny,
                Answer::Told => Verdict::WouldDeny,
            };
            if found != Some(expected) {
                let pod = format!("{}/{}", pod["metadata"]["namespace"], pod["metadata"]["name"]);
                let flow = format!("{way:?} {flow:?}");
                return Ok(Some(Mismatch { pod, flow, oracle: said, tables: found }));
            }
        }
    }
    Ok(None)
}

/// Runs a case: its objects one after another, with probes after each, which are counted in `asked`.
///
/// # Errors
/// Where an object of it makes no sense to the agent.
pub fn run(objects: &[Value], probes: Probes, asked: &mut Asked) -> Result<Option<Mismatch>> {
    let (mut oracle, mut compiled, mut noise) = (Oracle::default(), Compiled::new()?, Noise(probes.seed));
    for object in objects {
        oracle.apply(object);
        compiled.handle(object)?;
        compiled.settle()?;
        if let Some(mismatch) = probe((&oracle, &compiled.tables()?), probes.count, &mut noise, asked)? {
            return Ok(Some(mismatch));
        }
    }
    Ok(None)
}

/// Runs a case with an agent that dies at every single write of its last change, and gives the first flow that passes
/// then although policies let it pass neither before that change nor after it; or the first of which another agent,
/// over what the first one left, says something else than the oracle.
///
/// # Errors
/// Where an object makes no sense to the agent, or where a live agent cannot write.
pub fn run_deaths(objects: &[Value], probes: Probes, asked: &mut Asked) -> Result<Option<Mismatch>> {
    let Some((last, first)) = objects.split_last() else { return Ok(None) };
    let (mut before, mut compiled, mut noise) = (Oracle::default(), Compiled::new()?, Noise(probes.seed));
    for object in first {
        before.apply(object);
        compiled.handle(object)?;
    }
    compiled.settle()?;
    let left = compiled.maps_mut().clone();
    let mut after = before.clone();
    after.apply(last);
    for writes in 0.. {
        let (survived, mut dying) = over(&left, Faults::After { writes }, objects)?;
        let tables = Tables::of(dying.maps_mut())?;
        if let Some(mismatch) = probe_window((&before, &after), &tables, probes.count, &mut noise)? {
            return Ok(Some(mismatch));
        }
        let (converged, next) = over(dying.maps_mut(), Faults::Never, objects)?;
        converged?;
        if let Some(mismatch) = probe((&after, &next.tables()?), probes.count, &mut noise, asked)? {
            return Ok(Some(mismatch));
        }
        if survived.is_ok() {
            break;
        }
    }
    Ok(None)
}

/// An agent that starts over tables that were left, knows these objects, and has written what it could.
fn over(left: &FakeMaps, faults: Faults, objects: &[Value]) -> Result<(Result<()>, Compiled)> {
    let mut maps = left.clone();
    maps.set_faults(faults);
    let mut agent = Compiled::restore(maps)?;
    for object in objects {
        agent.handle(object)?;
    }
    Ok((agent.settle(), agent))
}

/// The first flow that passes and should do so neither before nor after.
fn probe_window(
    (before, after): (&Oracle, &Oracle),
    tables: &Tables,
    probes: usize,
    noise: &mut Noise,
) -> Result<Option<Mismatch>> {
    let pods: Vec<_> = [before, after].into_iter().flat_map(|it| it.pods_on(NODE)).collect();
    let pods: Vec<_> = pods.iter().filter(|(_, addresses)| !addresses.is_empty()).collect();
    for _ in 0..probes {
        let Some((pod, own)) = pods.get(noise.below(pods.len())) else { return Ok(None) };
        let own = own[noise.below(own.len())];
        let peer: IpAddr = noise.pick(&ADDRESSES).parse()?;
        let flow = Flow { peer, protocol: noise.pick(&["TCP", "UDP", "SCTP"]), port: noise.pick(&PORTS) };
        for way in [Way::In, Way::Out] {
            let mut versions = [before, after].into_iter().filter_map(|it| {
                let pods = it.pods_on(NODE);
                let same = pods.into_iter().find(|(_, addresses)| addresses.contains(&own));
                same.map(|(pod, _)| it.ask(pod, way, flow))
            });
            let may_pass = versions.any(|answer| answer != Answer::Dropped);
            let tables = tables.ask(own, way, flow)?;
            if !may_pass && tables.is_some_and(|verdict| verdict != Verdict::Deny) {
                let pod = format!("{}/{}", pod["metadata"]["namespace"], pod["metadata"]["name"]);
                let flow = format!("{way:?} {flow:?}");
                return Ok(Some(Mismatch { pod, flow, oracle: Answer::Dropped, tables }));
            }
        }
    }
    Ok(None)
}

/// Takes away objects, fields and elements, of those whose path may go, as long as the case still goes wrong.
pub fn shrink(
    objects: Vec<Value>,
    may_go: impl Fn(&[String]) -> bool,
    mut fails: impl FnMut(&[Value]) -> bool,
) -> Vec<Value> {
    let mut smallest = Value::Array(objects);
    let mut fails = |value: &Value| value.as_array().is_some_and(|objects| fails(objects));
    loop {
        let paths = paths(&smallest);
        let smaller = paths.iter().rev().filter(|path| may_go(path)).find_map(|path| {
            let mut smaller = smallest.clone();
            remove(&mut smaller, path);
            fails(&smaller).then_some(smaller)
        });
        match smaller {
            Some(smaller) => smallest = smaller,
            None => return smallest.as_array().cloned().unwrap_or_default(),
        }
    }
}

/// Where everything is that could be taken away.
fn paths(value: &Value) -> Vec<Vec<String>> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Array(elements) => {
            elements.iter().enumerate().map(|(index, it)| (index.to_string(), it)).collect()
        }
        Value::Object(fields) => fields.iter().map(|(key, it)| (key.clone(), it)).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    };
    let mut found = Vec::new();
    for (key, it) in inner {
        found.extend(paths(it).into_iter().map(|path| [vec![key.clone()], path].concat()));
        found.push(vec![key]);
    }
    found
}

fn remove(value: &mut Value, path: &[String]) {
    let Some((last, outer)) = path.split_last() else { return };
    let target = outer.iter().try_fold(value, |value, key| {
        if value.is_array() { value.get_mut(key.parse::<usize>().ok()?) } else { value.get_mut(key) }
    });
    match target {
        Some(Value::Array(elements)) => {
            if let Ok(index) = last.parse::<usize>() {
                elements.remove(index);
            }
        }
        Some(Value::Object(fields)) => drop(fields.remove(last)),
        Some(_) | None => {}
    }
}
