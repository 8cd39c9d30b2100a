//! What goes from pod to pod, against plain routing, or in a tunnel against the kernel's: each run of something stands
//! between two runs of the baseline.

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
    /// Tunnels, which are between nodes only.
    BetweenNodes,
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
    Way { name: "pod-ip/vxlan", means: Means::Vxlan, to: To::Pod, scope: Scope::BetweenNodes },
    Way { name: "pod-ip/ferroflow-vxlan", means: Means::FerroflowVxlan, to: To::Pod, scope: Scope::BetweenNodes },
    Way { name: "cluster-ip/ferroflow-vxlan", means: Means::FerroflowVxlan, to: To::Service, scope: Scope::BetweenNodes },
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
    fn applies(&self, kind: Kind, place: Place) -> bool {
        match self.scope {
            Scope::Everything => true,
            Scope::ShortOnSameNode => (kind, place) == (Kind::Short, Place::SameNode),
            Scope::BetweenNodes => place == Place::BetweenNodes,
        }
    }

    /// What it is compared with.
    fn baseline(&self) -> Means {
        if self.means == Means::FerroflowVxlan { Means::Vxlan } else { Means::Plain }
    }

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
    let mut runs: Vec<Runs<'_>> = Vec::new();
    for way in WAYS.iter().filter(|way| way.applies(kind, place)) {
        let lacking = [way.means, way.baseline()].into_iter().find(|it| !arenas.ready.contains_key(it));
        match (arenas.ready.get(&way.means), lacking) {
            (Some(arena), None) => {
                let targets = way.targets(arena, scale, place);
                let (samples, baseline) = (Vec::new(), Vec::new());
                runs.push(Runs { way, arena, targets, samples, baseline, failed: None });
            }
            (_, lacking) => {
                let why = lacking.and_then(|means| arenas.missing.get(&means));
                let why = why.map_or("its cluster could not be made", String::as_str);
                for reading in readings(kind) {
                    report.skip(&format!("{}/{}/{}", reading.name, place.name(), way.name), services, why)?;
                }
            }
        }
    }
    for means in [Means::Plain, Means::Vxlan] {
        let compared: Vec<_> = runs.iter_mut().filter(|run| run.way.baseline() == means).collect();
        if let Some(baseline) = arenas.ready.get(&means).filter(|_| !compared.is_empty()) {
            take_turns(baseline, (kind, place), effort, compared)?;
        }
    }
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
    baseline: Vec<[Sample; 2]>,
    failed: Option<anyhow::Error>,
}

impl Runs<'_> {
    fn measured(&self, reading: &Reading) -> Measured {
        let values: Vec<f64> = self.samples.iter().map(reading.of).collect();
        let pairs = || self.baseline.iter().map(|pair| pair.each_ref().map(reading.of));
        let ratios = values.iter().zip(pairs()).map(|(value, pair)| stats::ratio(*value, pair));
        let ratios = match reading.better {
            Better::More => ratios.collect(),
            Better::Less => ratios.map(f64::recip).collect(),
        };
        Measured { unit: reading.unit, baseline: pairs().flatten().collect(), values, ratios }
    }
}

fn take_turns(
    arena: &Arena,
    (kind, place): (Kind, Place),
    Effort { pairs, time }: Effort,
    mut runs: Vec<&mut Runs<'_>>,
) -> Result<()> {
    let targets = arena.pod_targets(place.pod());
    let baseline = || arena.load(kind, &targets, time).context("the baseline");
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
            run.baseline.push([before, after]);
            before = after;
        }
    }
    Ok(())
}
