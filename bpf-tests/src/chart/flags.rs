//! The command lines of the chart, parsed by the binary that they are for: a flag that was renamed is found here and not
//! on the first node.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use ferroflow::health::server::PROXY_PORT;
use serde_json::Value;

pub(super) struct Flags {
    binary: OsString,
    parsed: BTreeSet<Vec<String>>,
}

impl Flags {
    pub(super) fn new() -> Result<Self> {
        let binary =
            env::var_os("FERROFLOW_BIN").context("FERROFLOW_BIN is not set: run `cargo xtask chart`")?;
        Ok(Self { binary, parsed: BTreeSet::new() })
    }

    /// How many different command lines were tried.
    pub(super) fn parsed(&self) -> usize {
        self.parsed.len()
    }

    /// # Errors
    /// What the binary does not take, in its words; a health port that is not the agent's.
    pub(super) fn check(&mut self, object: &Value) -> Result<()> {
        let pod = &object["spec"]["template"]["spec"];
        for list in ["initContainers", "containers"] {
            for container in pod[list].as_array().into_iter().flatten() {
                let args: Vec<String> = serde_json::from_value(container["args"].clone())
                    .with_context(|| format!("{}: args", container["name"]))?;
                self.parse(args)?;
                self.environment(container)?;
                health_port(container)?;
            }
        }
        Ok(())
    }

    /// `--help` at the end makes it stop before it does anything, after it has read what precedes.
    fn parse(&mut self, args: Vec<String>) -> Result<()> {
        if !self.parsed.insert(args.clone()) {
            return Ok(());
        }
        let output = Command::new(&self.binary).args(&args).arg("--help").env_clear().output()?;
        if output.status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("`ferroflow {}`: {}", args.join(" "), complaint.lines().next().unwrap_or_default())
    }

    /// Variables of ours stand for flags, and nothing complains of one that is not known.
    fn environment(&self, container: &Value) -> Result<()> {
        /// What is logged: no flag.
        const LOG: &str = "FERROFLOW_LOG";
        let names = container["env"].as_array().into_iter().flatten().filter_map(|it| it["name"].as_str());
        for name in names.filter(|name| name.starts_with("FERROFLOW_") && *name != LOG) {
            let help = Command::new(&self.binary).args(["agent", "--help"]).env_clear().output()?;
            let known = String::from_utf8_lossy(&help.stdout).contains(&format!("[env: {name}="));
            ensure!(known, "the agent has no variable {name}");
        }
        Ok(())
    }
}

fn health_port(container: &Value) -> Result<()> {
    let ports = container["ports"].as_array().into_iter().flatten();
    for port in ports.filter(|port| port["name"] == "health") {
        ensure!(port["containerPort"] == PROXY_PORT, "the agent's health port is {PROXY_PORT}");
    }
    Ok(())
}
