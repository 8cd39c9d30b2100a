//! The tables that each scenario expects, by the agent's stages over tables in memory. Needs neither root nor a kernel.
//!
//! `SCENARIOS=write cargo test -p bpf-tests --test tables` writes what they hold into the files; look at the difference.
#![forbid(unsafe_code)]

use std::path::Path;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::packets::{
    case::Step,
    control::{Control, Interfaces},
    random,
    scenario::{self, Scenario},
    tables,
};
use ferroflow::maps::fake::{FakeMaps, Search, Sizes};
use ferroflow::reconcile::Limits;

#[test]
fn tables_hold_what_scenarios_say() -> Result<()> {
    let write = env::var_os("SCENARIOS").is_some_and(|value| value == "write");
    let (mut compared, mut wrong) = (0, Vec::new());
    for path in scenario::files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios"))? {
        let name = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("read {name}"))?;
        let scenario: Scenario = text.parse().with_context(|| name.to_string())?;
        let held = held(&scenario).with_context(|| name.to_string())?;
        compared += held.len();
        let expected: Vec<_> = scenario.tables.iter().map(|(_, lines)| lines.clone()).collect();
        if write {
            fs::write(&path, scenario::with_tables(&text, &held)).with_context(|| format!("write {name}"))?;
        } else if held != expected {
            wrong.push(format!("{name}: the tables hold\n{held:#?}\nand not\n{expected:#?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(compared >= 12, "only {compared} tables are compared");
    Ok(())
}

/// What the tables hold at each place where the scenario says something of them, beside what they hold at its
/// beginning.
fn held(scenario: &Scenario) -> Result<Vec<Vec<String>>> {
    let maps = FakeMaps::new(Sizes { hash: 1_000, slots: 4_000, backends: 500 }, Search::EveryWrite);
    let limits = Limits { services: 100, frontends: 1_000 };
    let mut control = Control::new(maps, limits, Interfaces::imagined(), scenario.configuration)?;
    random::ground().iter().try_for_each(|object| control.apply(object))?;
    let ground = tables::lines(control.maps())?;
    let mut held = Vec::new();
    let mut steps = scenario.steps.iter();
    let mut done = 0;
    for (at, _) in &scenario.tables {
        for step in steps.by_ref().take(at - done) {
            if let Step::Apply(object) = step {
                control.apply(object)?;
            }
        }
        done = *at;
        let mut lines = tables::lines(control.maps())?;
        lines.retain(|line| !ground.contains(line));
        held.push(lines);
    }
    Ok(held)
}
