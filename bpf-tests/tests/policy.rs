//! The compiled tables of policies against the oracle. Needs neither root nor a kernel.
//!
//! A case that goes wrong is made as small as it can be and kept in `cases/policy/`; every file there is run again.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result};
use bpf_tests::oracle::case::{self, Asked, Probes};
use bpf_tests::oracle::random;
use ferroflow_ebpf::noise::Noise;
use serde_json::Value;

const CHANGES: usize = 30;
const CLUSTERS: u64 = 300;
const PROBES: usize = 12;
/// How thoroughly a kept case is asked: there are so many questions, and chance chooses them.
const PROBES_OF_KEPT: usize = 20_000;

#[test]
fn rules_43_to_53_the_tables_say_what_the_api_says() -> Result<()> {
    // Another start gives other clusters: `POLICY_SEED=7 cargo test -p bpf-tests --test policy`.
    let first: u64 = match env::var("POLICY_SEED") {
        Ok(text) => text.parse().with_context(|| format!("POLICY_SEED={text} is not a number"))?,
        Err(_) => 0,
    };
    let mut asked = Asked::default();
    for seed in first..first + CLUSTERS {
        let mut noise = Noise(seed);
        let objects: Vec<_> = (0..CHANGES).map(|_| random::object(&mut noise)).collect();
        let probes = Probes { count: PROBES, seed };
        if let Some(mismatch) = case::run(&objects, probes, &mut asked)? {
            let fails =
                |objects: &[Value]| matches!(case::run(objects, probes, &mut Asked::default()), Ok(Some(_)));
            let smallest = case::shrink(objects, fails);
            let file = kept().join(format!("seed-{seed}.json"));
            fs::write(&file, serde_json::to_string_pretty(&smallest)?)?;
            panic!("seed {seed}: {mismatch:?}; kept in {}", file.display());
        }
    }
    println!("{} cases: {asked:?}", asked.total());
    assert!(asked.total() >= 100_000, "{asked:?}");
    let fewest = asked.passes.min(asked.dropped).min(asked.told);
    assert!(fewest > asked.total() / 50, "one answer hardly occurs: {asked:?}");
    Ok(())
}

#[test]
fn cases_that_once_went_wrong_go_right() -> Result<()> {
    let mut cases = 0;
    for entry in fs::read_dir(kept()).with_context(|| format!("{}", kept().display()))? {
        let path = entry?.path();
        let objects: Vec<Value> = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let probes = Probes { count: PROBES_OF_KEPT, seed: 0 };
        let mismatch = case::run(&objects, probes, &mut Asked::default())?;
        assert!(mismatch.is_none(), "{}: {mismatch:?}", path.display());
        cases += 1;
    }
    assert!(cases > 0, "no case is kept in {}", kept().display());
    Ok(())
}

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/policy")
}
