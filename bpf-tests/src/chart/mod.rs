//! What `cargo xtask chart` runs: the Helm chart is linted, rendered with every value, decoded as Kubernetes decodes it,
//! held against the binary's own flags, and packed.
//!
//! ```text
//!  cases (values in, text out) ──▶ helm.py (Helm's own engine) ──manifests──▶ objects (strict Kubernetes types)
//!                                                                        └──▶ flags (the real binary parses its args)
//! ```
//!
//! Needs a Python with helm-python-sdk (`HELM_PYTHON`) and the binary (`FERROFLOW_BIN`); the verb brings both.

mod cases;
mod flags;
mod helm;
mod objects;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use cases::{BAD, Bad, GOOD, Good};
use helm::{Answer, Rendered};

use crate::kubelet::RENDERED;

/// The chart, from the top of the tree.
const CHART: &str = "charts/ferroflow";

pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let out = PathBuf::from(std::env::args_os().nth(1).context("name the folder for the package")?);
    let good = GOOD.iter().map(Good::values).collect::<Result<Vec<_>>>()?;
    let bad = BAD.iter().map(Bad::values).collect::<Result<Vec<_>>>()?;
    let cases: Vec<_> = good.iter().chain(&bad).cloned().collect();
    let answer = helm::ask(CHART, &cases, &out)?;
    let mut faults = Vec::new();
    faults.extend(lint(&answer));
    faults.extend(unset(&answer.defaults, &good));
    let (rendered, refused) = answer.rendered.split_at(good.len());
    let mut flags = flags::Flags::new()?;
    let mut objects = 0;
    for (case, rendered) in GOOD.iter().zip(rendered) {
        match check(case, rendered, &mut flags) {
            Ok(count) => objects += count,
            Err(error) => faults.push(format!("values `{}`: {error:#}", case.values)),
        }
    }
    faults.extend(rendered.first().and_then(kept));
    faults.extend(BAD.iter().zip(refused).filter_map(|(case, rendered)| case.fault(rendered)));
    faults.iter().for_each(|fault| eprintln!("{CHART}: {fault}"));
    if !faults.is_empty() {
        bail!("{} faults in the chart", faults.len());
    }
    println!(
        "Helm {}: {} sets of values render to {objects} valid objects, {} bad ones are refused, {} command lines parse",
        answer.helm,
        GOOD.len(),
        BAD.len(),
        flags.parsed(),
    );
    println!("{}", answer.package.display());
    Ok(())
}

/// The DaemonSet of the defaults is kept for tests that have no Helm; `CHART=write` keeps this one.
fn kept(rendered: &Rendered) -> Option<String> {
    let Rendered::Manifests(manifests) = rendered else { return None };
    let (_, text) = manifests.iter().find(|(path, _)| path.ends_with("/daemonset.yaml"))?;
    if std::env::var_os("CHART").is_some_and(|value| value == "write") {
        return std::fs::write(RENDERED, text).err().map(|error| format!("{RENDERED}: {error}"));
    }
    let same = std::fs::read_to_string(RENDERED).is_ok_and(|found| found == *text);
    (!same).then(|| {
        format!("{RENDERED} is not what the defaults render to: CHART=write cargo xtask chart writes it")
    })
}

/// Warnings count; what Helm only recommends does not.
fn lint(answer: &Answer) -> Vec<String> {
    const WARNING: u8 = 2;
    let grave = answer.lint.iter().filter(|message| message.severity >= WARNING);
    grave.map(|message| format!("lint: {}: {}", message.path, message.error)).collect()
}

/// Values that no case sets: nothing would notice that the templates forgot them.
fn unset(defaults: &Value, cases: &[Value]) -> Vec<String> {
    let set: BTreeSet<_> = cases.iter().flat_map(|values| leaves("", values)).collect();
    let covers = |leaf: &String| set.iter().any(|set| set == leaf || set.starts_with(&format!("{leaf}.")));
    let missing = leaves("", defaults).into_iter().filter(|leaf| !covers(leaf));
    missing.map(|leaf| format!("no case in bpf-tests/src/chart/cases.rs sets `{leaf}`")).collect()
}

fn leaves(path: &str, value: &Value) -> Vec<String> {
    let Some(fields) = value.as_object().filter(|fields| !fields.is_empty()) else {
        return vec![path.to_owned()];
    };
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    fields.iter().flat_map(|(name, value)| leaves(&below(name), value)).collect()
}

/// Returns how many objects it makes.
fn check(case: &Good, rendered: &Rendered, flags: &mut flags::Flags) -> Result<usize> {
    let Rendered::Manifests(manifests) = rendered else { bail!("refused: {}", rendered.error()) };
    let all = manifests.values().cloned().collect::<Vec<_>>().join("\n");
    let objects = || manifests.iter().filter(|(path, _)| path.ends_with(".yaml"));
    for part in case.has {
        if !all.contains(part) {
            bail!("`{part}` is not in what it renders");
        }
    }
    for part in case.lacks {
        if let Some((path, _)) = objects().find(|(_, text)| text.contains(part)) {
            bail!("{path}: `{part}` is in it");
        }
    }
    let mut count = 0;
    for (path, manifest) in objects() {
        for object in objects::parse(manifest).with_context(|| path.clone())? {
            objects::check(&object).with_context(|| path.clone())?;
            flags.check(&object).with_context(|| path.clone())?;
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_that_no_case_sets_is_named() {
        let defaults = json!({ "a": { "b": 1, "c": {} }, "d": [] });
        let case = json!({ "a": { "c": { "x": 1 } }, "d": [1] });
        assert_eq!(unset(&defaults, &[case]), ["no case in bpf-tests/src/chart/cases.rs sets `a.b`"]);
    }
}
