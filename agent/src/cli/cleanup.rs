//! `ferroflow cleanup`.

use serde_json::json;

use super::{Answer, CliError};
use crate::kube_proxy::{self, Cleaned, Mode};

pub(super) fn cleanup(mode: Mode) -> Result<Answer, CliError> {
    let Cleaned { removed, notes } = kube_proxy::clean(mode)?;
    let verb = match mode {
        Mode::DryRun => "would remove",
        Mode::Remove => "removed",
    };
    let mut lines: Vec<_> = removed.iter().map(|what| format!("{verb} {what}")).collect();
    if removed.is_empty() {
        lines.push("nothing of kube-proxy is here".to_owned());
    }
    lines.extend(notes.iter().map(|note| format!("note: {note}")));
    let done = mode == Mode::Remove;
    Ok(Answer { table: lines.join("\n"), json: json!({ "done": done, "rules": removed, "notes": notes }) })
}
