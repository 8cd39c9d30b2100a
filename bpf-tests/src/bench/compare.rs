//! What goes from pod to pod, against plain routing: each run of something stands between two runs of the baseline.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    arena::{Arena, FAR, Means, NEAR},
    figure::{Measured, Report},
    scale::Scale,
    stats,
};
use crate::pod::load::{Kind, Sample};

/// Those that can be had on this machine, and for the others why not.
#[derive(Debug, Default)]
pub(super) struct Arenas {
    pub(super) ready: BTreeMap<Means, Arena>,
    pub(super) missing: BTreeMap<Means, String>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    pub(super) pairs: usize,
    pub(super) time: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    SameNode,
    BetweenNodes,
}

/// One way from a client to a server.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    means: Means,
    to: To,
    scope: Scope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Pod,
    Service,
    /// The last one in the order in which rules are tried.
    LastService,
}

/// What a way is measured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Everything,
    /// It differs from others only in how a connection opens.
    ShortOnSameNode,
}

#[rustfmt::skip]
const WAYS: &[Way] = &[
    Way { name: "pod-ip/plain-again", means: Means::PlainAgain, to: To::Pod, scope: Scope::Everything },
    Way { name: "cluster-ip/ferroflow", means: Means::Ferroflow, to: To::Service, scope: Scope::Everything },
    Way { name: "cluster-ip/ferroflow-packets", means: Means::FerroflowPackets, to: To::Service, scope: Scope::Everything },
    Way { name: "cluster-ip/nftables", means: Means::Nftables, to: To::Service, scope: Scope::Everything },
    Way { name: "cluster-ip/iptables-early", means: Means::Iptables, to: To::Service, scope: Scope::Everything },
    Way { name: "cluster-ip/iptables-late", means: Means::Iptables, to: To::LastService, scope: Scope::ShortOnSameNode },
    Way { name: "pod-ip/ferroflow", means: Means::Ferroflow, to: To::Pod, scope: Scope::Everything },
    Way { name: "pod-ip/nftables", means: Means::Nftables, to: To::Pod, scope: Scope::ShortOnSameNode },
    Way { name: "pod-ip/iptables", means: Means::Iptables, to: To::Pod, scope: Scope::ShortOnSameNode },
];

/// One number of a sample.
struct Reading {
    name: &'static str,
    unit: &'static str,
    better: Better,
    of: fn(&Sample) -> f64,
}

#[derive(Clone, Copy)]
enum Better {
    More,
    Less,
}

/// Rates count everything; medians do not notice what else ran on the CPU, so on a busy machine they compare better.
const SHORT: &[Reading] = &[
    Reading { name: "short", unit: "1/s", better: Better::More, of: per_second },
    Reading { name: "short-p50", unit: "us", better: Better::Less, of: |sample| micros(sample.p50_ns) },
];
const ROUND_TRIP: &[Reading] = &[
    Reading { name: "round-trip-p50", unit: "us", better: Better::Less, of: |sample| micros(sample.p50_ns) },
    Reading { name: "round-trip-p99", unit: "us", better: Better::Less, of: |sample| micros(sample.p99_ns) },
];
const STREAM: &[Reading] = &[Reading {
    name: "stream",
    unit: "Gbit/s",
    better: Better::More,
    of: |sample| per_second(sample) * 8.0 / 1e9,
}];

fn readings(kind: Kind) -> &'static [Reading] {
    match kind {
        Kind::Short => SHORT,
        Kind::RoundTrip => ROUND_TRIP,
        Kind::Stream => STREAM,
    }
}

fn per_second(sample: &Sample) -> f64 {
    sample.count as f64 * 1e9 / sample.elapsed_ns as f64
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::BetweenNodes => "between-nodes",
        }
    }

    fn pod(self) -> &'static str {
        match self {
            Self::SameNode => NEAR,
            Self::BetweenNodes => FAR,
        }
    }
}

impl Way {
    fn targets(&self, arena: &Arena, scale: &Scale, place: Place) -> Vec<SocketAddr> {
        match (self.to, place) {
            (To::Pod, _) => arena.pod_targets(place.pod()),
            (To::LastService, _) => vec![scale.late()],
            (To::Service, Place::SameNode) => vec![scale.near()],
            (To::Service, Place::BetweenNodes) => vec![scale.far()],
        }
    }
}

/// Measures one load at one place every way, in turns.
pub(super) fn compare(
    arenas: &Arenas,
    scale: &Scale,
    (kind, place): (Kind, Place),
    effort: Effort,
    report: &mut Report,
) -> Result<()> {
    let services = scale.services().len();
    let applies =
        |way: &&Way| way.scope == Scope::Everything || (kind, place) == (Kind::Short, Place::SameNode);
    let mut runs: Vec<Runs<'_>> = Vec::new();
    for way in WAYS.iter().filter(applies) {
        match (arenas.ready.get(&way.means), arenas.missing.get(&way.means)) {
            (Some(arena), _) => {
                let targets = way.targets(arena, scale, place);
                runs.push(Runs { way, arena, targets, samples: Vec::new(), plain: Vec::new(), failed: None });
            }
            (None, why) => {
                let why = why.map_or("its cluster could not be made", String::as_str);
                for reading in readings(kind) {
                    report.skip(&format!("{}/{}/{}", reading.name, place.name(), way.name), services, why)?;
                }
            }
        }
    }
    let plain = arenas.ready.get(&Means::Plain).context("there is no plain cluster")?;
    take_turns(plain, (kind, place), effort, &mut runs)?;
    for reading in readings(kind) {
        for run in &runs {
            let name = format!("{}/{}/{}", reading.name, place.name(), run.way.name);
            match &run.failed {
                Some(error) => report.fail(&name, services, error)?,
                None => report.add(&name, services, &run.measured(reading))?,
            }
        }
    }
    Ok(())
}

/// Every run of one way.
struct Runs<'a> {
    way: &'a Way,
    arena: &'a Arena,
    targets: Vec<SocketAddr>,
    samples: Vec<Sample>,
    /// Before and after each sample.
    plain: Vec<[Sample; 2]>,
    failed: Option<anyhow::Error>,
}

impl Runs<'_> {
    fn measured(&self, reading: &Reading) -> Measured {
        let values: Vec<f64> = self.samples.iter().map(reading.of).collect();
        let pairs = || self.plain.iter().map(|pair| pair.each_ref().map(reading.of));
        let ratios = values.iter().zip(pairs()).map(|(value, pair)| stats::ratio(*value, pair));
        let ratios = match reading.better {
            Better::More => ratios.collect(),
            Better::Less => ratios.map(f64::recip).collect(),
        };
        Measured { unit: reading.unit, baseline: pairs().flatten().collect(), values, ratios }
    }
}

fn take_turns(
    plain: &Arena,
    (kind, place): (Kind, Place),
    Effort { pairs, time }: Effort,
    runs: &mut [Runs<'_>],
) -> Result<()> {
    let targets = plain.pod_targets(place.pod());
    let baseline = || plain.load(kind, &targets, time).context("plain routing");
    // The first run after all the setting up is slow.
    baseline()?;
    let mut before = baseline()?;
    for _ in 0..pairs {
        for run in runs.iter_mut().filter(|run| run.failed.is_none()) {
            match run.arena.load(kind, &run.targets, time) {
                Ok(sample) => run.samples.push(sample),
                Err(error) => {
                    run.failed = Some(error);
                    continue;
                }
            }
            let after = baseline()?;
            run.plain.push([before, after]);
            before = after;
        }
    }
    Ok(())
}
