//! The service proxy that a node had before: whether it is still at work here, and the removal of its rules.
//!
//! Its rules and ours serve the same addresses. New connections are ours, because the programs see packets first. What
//! it opened before is known to the kernel's own connection tracking: while it is [`Found`], the programs leave what they
//! do not know to the stack ([`KubeProxy::Present`]). So a node is migrated without losing a connection: start the agent,
//! stop kube-proxy, and when the old connections have ended, `ferroflow cleanup`.
//!
//! Its rules are read and removed with the tools of the host (`nft`, `iptables` of both kinds), which alone know every
//! form that rules can have. Where a tool is missing, it is said.

mod rules;
mod tools;
mod tracking;

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc::Sender;

use crate::model::KubeProxy;
use rules::Removal;
use tools::{IPTABLES, Iptables};

pub use tools::ToolError;
pub use tracking::{Timeouts, keep as keep_timeouts};

/// How often it is looked for while it is here, so that its end is soon seen; and while it is not.
const WHILE_PRESENT: Duration = Duration::from_secs(5);
const WHILE_ABSENT: Duration = Duration::from_secs(60);

/// What of kube-proxy is on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// A process of that name in our network namespace.
    pub process: Option<u32>,
    /// Where it has rules, in words.
    pub rules: Vec<String>,
    /// Tools that would be needed to see rules that may be there.
    pub missing: Vec<&'static str>,
}

impl Found {
    pub fn state(&self) -> KubeProxy {
        if self.process.is_some() || !self.rules.is_empty() { KubeProxy::Present } else { KubeProxy::Absent }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(pid) => write!(f, "process {pid}")?,
            None => write!(f, "no process")?,
        }
        let rules = if self.rules.is_empty() { "none".into() } else { self.rules.join(", ") };
        write!(f, "; rules: {rules}")?;
        if self.missing.is_empty() {
            Ok(())
        } else {
            write!(f, " (cannot be seen without {})", self.missing.join(", "))
        }
    }
}

/// Looks now.
pub fn look() -> Found {
    let mut found = Found { process: process(Path::new("/proc")), ..Found::default() };
    match tools::nft_tables() {
        Ok(listing) => {
            found.rules.extend(rules::nft_tables(&listing).map(|table| format!("nftables {table}")))
        }
        Err(ToolError::Missing { tool }) => found.missing.push(tool),
        // A kernel without nf_tables has no such rules.
        Err(error @ ToolError::Failed { .. }) => tracing::debug!(%error, "no nftables rules"),
    }
    let here: Vec<_> = IPTABLES.iter().filter(|tool| tool.is_installed()).collect();
    if here.is_empty() {
        found.missing.push("iptables");
    }
    found.rules.extend(here.iter().filter(|tool| tool.has_services()).map(|tool| tool.name.to_owned()));
    found
}

/// Looks again and again, and says what changed; until the receiver is gone.
pub async fn watch(mut before: Found, events: Sender<Found>) {
    loop {
        tokio::time::sleep(match before.state() {
            KubeProxy::Present => WHILE_PRESENT,
            KubeProxy::Absent => WHILE_ABSENT,
        })
        .await;
        match tokio::task::spawn_blocking(look).await {
            Ok(found) if found == before => {}
            Ok(found) => {
                before = found.clone();
                if events.send(found).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!(%error, "the search for kube-proxy ended early"),
        }
    }
}

/// Whether rules are only named or also removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    DryRun,
    Remove,
}

/// What [`clean`] did, or would do.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// A line each.
    pub removed: Vec<String>,
    /// What could not be looked at or is not for this command, a line each.
    pub notes: Vec<String>,
}

/// Removes every rule of kube-proxy in this network namespace, and nothing else; where there is none it does nothing.
///
/// # Errors
/// What a tool said. What was removed before stays removed, and a second run goes on.
pub fn clean(mode: Mode) -> Result<Cleaned, ToolError> {
    let mut cleaned = Cleaned::default();
    match tools::nft_tables() {
        Ok(listing) => {
            for table in rules::nft_tables(&listing) {
                if mode == Mode::Remove {
                    tools::nft_delete(table)?;
                }
                cleaned.removed.push(format!("nftables: {table}"));
            }
        }
        Err(ToolError::Missing { tool }) => {
            cleaned.notes.push(format!(
                "{tool} is not installed: tables of kube-proxy's nftables mode were not looked for"
            ));
        }
        Err(ToolError::Failed { tool, message }) => cleaned.notes.push(format!("{tool}: {message}")),
    }
    let here: Vec<&Iptables> = IPTABLES.iter().filter(|tool| tool.is_installed()).collect();
    if here.is_empty() {
        cleaned.notes.push(
            "iptables is not installed: rules of kube-proxy's iptables mode were not looked for".into(),
        );
    }
    for tool in here {
        let removals: Vec<Removal> = rules::removals(&tool.save()?);
        for Removal { table, jumps, chains, input } in removals {
            if mode == Mode::Remove {
                tool.restore(&input)?;
            }
            cleaned.removed.push(format!("{}: table {table}: {jumps} jumps, {chains} chains", tool.name));
        }
    }
    if Path::new("/sys/class/net/kube-ipvs0").exists() {
        let note = "kube-ipvs0 and its virtual servers are of kube-proxy's IPVS mode and stay: `ip link delete \
                    kube-ipvs0` and `ipvsadm --clear` remove them";
        cleaned.notes.push(note.into());
    }
    Ok(cleaned)
}

/// A process named `kube-proxy` that shares our network namespace.
fn process(proc: &Path) -> Option<u32> {
    let own = fs::read_link(proc.join("self/ns/net")).ok();
    let entries = fs::read_dir(proc).ok()?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let dir = proc.join(pid.to_string());
        fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.trim_end() == "kube-proxy")
            && fs::read_link(dir.join("ns/net")).ok() == own
    };
    pids.into_iter().find(is_it)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_counts_by_its_name_and_network() {
        let proc = tempfile::tempdir().unwrap();
        let add = |pid: &str, name: &str, net: &str| {
            let dir = proc.path().join(pid);
            fs::create_dir_all(dir.join("ns")).unwrap();
            fs::write(dir.join("comm"), format!("{name}\n")).unwrap();
            std::os::unix::fs::symlink(net, dir.join("ns/net")).unwrap();
        };
        add("self", "ferroflow", "net:[1]");
        add("10", "kube-proxy", "net:[2]");
        add("11", "kube-proxy-not", "net:[1]");
        assert_eq!(process(proc.path()), None);
        add("12", "kube-proxy", "net:[1]");
        assert_eq!(process(proc.path()), Some(12));
    }

    #[test]
    fn what_is_found_is_said() {
        let nothing = Found::default();
        assert_eq!(
            (nothing.state(), nothing.to_string()),
            (KubeProxy::Absent, "no process; rules: none".into())
        );
        let rules = vec!["nftables ip kube-proxy".to_owned()];
        let found = Found { process: Some(7), rules, missing: vec!["iptables"] };
        assert_eq!(found.state(), KubeProxy::Present);
        assert_eq!(
            found.to_string(),
            "process 7; rules: nftables ip kube-proxy (cannot be seen without iptables)"
        );
    }
}
