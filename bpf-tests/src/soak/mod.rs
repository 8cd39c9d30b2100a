//! A cluster that is never left alone: services, endpoints, pods and policies come and go, agents are killed and
//! upgraded, their API fails, what they attached is removed, and all the while pods and a host talk through a service.
//! Nothing of that talk may be lost, and when all that came has gone, nothing may be left of it.
//!
//! ```text
//!   base ──churn and faults, deaths too──▶ base: the same rows, leases, interfaces, pins
//!        ──new agents──▶ round, round, round ..  each the same changes and faults without deaths, back to the base:
//!                        the same rows and open files; memory no more than it settled at (see `memory`)
//!        ──traffic ends──▶ nothing lost; its flows are forgotten
//! ```

mod census;
mod churn;
mod fault;
mod memory;

use std::{
    collections::BTreeMap,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Parser;
use ferroflow::maps::kernel::KernelMaps;
use ferroflow_ebpf::noise::Noise;
use nix::unistd::geteuid;

use self::{
    census::{Census, flows},
    churn::{Churn, Deaths},
    memory::Rounds,
};
use crate::{agent::Agent, checks::World, patience::stretched, pod, sandbox::Sandbox, steady::Traffic};

/// Agents under churn, faults and traffic for a while; what leaks or is lost fails it.
#[derive(Debug, Parser)]
#[command(name = "soak")]
struct Cli {
    /// How long things come and go
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// What comes and goes, what fails, and in which order, follows from this
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What is judged at the end, one line each.
#[derive(Debug, Default)]
struct Report {
    checks: usize,
    passed: usize,
}

pub fn main() -> ExitCode {
    pod::run_if_asked();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(report) => {
            println!("soak: {} checks, {} passed", report.checks, report.passed);
            if report.passed == report.checks { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("soak: {error:#}\nsoak: again with --minutes {} --seed {}", cli.minutes, cli.seed);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Report> {
    ensure!(geteuid().is_root(), "network namespaces and BPF programs need root");
    println!("soak: {} minutes, seed {}", cli.minutes, cli.seed);
    let sandbox = Sandbox::enter()?;
    sandbox.exit_on_signals()?;
    let (world, runtimes) = World::attached_over_api(&sandbox, &[])?;
    let mut churn = Churn::new(world, runtimes, cli.seed);
    let result = soak(&mut churn, Duration::from_secs_f64(cli.minutes * 60.0), cli.seed);
    result.map_err(|error| anyhow!("{error:#}\n{}", churn.world.logs()))
}

fn soak(churn: &mut Churn, time: Duration, seed: u64) -> Result<Report> {
    let mut report = Report::default();
    let traffic = Traffic::start(&churn.world.cluster, &churn.world.web)?;
    traffic.flows()?;
    let base = Census::take(churn)?;
    println!("at first:\n{base}");
    let end = Instant::now() + time * 2 / 5;
    while Instant::now() < end {
        churn_for(churn, STEPS, Deaths::Some, &traffic).context("with agents that die")?;
    }
    churn.restore()?;
    let after = wait_for_base(churn, |now| now.differs(&base)).context("after churn with agents that die")?;
    println!("after {} changes:\n{after}", churn.changes());
    let same = format!("{} kinds of rows, leases, interfaces and pins are as at first", base.kinds());
    report.add("after churn and deaths", Ok(same));
    renew(churn)?;
    rounds(churn, (&base, &traffic), time * 3 / 5, seed, &mut report)?;
    judge(churn, traffic, &mut report)?;
    Ok(report)
}

/// New agents of another process, which have no memory of what came before. Their threads keep nothing for themselves
/// that is free (glibc's `tcache`, up to 230 KB each), which would count as allocated.
fn renew(churn: &mut Churn) -> Result<()> {
    churn.world.agents.iter_mut().try_for_each(|agent| {
        agent.kill9()?;
        agent.restart_with(&[("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")])?;
        agent.wait_synced().map(drop)
    })
}

/// The same changes again and again, for this time and often enough to judge.
fn rounds(
    churn: &mut Churn,
    (base, traffic): (&Census, &Traffic),
    time: Duration,
    seed: u64,
    report: &mut Report,
) -> Result<()> {
    let mut memory: BTreeMap<String, Rounds> = BTreeMap::new();
    let (end, mut warm) = (Instant::now() + time, None);
    let mut done = 0;
    while Instant::now() < end || done < memory::LEAST {
        churn.noise = Noise(seed);
        churn_for(churn, STEPS, Deaths::None, traffic).context("without deaths")?;
        churn.restore()?;
        let grew = |now: &Census| warm.as_ref().and_then(|warm| now.grew(warm));
        let now = wait_for_base(churn, |now| now.differs(base).or_else(|| grew(now)));
        let now = now.with_context(|| format!("after round {done}"))?;
        now.heap().for_each(|(node, heap)| memory.entry(node.clone()).or_default().push(heap));
        done += 1;
        // What an agent has open once it has done everything that it does, it may keep.
        if warm.is_none() && done == 2 {
            warm = Some(now);
        }
    }
    println!("after {done} rounds, {} changes in all:\n{}", churn.changes(), Census::take(churn)?);
    let same = format!("{} kinds of things and the open files are the same after each", base.kinds());
    report.add(&format!("{done} equal rounds"), Ok(same));
    for (node, rounds) in memory {
        println!("allocated by the agent of {node}, round by round: {rounds}");
        let seen = match rounds.growth() {
            None => Ok(format!("settled, over {} rounds", rounds.len())),
            Some(bytes) => {
                Err(anyhow!("{bytes} bytes more in the last quarter than in the second: {rounds}"))
            }
        };
        report.add(&format!("memory of {node}"), seen);
    }
    Ok(())
}

/// What became of the traffic, and of its traces.
fn judge(churn: &Churn, traffic: Traffic, report: &mut Report) -> Result<()> {
    for (kind, total) in traffic.totals()? {
        report.add(&kind.to_string(), total.verdict());
        for made in total.lost_at {
            println!("around what was lost: {}", churn.done_around(made));
        }
    }
    for node in churn.world.cluster.nodes() {
        let drops = KernelMaps::open(&node.bpffs.join("maps"))?.drops()?;
        let drops: Vec<_> = drops.iter().filter(|(_, count)| *count > 0).collect();
        println!("dropped by the programs of {}: {drops:?}", node.name);
    }
    for (fault, count) in churn.faults() {
        println!("{fault}: {count} times");
    }
    let missing = fault::Fault::ALL.iter().filter(|fault| !churn.faults().contains_key(fault));
    let missing: Vec<_> = missing.map(ToString::to_string).collect();
    if !missing.is_empty() {
        println!("did not happen in this time: {}", missing.join(", "));
    }
    println!("waiting until flows that nobody uses are forgotten");
    let forgotten = forgotten(churn).map(|()| "no entry is left, so no source port either".to_owned());
    report.add("flows", forgotten);
    Ok(())
}

/// As long as a flow may live that was used last, and the sweep after.
fn forgotten(churn: &Churn) -> Result<()> {
    let deadline = Instant::now() + stretched(FORGOTTEN);
    for node in churn.world.cluster.nodes() {
        loop {
            let left = flows(node)?;
            if left == 0 {
                break;
            }
            ensure!(Instant::now() < deadline, "{left} entries of {} are left", node.name);
            thread::sleep(Duration::from_secs(1));
        }
    }
    Ok(())
}

fn churn_for(churn: &mut Churn, steps: usize, deaths: Deaths, traffic: &Traffic) -> Result<()> {
    for _ in 0..steps {
        churn.step(deaths)?;
        thread::sleep(PAUSE);
    }
    traffic.flows()
}

/// Released numbers rest, and a sweep is every ten seconds.
fn wait_for_base(churn: &mut Churn, differs: impl Fn(&Census) -> Option<String>) -> Result<Census> {
    churn.world.agents.iter_mut().try_for_each(|agent: &mut Agent| agent.wait_synced().map(drop))?;
    let deadline = Instant::now() + stretched(SETTLE);
    loop {
        let now = Census::take(churn)?;
        let Some(difference) = differs(&now) else { return Ok(now) };
        ensure!(Instant::now() < deadline, "{difference} is left\n{now}");
        thread::sleep(Duration::from_millis(500));
    }
}

impl Report {
    fn add(&mut self, what: &str, seen: Result<String>) {
        self.checks += 1;
        self.passed += usize::from(seen.is_ok());
        let (text, ok) = match seen {
            Ok(text) => (text, "yes"),
            Err(error) => (format!("{error:#}"), "NO"),
        };
        println!("{what:<24}  {text}  {ok}");
    }
}

const STEPS: usize = 100;
const PAUSE: Duration = Duration::from_millis(30);
const SETTLE: Duration = Duration::from_secs(60);
const FORGOTTEN: Duration = Duration::from_secs(180);
