//! One cluster with its changes, asked of the oracle and of the compiled tables; and what is left of it when all that
//! does not matter is taken away.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use ferroflow::model::{Change, Kind, Name, ObjectId, World};
use ferroflow::plan::policy::{Known, Planner, Room};
use ferroflow::watch::{convert, policy};
use ferroflow_common::abi::policy::{PolicyKey, RangeKey, Verdict};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_ebpf::noise::Noise;
use ferroflow_ebpf::policy::{Wanted, allowed, class_of};
use ferroflow_ebpf::tables::fake::FakePolicies;
use serde_json::Value;

use super::random::{ADDRESSES, PORTS};
use super::{Answer, Flow, Oracle, Way};

/// The node whose tables are compiled.
pub const NODE: &str = "here";

/// A flow of which the tables say something else than the oracle.
#[derive(Debug)]
pub struct Mismatch {
    pub pod: String,
    pub flow: String,
    pub oracle: Answer,
    pub tables: Verdict,
}

/// The cluster as the agent sees it.
#[derive(Debug)]
pub struct Compiled {
    world: World,
    planner: Planner,
    tables: FakePolicies,
    now: Instant,
}

impl Default for Compiled {
    fn default() -> Self {
        Self {
            world: World::new(NODE),
            planner: Planner::new(Room { sets: 1000, classes: 1000 }, Known::default()),
            tables: FakePolicies::default(),
            now: Instant::now(),
        }
    }
}

impl Compiled {
    /// Takes a change in and writes the rows that the plan says are other.
    ///
    /// # Errors
    /// Where the object makes no sense to the agent.
    pub fn apply(&mut self, object: &Value) -> Result<()> {
        for key in self.world.apply(change(object)?) {
            self.planner.touch(&key);
        }
        let changes = self.planner.update(&self.world, self.now);
        if let [refused, ..] = &*self.planner.refused() {
            bail!("{refused}");
        }
        for addr in changes.addresses {
            match self.planner.class(&addr) {
                Some(class) => self.tables.classes.insert(addr, class),
                None => self.tables.classes.remove(&addr),
            };
        }
        for range in changes.ranges {
            let key = RangeKey { bits: range.bits().into(), addr: range.addr() };
            match self.planner.range(&range) {
                Some(class) => self.tables.ranges.insert(key, class),
                None => self.tables.ranges.remove(&key),
            };
        }
        for key @ PolicyKey { set, class } in changes.rules {
            match self.planner.rules(&key) {
                Some(rules) => self.tables.lay(set, class, rules.otherwise, &rules.ranges),
                None => drop(self.tables.policy.remove(&key)),
            }
        }
        Ok(())
    }

    fn ask(&self, pod: IpAddr, way: Way, flow: Flow<'_>) -> Result<Verdict> {
        let policy = self.planner.endpoint(pod.into());
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
        let class = class_of(&self.tables, &Addr::from(flow.peer));
        Ok(allowed(&self.tables, set, class, Wanted { proto, port: Port::new(flow.port) }))
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
    fn count(&mut self, answer: Answer) {
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
    (oracle, compiled): (&Oracle, &Compiled),
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
            let (said, found) = (oracle.ask(pod, way, flow), compiled.ask(*own, way, flow)?);
            asked.count(said);
            let expected = match said {
                Answer::Passes => Verdict::Allow,
                Answer::Dropped => Verdict::Deny,
                Answer::Told => Verdict::WouldDeny,
            };
            if found != expected {
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
    let (mut oracle, mut compiled, mut noise) = (Oracle::default(), Compiled::default(), Noise(probes.seed));
    for object in objects {
        oracle.apply(object);
        compiled.apply(object)?;
        if let Some(mismatch) = probe((&oracle, &compiled), probes.count, &mut noise, asked)? {
            return Ok(Some(mismatch));
        }
    }
    Ok(None)
}

/// Takes away objects, fields and elements, as long as the case still goes wrong.
pub fn shrink(objects: Vec<Value>, fails: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let mut smallest = Value::Array(objects);
    let fails = |value: &Value| value.as_array().is_some_and(|objects| fails(objects));
    loop {
        let paths = paths(&smallest);
        let smaller = paths.iter().rev().find_map(|path| {
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
    let target = outer.iter().try_fold(value, |value, key| match value {
        Value::Array(elements) => elements.get_mut(key.parse::<usize>().ok()?),
        other => other.get_mut(key),
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

fn change(object: &Value) -> Result<Change> {
    let kind = object["kind"].as_str().unwrap_or_default();
    if object["gone"] == true {
        let kind = match kind {
            "Pod" => Kind::Pod,
            "Namespace" => Kind::Namespace,
            "NetworkPolicy" => Kind::NetworkPolicy,
            other => bail!("no such kind: {other}"),
        };
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or("default");
        return Ok(ObjectId { kind, name: Name::new(text("namespace"), text("name")) }.gone());
    }
    let read = || object.clone();
    let change = match kind {
        "Pod" => convert::pod(&serde_json::from_value(read())?),
        "Namespace" => policy::namespace(&serde_json::from_value(read())?),
        "NetworkPolicy" => policy::network_policy(&serde_json::from_value(read())?),
        other => bail!("no such kind: {other}"),
    };
    change.with_context(|| object.to_string())
}
