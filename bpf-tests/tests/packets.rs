//! Objects and packets through the agent's stages, the tables and the programs in the kernel, judged by the oracle of
//! `bpf_tests::packets`. First the scenarios that are kept, then random ones.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, thread};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bpf_tests::{
    packets::{
        case::{self, Counts, Failure, Step},
        cluster::Configuration,
        node::{self, Node},
        random,
        scenario::{self, Scenario},
    },
    runner,
    sandbox::{Place, Sandbox},
};

fn main() -> ExitCode {
    runner::main(&[
        ("every_scenario_goes_as_it_says", |sandbox| {
            in_namespace([sandbox.place()?, sandbox.place()?], every_scenario)
        }),
        ("random_packets_go_as_the_oracle_says", random_cases),
    ])
}

/// Runs on a thread in a network namespace with the interfaces of a node.
fn in_namespace<P: Send + 'static, T: Send + 'static>(
    places: P,
    test: impl FnOnce(P) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (here, _others) = node::namespace()?;
    here.run(move |_| test(places))?
}

fn every_scenario(places: [Place; 2]) -> Result<()> {
    let mut usual = Node::new(&places[0], Configuration::Usual)?;
    let mut masquerading = Node::new(&places[1], Configuration::Masquerading)?;
    let mut counts = Counts::default();
    let mut wrong = Vec::new();
    for path in scenario::files(&scenarios())? {
        let name = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("read {name}"))?;
        let scenario: Scenario = text.parse().with_context(|| name.to_string())?;
        let node = match scenario.configuration {
            Configuration::Usual => &mut usual,
            Configuration::Masquerading => &mut masquerading,
        };
        let failure = case::run(&scenario.steps, node, &mut counts).with_context(|| name.to_string())?;
        wrong.extend(failure.map(|failure| format!("{name}\n{}{failure}", scenario.title)));
    }
    ensure!(wrong.is_empty(), "{} of {} scenarios:\n{}", wrong.len(), counts.cases, wrong.join("\n"));
    ensure!(counts.cases >= 12 && counts.unsure == 0, "{counts:?}");
    println!("{counts:?}");
    Ok(())
}

/// So many cases; `PACKET_CASES` gives another number, `PACKET_SEED` other cases.
const CASES: u64 = 50_000;
/// After so many the connection tables are looked at as a whole.
const BATCH: u64 = 1_000;

fn random_cases(sandbox: &Sandbox) -> Result<()> {
    let (cases, first) = (number("PACKET_CASES", CASES)?, number("PACKET_SEED", 0)?);
    let workers = thread::available_parallelism()?.get() as u64;
    let mut running = Vec::new();
    for worker in 0..workers {
        let places = [sandbox.place()?, sandbox.place()?];
        let share = cases.div_ceil(workers);
        let seeds = first + worker * share..first + cases.min((worker + 1) * share);
        running.push(thread::spawn(|| in_namespace(places, move |places| of_both(&places, seeds))));
    }
    let mut both = [Counts::default(); 2];
    for worker in running {
        let counts = worker.join().map_err(|_panic| anyhow!("a worker panicked"))??;
        both.iter_mut().zip(counts).for_each(|(all, counts)| *all += counts);
    }
    let [mut counts, masquerading] = both;
    println!("as usual: {counts:?}\nmasquerading: {masquerading:?}");
    ensure!(masquerading.spoofed * 10 >= masquerading.cases, "few sources were another's: {masquerading:?}");
    counts += masquerading;
    let least = cases / 2;
    for (what, count) in [
        ("changed", counts.changed),
        ("refused", counts.refused),
        ("dropped", counts.dropped),
        ("barred by policies", counts.barred * 2),
        ("errors", counts.errors * 20),
        ("fragmented", counts.fragmented * 4),
    ] {
        ensure!(count >= least, "few packets were {what}: {counts:?}");
    }
    ensure!(counts.unsure < cases / 20, "the oracle is often unsure: {counts:?}");
    Ok(())
}

/// Every case of these seeds, each where it belongs.
fn of_both(places: &[Place; 2], seeds: Range<u64>) -> Result<[Counts; 2]> {
    let configurations = [Configuration::Usual, Configuration::Masquerading];
    let mut counts = [Counts::default(); 2];
    for ((place, configuration), counts) in places.iter().zip(configurations).zip(&mut counts) {
        let seeds = seeds.clone().filter(|seed| random::configuration(*seed) == configuration);
        *counts = cases_of(place, configuration, seeds)?;
    }
    Ok(counts)
}

/// Every case of these seeds, on a node of its own.
fn cases_of(place: &Place, configuration: Configuration, seeds: impl Iterator<Item = u64>) -> Result<Counts> {
    let mut node = Node::new(place, configuration)?;
    let mut counts = Counts::default();
    for seed in seeds {
        let steps = random::case(seed, configuration);
        let failure = case::run(&steps, &mut node, &mut counts).with_context(|| format!("seed {seed}"))?;
        if let Some(failure) = failure {
            let drops = node.drops()?;
            let (file, smallest) = keep(&mut node, seed, &steps, &failure)?;
            bail!("seed {seed}: {failure}\ndrops so far: {drops:?}\nkept in {}: {smallest}", file.display());
        }
        if counts.cases.is_multiple_of(BATCH) {
            nothing_is_left(&node).with_context(|| format!("by seed {seed}"))?;
        }
    }
    nothing_is_left(&node)?;
    Ok(counts)
}

fn nothing_is_left(node: &Node) -> Result<()> {
    let left = node.tracked()?;
    ensure!(left == 0, "{left} flows are tracked that the oracle does not know");
    Ok(())
}

fn number(variable: &str, usual: u64) -> Result<u64> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text} is not a number")),
        Err(_) => Ok(usual),
    }
}

/// Makes a case as small as it can be, and keeps it among the scenarios.
fn keep(node: &mut Node, seed: u64, steps: &[Step], failure: &Failure) -> Result<(PathBuf, String)> {
    let mut last = failure.clone();
    let smallest = case::shrink(steps, |steps| {
        let failure = case::run(steps, node, &mut Counts::default());
        failure.is_ok_and(|failure| failure.map(|it| last = it).is_some())
    })?;
    let file = scenarios().join(format!("seed-{seed}.txt"));
    let title = format!("Found by chance (seed {seed}).\n{last}");
    fs::write(&file, scenario::write(&title, node.configuration(), &smallest))?;
    Ok((file, last.to_string()))
}

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}
