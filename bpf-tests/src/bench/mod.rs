//! How fast Ferroflow is, beside plain kernel routing and the rules of kube-proxy, in one run on one machine.
//!
//! ```text
//!  scale: N services ──┬─ manifests ──▶ agents ──┐
//!                      ├─ nftables rules ────────┼─▶ arenas: equal clusters, each under one kind of means
//!                      └─ iptables rules ────────┘      │
//!  control: programming, changes, memory of the agent   ├─▶ compare: plain, X, plain, Y, plain, ..
//!                                                       ▼
//!                         figure (JSON, table, budgets) ── plot (SVG)
//! ```
//! Servers, clients and the kernel between them share one CPU: a rate says how much work a connection or a byte is, and
//! the ratio of two streams is that of their CPU time per byte. Packets in VXLAN are compared with the kernel's own VXLAN.
//!
//! Absolute numbers are of this machine, under its load: only ratios within one run compare. `pod-ip/plain-again` is
//! plain routing against itself: what it differs from 1 is noise.

mod arena;
mod attach;
mod compare;
mod control;
mod figure;
mod iptables;
mod nftables;
mod plot;
mod policies;
mod scale;
mod stats;

use std::{
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::unistd::geteuid;

use self::{
    arena::{Arena, FAR, LOADING_LIMIT, Means, NEAR, Nodes, Rules},
    compare::{Arenas, Effort, Place},
    figure::Report,
    scale::Scale,
};
use crate::{
    agent,
    pod::{self, load::Kind},
    sandbox::Sandbox,
};

/// Measures the datapath and the agent against plain routing and against kube-proxy's rules.
///
/// Prints a line of JSON per figure, then a table; draws charts. Numbers never fail it: only what cannot be measured.
#[derive(Debug, Parser)]
#[command(name = "bench")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Cli {
    /// Two minutes: up to 1,000 services, few pairs
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Up to 30,000 services, and 50,000 (500,000 endpoints) for the agent alone
    #[arg(long)]
    full: bool,
    /// Sizes of the cluster instead, smallest first, at least 10
    #[arg(long, value_delimiter = ',', value_name = "SERVICES")]
    sizes: Vec<usize>,
    /// Sizes at which the agent alone is measured, and no traffic
    #[arg(long, value_delimiter = ',', value_name = "SERVICES")]
    control: Option<Vec<usize>>,
    /// What policies cost, and nothing else: a minute
    #[arg(long)]
    policies: bool,
    /// How long pods wait for their network, and nothing else: seconds
    #[arg(long, conflicts_with = "policies")]
    cni: bool,
    /// Runs of each way, each between two of plain routing
    #[arg(long)]
    pairs: Option<usize>,
    /// Where the charts go
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    charts: PathBuf,
}

/// What is done at one size.
struct Plan {
    sizes: Vec<usize>,
    /// For the agent alone.
    control: Vec<usize>,
    pairs: usize,
    time: Duration,
    changes: u8,
}

pub fn main() -> ExitCode {
    pod::run_if_asked();
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    ensure!(geteuid().is_root(), "network namespaces and BPF programs need root");
    agent::binary()?;
    let plan = cli.plan();
    let all = || plan.sizes.iter().chain(&plan.control);
    ensure!(all().all(|size| *size >= 10), "a cluster of fewer than 10 services is too small");
    let sandbox = Sandbox::enter()?;
    sandbox.exit_on_signals()?;
    let mut report = Report::default();
    if cli.policies {
        policies::measure(&sandbox, &mut report)?;
        println!("\n{}", report.table());
        return Ok(ExitCode::SUCCESS);
    }
    if cli.cni {
        attach::measure(&sandbox, &mut report)?;
        println!("\n{}", report.table());
        return Ok(ExitCode::SUCCESS);
    }
    for (number, &size) in plan.sizes.iter().enumerate() {
        // Not at the largest size: its rules would have to be loaded on a second node as well.
        let what = if number == 1.min(plan.sizes.len() - 1) { What::Everything } else { What::BySize };
        measure(&sandbox, &plan, (size, what), &mut report)?;
    }
    for &size in &plan.control {
        measure_alone(&sandbox, &plan, size, &mut report)?;
    }
    if let Err(error) = attach::measure(&sandbox, &mut report) {
        report.fail("cni/add-p50/ferroflow", 0, &error)?;
    }
    if let Err(error) = policies::measure(&sandbox, &mut report) {
        report.fail("policy/tables/ferroflow", 0, &error)?;
    }
    add_flatness(&mut report)?;
    add_slopes(&mut report)?;
    plot::write_all(&cli.charts, report.figures())?;
    println!("\n{}charts: {}", report.table(), cli.charts.display());
    Ok(if report.failures() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Cli {
    fn plan(&self) -> Plan {
        let (sizes, pairs, millis): (&[usize], _, _) = if self.quick {
            (&[10, 1_000], 3, 200)
        } else if self.full {
            (&[10, 1_000, 10_000, 30_000], 7, 400)
        } else {
            (&[10, 1_000, 10_000], 7, 400)
        };
        let largest = if self.full { &[50_000][..] } else { &[] };
        Plan {
            sizes: if self.sizes.is_empty() { sizes.to_vec() } else { self.sizes.clone() },
            control: self.control.clone().unwrap_or_else(|| largest.to_vec()),
            pairs: self.pairs.unwrap_or(pairs).max(1),
            time: Duration::from_millis(millis),
            changes: 100,
        }
    }
}

/// What is measured at a size.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// What may depend on the size.
    BySize,
    /// Also what is the same at every size: connections that are open, and other nodes.
    Everything,
}

fn measure(sandbox: &Sandbox, plan: &Plan, (size, what): (usize, What), report: &mut Report) -> Result<()> {
    let start = Instant::now();
    let say =
        |done: &str| eprintln!("bench: {size} services: {done} ({:.0} s)", start.elapsed().as_secs_f64());
    // Programs, servers and clients share the last CPU; interrupts are mostly on the first.
    let cpu = thread::available_parallelism()?.get() - 1;
    let plain = Arena::new(sandbox, Means::Plain, cpu).context("make the plain cluster")?;
    let scale = Scale::new(size, plain.cluster.pod(NEAR).v4, plain.cluster.pod(FAR).v4);
    let mut arenas = Arenas::default();
    arenas.ready.insert(Means::Plain, plain);
    let tunnels: &[_] = if what == What::Everything { &[Means::Vxlan, Means::FerroflowVxlan] } else { &[] };
    let all =
        [Means::PlainAgain, Means::Ferroflow, Means::FerroflowPackets, Means::Nftables, Means::Iptables];
    for means in all.into_iter().chain(tunnels.iter().copied()) {
        match set_up(sandbox, means, &scale, &Setting { cpu, changes: plan.changes, what }, report) {
            Ok(Ok(arena)) => _ = arenas.ready.insert(means, arena),
            Ok(Err(missing)) => _ = arenas.missing.insert(means, missing),
            Err(error) => report.fail(&format!("{means:?}"), size, &error)?,
        }
        say(&format!("{means:?} is set up"));
    }
    let effort = Effort { pairs: plan.pairs, time: plan.time };
    compare::compare(&arenas, &scale, (Kind::Short, Place::SameNode), effort, report)?;
    say("short connections");
    if what == What::Everything {
        for (kind, place) in [
            (Kind::Short, Place::BetweenNodes),
            (Kind::RoundTrip, Place::SameNode),
            (Kind::RoundTrip, Place::BetweenNodes),
            (Kind::Stream, Place::SameNode),
            (Kind::Stream, Place::BetweenNodes),
        ] {
            compare::compare(&arenas, &scale, (kind, place), effort, report)?;
            say(&format!("{kind:?} {place:?}"));
        }
    }
    Ok(())
}

/// The agent alone, which grows with the cluster where the programs do not.
fn measure_alone(sandbox: &Sandbox, plan: &Plan, size: usize, report: &mut Report) -> Result<()> {
    let start = Instant::now();
    let cpu = thread::available_parallelism()?.get() - 1;
    let mut arena = Arena::new(sandbox, Means::Ferroflow, cpu)?;
    let scale = Scale::new(size, arena.cluster.pod(NEAR).v4, arena.cluster.pod(FAR).v4);
    scale.write(&arena.cluster)?;
    if let Err(error) = measure_control(sandbox, &mut arena, (&scale, plan.changes), report) {
        report.fail("programming/cold-start/ferroflow", size, &error)?;
    }
    eprintln!("bench: {size} services: the agent alone ({:.0} s)", start.elapsed().as_secs_f64());
    Ok(())
}

struct Setting {
    cpu: usize,
    changes: u8,
    what: What,
}

/// A cluster under these means; inside, `Err` says what this machine lacks.
fn set_up(
    sandbox: &Sandbox,
    means: Means,
    scale: &Scale,
    setting: &Setting,
    report: &mut Report,
) -> Result<Result<Arena, String>> {
    let size = scale.services().len();
    let rules = match means {
        Means::Nftables => Some(Rules::Nftables),
        Means::Iptables => Some(Rules::Iptables),
        Means::Plain
        | Means::PlainAgain
        | Means::Ferroflow
        | Means::FerroflowPackets
        | Means::Vxlan
        | Means::FerroflowVxlan => None,
    };
    if let Some(Err(missing)) = rules.map(Rules::version) {
        return Ok(Err(missing));
    }
    let mut arena = Arena::new(sandbox, means, setting.cpu)?;
    if let Some(rules) = rules {
        let name = if rules == Rules::Nftables { "nftables" } else { "iptables" };
        let nodes = if setting.what == What::Everything { Nodes::All } else { Nodes::First };
        let figure = format!("programming/rules/{name}");
        let Some(took) = arena.apply(rules, scale, nodes)? else {
            let why = format!("its rules are not loaded after {} s", LOADING_LIMIT.as_secs());
            report.skip(&figure, size, &why)?;
            return Ok(Err(why));
        };
        report.add_value(&figure, size, (took.as_secs_f64(), "s"))?;
    }
    let room = scale.max_endpoints().to_string();
    match means {
        Means::Ferroflow => {
            scale.write(&arena.cluster)?;
            measure_control(sandbox, &mut arena, (scale, setting.changes), report)?;
            start_agents(&mut arena, &["--routing", "native", "--max-endpoints", &room])?;
        }
        Means::FerroflowPackets => {
            scale.write(&arena.cluster)?;
            let args = ["--routing", "native", "--socket-lb", "off", "--max-endpoints", &room];
            start_agents(&mut arena, &args)?;
        }
        Means::FerroflowVxlan => {
            scale.write(&arena.cluster)?;
            start_agents(&mut arena, &["--routing", "vxlan", "--max-endpoints", &room])?;
        }
        Means::Plain | Means::PlainAgain | Means::Nftables | Means::Iptables | Means::Vxlan => {}
    }
    Ok(Ok(arena))
}

fn start_agents(arena: &mut Arena, args: &[&str]) -> Result<()> {
    arena.start_agents(args)?;
    for (agent, node) in arena.agents.iter().zip(arena.cluster.nodes()) {
        control::wait_in_sync(agent, &node.bpffs.join("maps"))?;
    }
    Ok(())
}

/// Leaves the agent of the first node running.
fn measure_control(
    sandbox: &Sandbox,
    arena: &mut Arena,
    (scale, changes): (&Scale, u8),
    report: &mut Report,
) -> Result<()> {
    let size = scale.services().len();
    let life = control::life(arena, scale, changes)?;
    report.add_value("programming/cold-start/ferroflow", size, (life.cold_start.as_secs_f64(), "s"))?;
    if size == 10 {
        report.add_value("memory/idle/ferroflow", size, (life.memory_in_sync, "MB"))?;
    }
    report.add_value("memory/in-sync/ferroflow", size, (life.memory_in_sync, "MB"))?;
    report.add_value("memory/after-changes/ferroflow", size, (life.memory_after_changes, "MB"))?;
    add_changes(report, ("file", size), &life.changes)?;
    let less: Vec<_> = life.changes.iter().map(|took| took.saturating_sub(control::settling())).collect();
    add_changes(report, ("file-less-settling", size), &less)?;

    match control::stages(sandbox, arena, scale, changes) {
        Ok(stages) => {
            report.add_value("programming/reading/ferroflow", size, (stages.reading.as_secs_f64(), "s"))?;
            report.add_value(
                "programming/tables/ferroflow",
                size,
                (stages.programming.as_secs_f64(), "s"),
            )?;
            add_changes(report, ("tables", size), &stages.changes)
        }
        Err(error) => report.fail("programming/tables/ferroflow", size, &error),
    }
}

fn add_changes(report: &mut Report, (what, size): (&str, usize), took: &[Duration]) -> Result<()> {
    let millis: Vec<_> = took.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    for (name, percent) in [("change-p50", 50), ("change-p99", 99)] {
        if let Some(value) = stats::percentile(&millis, percent) {
            report.add_value(&format!("{name}/{what}/ferroflow"), size, (value, "ms"))?;
        }
    }
    Ok(())
}

/// The rate at the largest size against that at the smallest, each as a share of plain routing at its time.
fn add_flatness(report: &mut Report) -> Result<()> {
    let means = ["ferroflow", "ferroflow-packets", "nftables", "iptables-late"];
    for (what, means) in ["short", "short-p50"].iter().flat_map(|what| means.map(|means| (what, means))) {
        let name = format!("{what}/same-node/cluster-ip/{means}");
        let of_name =
            || report.figures().iter().filter(|figure| figure.figure == name && figure.ratio.is_some());
        let (Some(first), Some(last)) = (of_name().next(), of_name().next_back()) else { continue };
        let (Some(small), Some(large), services) = (first.ratio, last.ratio, last.services) else { continue };
        if services > first.services {
            report.add_ratio(&format!("{name}-flat"), services, large / small)?;
        }
    }
    Ok(())
}

/// What one more service costs the agent from each size to the next, as a share of what it cost up to there: a line that
/// bends upwards has ratios below one there.
fn add_slopes(report: &mut Report) -> Result<()> {
    for what in ["programming/reading", "programming/tables", "memory/in-sync"] {
        let name = format!("{what}/ferroflow");
        let all = report.figures().iter().filter(|figure| figure.figure == name);
        let points: Vec<_> = all.filter_map(|it| Some((it.services, it.value?))).collect();
        for (services, ratio) in slopes(&points) {
            report.add_ratio(&format!("{name}-slope"), services, ratio)?;
        }
    }
    Ok(())
}

/// Of each size but the first two: the slope up to the size before, as a share of the slope from there. None where there
/// was no slope.
fn slopes(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let slope = |from: (usize, f64), to: (usize, f64)| (to.1 - from.1) / (to.0 as f64 - from.0 as f64);
    let Some((first, _)) = points.split_first() else { return Vec::new() };
    let ratios =
        points.windows(2).skip(1).map(|pair| (pair[1].0, slope(*first, pair[0]) / slope(pair[0], pair[1])));
    ratios.filter(|(_, ratio)| ratio.is_finite() && *ratio > 0.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_bends_is_told_from_a_straight_one() {
        assert_eq!(slopes(&[(10, 1.0), (110, 2.0), (210, 3.0), (310, 5.0)]), [(210, 1.0), (310, 0.5)]);
        assert_eq!(slopes(&[(10, 1.0), (110, 1.0), (210, 1.0)]), [], "nothing grows");
        assert_eq!(slopes(&[(10, 1.0)]), []);
    }
}
