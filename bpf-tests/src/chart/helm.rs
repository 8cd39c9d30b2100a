//! Helm's engine, in a process of Python.

use std::collections::BTreeMap;
use std::env;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
pub(super) struct Answer {
    /// Helm's version.
    pub(super) helm: String,
    /// What values.yaml says.
    pub(super) defaults: Value,
    /// In the order of the cases.
    pub(super) rendered: Vec<Rendered>,
    pub(super) lint: Vec<Message>,
    pub(super) package: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Rendered {
    /// By the path of their template.
    Manifests(BTreeMap<String, String>),
    Error(String),
}

impl Rendered {
    /// Why it was refused; empty where it was not.
    pub(super) fn error(&self) -> &str {
        match self {
            Self::Manifests(_) => "",
            Self::Error(error) => error,
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Message {
    /// 1 recommends, 2 warns, 3 is an error.
    pub(super) severity: u8,
    pub(super) path: String,
    pub(super) error: String,
}

/// # Errors
/// Where Helm does not run at all; what it says about the chart is in the answer.
pub(super) fn ask(chart: &str, cases: &[Value], out: &Path) -> Result<Answer> {
    let python = env::var_os("HELM_PYTHON").context("HELM_PYTHON is not set: run `cargo xtask chart`")?;
    let mut helm = Command::new(&python);
    helm.args(["-c", include_str!("helm.py")]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = helm.spawn().with_context(|| format!("cannot start {}", python.display()))?;
    let question = json!({ "chart": chart, "cases": cases, "out": out });
    let mut input = child.stdin.take().context("no pipe to Helm")?;
    input.write_all(question.to_string().as_bytes()).context("cannot write to Helm")?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("Helm ended with {}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("Helm's answer makes no sense")
}
