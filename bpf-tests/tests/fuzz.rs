//! A short run of every target of `bpf_tests::fuzz`, the same each time; `cargo xtask fuzz --minutes N` runs on.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Result, ensure};
use bpf_tests::{
    fuzz::{self, Effort, Report},
    runner,
    sandbox::Sandbox,
};

fn main() -> ExitCode {
    runner::main(&[
        ("no_packet_is_mangled", no_packet_is_mangled),
        ("no_document_stops_the_source", no_document_stops_the_source),
        ("rule_60_no_request_stops_the_agent", no_request_stops_the_agent),
    ])
}

fn no_packet_is_mangled(sandbox: &Sandbox) -> Result<()> {
    every_outcome(&fuzz::programs(sandbox, 1, Effort::Executions(300_000))?)
}

fn no_document_stops_the_source(sandbox: &Sandbox) -> Result<()> {
    every_outcome(&fuzz::documents(sandbox, 1, Effort::Executions(3_000))?)
}

fn no_request_stops_the_agent(sandbox: &Sandbox) -> Result<()> {
    every_outcome(&fuzz::requests(sandbox, 1, Effort::Executions(3_000))?)
}

/// A target that sees only one kind of outcome tests little.
fn every_outcome(report: &Report) -> Result<()> {
    println!("{report}");
    let least = report.executions / 200;
    ensure!(report.outcomes.iter().all(|(_, count)| *count >= least), "some outcomes hardly occur: {report}");
    Ok(())
}
