//! `ferroflow prepare`, `doctor` and `cleanup --all`: about the machine instead of the tables.

use clap::Args;
use serde_json::json;

use super::table::table;
use super::{Answer, CliError, cleanup};
use crate::config::Query;
use crate::kube_proxy::Mode;
use crate::node::doctor::{self, Finding, Grade, Subject};
use crate::node::remove::{self, Running, Thing};
use crate::node::{Places, prepare};

#[derive(Args, Debug)]
pub struct Doctor {
    #[command(flatten)]
    pub(super) query: Query,
    #[command(flatten)]
    places: Places,
    /// The root of cgroup2 [default: where cgroup2 is mounted]
    #[arg(long, env = "FERROFLOW_CGROUP", value_name = "DIR")]
    cgroup: Option<std::path::PathBuf>,
}

#[derive(Args, Debug)]
pub struct Cleanup {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    caution: Caution,

    /// Only print what would be removed
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    pub(super) query: Query,
    #[command(flatten)]
    places: Places,
}

#[derive(Args, Debug)]
struct Target {
    /// Everything of Ferroflow instead: programs, tables, pods' links, the network plugin, directories
    #[arg(long)]
    all: bool,
}

#[derive(Args, Debug)]
struct Caution {
    /// Also while an agent runs, which may put things back
    #[arg(long)]
    force: bool,
}

pub(super) fn prepare(asked: &prepare::Prepare) -> Result<Answer, CliError> {
    let done = prepare::run(asked)?;
    Ok(Answer { table: done.join("\n"), json: json!({ "done": true, "steps": done }) })
}

/// The answer, and how many checks failed.
pub(super) fn doctor(asked: &Doctor) -> Result<(Answer, usize), CliError> {
    let Doctor { query, places, cgroup } = asked;
    let subject = Subject { bpffs: query.bpffs.clone(), cgroup: cgroup.clone(), places: places.clone() };
    let findings = doctor::examine(&subject);
    let failed = findings.iter().filter(|finding| finding.grade == Grade::Fail).count();
    let mut lines: Vec<[String; 3]> = Vec::new();
    for Finding { check, grade, found, fix } in &findings {
        lines.push([grade.as_str().to_owned(), (*check).to_owned(), found.clone()]);
        lines.extend(fix.iter().map(|fix| [String::new(), String::new(), format!("-> {fix}")]));
    }
    let answer = Answer {
        table: table(["", "CHECK", "FOUND"], lines),
        json: json!({ "failed": failed, "findings": findings }),
    };
    Ok((answer, failed))
}

/// What was removed, and what could not be.
pub(super) fn cleanup(asked: &Cleanup) -> Result<(Answer, usize), CliError> {
    let Cleanup { target: Target { all }, caution: Caution { force }, dry_run, query, places } = asked;
    if !all {
        let mode = if *dry_run { Mode::DryRun } else { Mode::Remove };
        return Ok((cleanup::cleanup(mode)?, 0));
    }
    let running = if *force || *dry_run { Running::Ignore } else { Running::Refuse };
    let found = remove::find(&query.bpffs, places, running)?;
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for thing in &found {
        match if *dry_run { Ok(()) } else { remove::remove(thing) } {
            Ok(()) => removed.push(thing),
            Err(error) => failed.push(format!("{thing}: {error}")),
        }
    }
    let verb = if *dry_run { "would remove" } else { "removed" };
    let mut lines: Vec<_> = removed.iter().map(|thing| format!("{verb} {thing}")).collect();
    lines.extend(failed.iter().map(|what| format!("cannot remove {what}")));
    if found.is_empty() {
        lines.push("nothing of Ferroflow is here".to_owned());
    }
    let removed: Vec<_> = removed.into_iter().map(Thing::to_string).collect();
    let json = json!({ "done": !dry_run, "removed": removed, "failed": failed });
    Ok((Answer { table: lines.join("\n"), json }, failed.len()))
}
