//! The compiled tables of policies against the oracle. Needs neither root nor a kernel.
//!
//! A case that goes wrong is made as small as it can be and kept in `cases/policy/`; every file there is run again.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result};
use bpf_tests::oracle::case::{self, Asked, Mismatch, Probes};
use bpf_tests::oracle::random;
use ferroflow_ebpf::noise::Noise;
use serde_json::Value;

const CHANGES: usize = 30;
const CLUSTERS: u64 = 300;
const PROBES: usize = 12;
/// Clusters in which an agent dies at every write of a change.
const DEATHS: u64 = 120;
/// How thoroughly a kept case is asked: there are so many questions, and chance chooses them.
const PROBES_OF_KEPT: usize = 3_000;

#[test]
fn rules_43_to_53_the_tables_say_what_the_api_says() -> Result<()> {
    let asked = compare(CLUSTERS, |_| CHANGES, case::run)?;
    assert!(asked.total() >= 100_000, "{asked:?}");
    let fewest = asked.passes.min(asked.dropped).min(asked.told);
    assert!(fewest > asked.total() / 50, "one answer hardly occurs: {asked:?}");
    Ok(())
}

#[test]
fn rule_54_no_write_opens_a_window_and_a_death_leaves_none() -> Result<()> {
    let asked = compare(DEATHS, |noise| 8 + noise.below(CHANGES - 8), case::run_deaths)?;
    assert!(asked.total() >= 10_000, "{asked:?}");
    Ok(())
}

type Run = fn(&[Value], Probes, &mut Asked) -> Result<Option<Mismatch>>;

/// Runs so many random cases; the first that goes wrong is shrunk and kept.
fn compare(clusters: u64, changes: impl Fn(&mut Noise) -> usize, run: Run) -> Result<Asked> {
    // Another start gives other clusters: `POLICY_SEED=7 cargo test -p bpf-tests --test policy`.
    let first: u64 = match env::var("POLICY_SEED") {
        Ok(text) => text.parse().with_context(|| format!("POLICY_SEED={text} is not a number"))?,
        Err(_) => 0,
    };
    let mut asked = Asked::default();
    for seed in first..first + clusters {
        let mut noise = Noise(seed);
        let objects: Vec<_> = (0..changes(&mut noise)).map(|_| random::object(&mut noise)).collect();
        let probes = Probes { count: PROBES, seed };
        if let Some(mismatch) = run(&objects, probes, &mut asked)? {
            let fails =
                |objects: &[Value]| matches!(run(objects, probes, &mut Asked::default()), Ok(Some(_)));
            let smallest = case::shrink(objects, |_| true, fails);
            let file = kept().join(format!("seed-{seed}.json"));
            fs::write(&file, serde_json::to_string_pretty(&smallest)?)?;
            panic!("seed {seed}: {mismatch:?}; kept in {}", file.display());
        }
    }
    println!("{} cases: {asked:?}", asked.total());
    Ok(asked)
}

#[test]
fn cases_that_once_went_wrong_go_right() -> Result<()> {
    let mut cases = 0;
    for entry in fs::read_dir(kept()).with_context(|| format!("{}", kept().display()))? {
        let path = entry?.path();
        let objects: Vec<Value> = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let probes = Probes { count: PROBES_OF_KEPT, seed: 0 };
        for run in [case::run as Run, case::run_deaths] {
            let mismatch = run(&objects, probes, &mut Asked::default())?;
            assert!(mismatch.is_none(), "{}: {mismatch:?}", path.display());
        }
        cases += 1;
    }
    assert!(cases > 0, "no case is kept in {}", kept().display());
    Ok(())
}

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/policy")
}
