//! A cluster that is never left alone: services, endpoints, pods and policies come and go, agents are killed, their API
//! fails, and all the while pods talk through a service. Nothing of that talk may be lost, and when all that came has
//! gone, nothing may be left of it.
//!
//! ```text
//!   base ──churn, kill -9, API faults──▶ base: the same rows, leases, links
//!        ──restart──▶ measure ──churn, API faults──▶ base: also the same open files
//! ```

mod census;
mod churn;

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Parser;
use nix::unistd::geteuid;

use self::{
    census::Census,
    churn::{Churn, Deaths},
};
use crate::{agent::Agent, checks::World, pod, sandbox::Sandbox, steady::Traffic};

/// Agents under churn, faults and traffic for a while; what leaks or is lost fails it.
#[derive(Debug, Parser)]
#[command(name = "soak")]
struct Cli {
    /// How long things come and go
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// What comes and goes, and when, follows from this
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn main() -> ExitCode {
    pod::run_if_asked();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(geteuid().is_root(), "network namespaces and BPF programs need root");
    let sandbox = Sandbox::enter()?;
    sandbox.exit_on_signals()?;
    let (world, runtimes) = World::attached_over_api(&sandbox, &[])?;
    let mut churn = Churn::new(world, runtimes, cli.seed);
    let result = soak(&mut churn, Duration::from_secs_f64(cli.minutes * 60.0));
    result.map_err(|error| anyhow!("{error:#}\n{}", churn.world.logs()))
}

fn soak(churn: &mut Churn, time: Duration) -> Result<()> {
    let base = Census::take(churn)?;
    println!("at first:\n{base}");
    let traffic = Traffic::start(&churn.world.cluster, &churn.world.web)?;
    traffic.flows()?;
    churn_for(churn, time / 2, Deaths::Some, &traffic).context("with agents that die")?;
    churn.restore()?;
    let after = wait_for_base(churn, |now| now.differs(&base)).context("after churn with agents that die")?;
    println!("after {} changes and {} deaths:\n{after}", churn.changes(), churn.deaths());
    churn.world.agents.iter_mut().try_for_each(|agent| {
        agent.kill9()?;
        agent.restart()?;
        agent.wait_synced().map(drop)
    })?;
    // What an agent has once it has done everything that it does, it may keep.
    churn_for(churn, time / 8, Deaths::None, &traffic).context("warming up")?;
    churn.restore()?;
    let warm = wait_for_base(churn, |now| now.differs(&base)).context("after warming up")?;
    println!("agents that have not died, warm:\n{warm}");
    churn_for(churn, time * 3 / 8, Deaths::None, &traffic).context("without deaths")?;
    churn.restore()?;
    let end = wait_for_base(churn, |now| now.differs(&base).or_else(|| now.grew(&warm)));
    let end = end.context("after churn without deaths")?;
    println!("after {} changes in all:\n{end}", churn.changes());
    traffic.finish().context("the traffic of the whole time")?;
    println!("soak: nothing lost, nothing left");
    Ok(())
}

fn churn_for(churn: &mut Churn, time: Duration, deaths: Deaths, traffic: &Traffic) -> Result<()> {
    let (end, mut look) = (Instant::now() + time, Instant::now() + LOOK);
    while Instant::now() < end {
        churn.step(deaths)?;
        if Instant::now() > look {
            traffic.flows()?;
            look = Instant::now() + LOOK;
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Released numbers rest, and a sweep is every ten seconds.
fn wait_for_base(churn: &mut Churn, differs: impl Fn(&Census) -> Option<String>) -> Result<Census> {
    churn.world.agents.iter_mut().try_for_each(|agent: &mut Agent| agent.wait_synced().map(drop))?;
    let deadline = Instant::now() + crate::patience::stretched(SETTLE);
    loop {
        let now = Census::take(churn)?;
        let Some(difference) = differs(&now) else { return Ok(now) };
        ensure!(Instant::now() < deadline, "{difference} is left\n{now}");
        thread::sleep(Duration::from_millis(500));
    }
}

const LOOK: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(30);
const SETTLE: Duration = Duration::from_secs(60);
