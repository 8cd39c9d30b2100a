//! YAML through the directory source, and what it says through the stages behind it.
//!
//! Whatever is in the file, the source says that it has read everything, or that it could not and where; and the tables
//! take what it says.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ferroflow::maps::fake::{FakeMaps, Search, Sizes};
use ferroflow::model::Change;
use ferroflow::plan;
use ferroflow::reconcile::{Config, Limits, Reconciler};
use ferroflow::watch::file::{FileSource, Timing};
use ferroflow::watch::{Event, Problem, Source as _};
use ferroflow_ebpf::noise::Noise;

use super::{Effort, Report, corpus, mutate::mutate};
use crate::packets::cluster::NODE;
use crate::patience::stretched;

/// Longer than any small file takes to read.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn run(dir: &Path, seed: u64, effort: Effort) -> Result<Report> {
    let seeds = seeds()?;
    let mut noise = Noise(seed);
    let (mut executions, mut problems, mut objects) = (0, 0, 0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    while effort.goes_on(executions) {
        let (one, other) = (noise.below(seeds.len()), noise.below(seeds.len()));
        let bytes = mutate(&mut noise, &seeds[one], &seeds[other], 1);
        let file = dir.join("fuzzed.yaml");
        fs::write(&file, &bytes).with_context(|| format!("write {}", file.display()))?;
        let said = runtime.block_on(read(dir)).and_then(|said| {
            program(&said.changes)?;
            Ok(said)
        });
        let said = said.with_context(|| format!("document:\n{}", String::from_utf8_lossy(&bytes)))?;
        executions += 1;
        problems += said.problems.len() as u64;
        objects += said.changes.len() as u64;
    }
    let outcomes = vec![("objects", objects), ("problems told", problems)];
    Ok(Report { target: "documents", executions, outcomes })
}

#[derive(Default)]
struct Said {
    changes: Vec<Change>,
    problems: Vec<Problem>,
}

/// All that the source says of the directory at first.
async fn read(dir: &Path) -> Result<Said> {
    let (sender, mut events) = tokio::sync::mpsc::channel(1024);
    let source = tokio::spawn(FileSource::new(dir, NODE, Timing::default()).run(sender));
    let mut said = Said::default();
    let limit = stretched(LIMIT);
    loop {
        let event = tokio::time::timeout(limit, events.recv()).await.context("the source hangs")?;
        match event {
            Some(Event::Change(change)) => said.changes.push(change),
            Some(Event::Problems(problems)) => said.problems.extend(problems),
            Some(Event::Synced) => break,
            Some(Event::Contact(_) | Event::Triggered { .. }) => {}
            None => {
                source.await.context("the source panics")?;
                anyhow::bail!("the source ends");
            }
        }
    }
    source.abort();
    for Problem { place, message, .. } in &said.problems {
        ensure!(place.contains("fuzzed.yaml"), "a problem is somewhere: {place}: {message}");
        ensure!(!message.is_empty(), "a problem at {place} is not said");
    }
    Ok(said)
}

/// Plans and writes all of it.
fn program(changes: &[Change]) -> Result<()> {
    let maps = FakeMaps::new(Sizes { hash: 1_000, slots: 8_000, backends: 1_000 }, Search::EveryWrite);
    let limits = Limits { services: 1_000, frontends: 1_000 };
    let plan = plan::Config::default();
    let config = Config { node: NODE.into(), limits, plan, grace: Duration::ZERO, clock: || 0 };
    let mut now = Instant::now();
    let mut reconciler = Reconciler::restore(maps, &config, now)?;
    for change in changes {
        reconciler.handle(change.clone(), now);
    }
    reconciler.synced();
    while let Some(due) = reconciler.due().filter(|_| reconciler.failing().next().is_none()) {
        now = now.max(due);
        reconciler.tick(now);
    }
    // What cannot be written is said by name.
    for (key, error) in reconciler.failing() {
        ensure!(!error.is_empty(), "{key} fails without a word");
    }
    Ok(())
}

fn seeds() -> Result<Vec<Vec<u8>>> {
    let dir = corpus("documents");
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    ensure!(!paths.is_empty(), "{} is empty", dir.display());
    paths.iter().map(|path| fs::read(path).with_context(|| format!("read {}", path.display()))).collect()
}
