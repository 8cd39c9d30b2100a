//! The host's tools for packet filter rules.

use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use super::rules::Table;

const NFT: &str = "nft";

/// One kind and family of iptables: its commands are this name with `-save` and `-restore`.
#[derive(Debug)]
pub(super) struct Iptables {
    pub(super) name: &'static str,
    /// Where the kernel lists the tables that are in use, for the kind that has no other way to ask.
    tables: Option<&'static str>,
}

/// Both kinds, because a host may have had rules of either. (The plain name is one of the two.)
pub(super) const IPTABLES: [Iptables; 4] = [
    Iptables { name: "iptables-nft", tables: None },
    Iptables { name: "ip6tables-nft", tables: None },
    Iptables { name: "iptables-legacy", tables: Some("/proc/net/ip_tables_names") },
    Iptables { name: "ip6tables-legacy", tables: Some("/proc/net/ip6_tables_names") },
];

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{tool} is not installed: install it, or run `ferroflow cleanup` where it is")]
    Missing { tool: &'static str },
    #[error("{tool}: {message}")]
    Failed { tool: String, message: String },
}

impl Iptables {
    pub(super) fn is_installed(&self) -> bool {
        let file = format!("{}-save", self.name);
        env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(&file).is_file()))
    }

    /// Whether the chain is there that both of its modes with iptables have. Takes no lock and makes no table.
    pub(super) fn has_services(&self) -> bool {
        let Some(names) = self.tables else {
            // One rule of it: the chain may have tens of thousands.
            return run(self.name, &["-t", "nat", "-S", "KUBE-SERVICES", "1"], "")
                .is_ok_and(|output| output.status.success());
        };
        // Only the `-save` of this kind does without the lock, which others may hold for seconds.
        fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == "nat"))
            && text(&format!("{}-save", self.name), &["-t", "nat"], "")
                .is_ok_and(|saved| saved.lines().any(|line| line.starts_with(":KUBE-SERVICES ")))
    }

    /// All tables that are in use.
    pub(super) fn save(&self) -> Result<String, ToolError> {
        text(&format!("{}-save", self.name), &[], "")
    }

    pub(super) fn restore(&self, input: &str) -> Result<(), ToolError> {
        text(&format!("{}-restore", self.name), &["--noflush", "-w", "5"], input).map(drop)
    }
}

pub(super) fn nft_tables() -> Result<String, ToolError> {
    text(NFT, &["list", "tables"], "")
}

pub(super) fn nft_delete(table: Table<'_>) -> Result<(), ToolError> {
    text(NFT, &["delete", "table", table.family, Table::NAME], "").map(drop)
}

/// What the tool writes, where it is content.
fn text(tool: &str, args: &[&str], input: &str) -> Result<String, ToolError> {
    let failed = |message: String| ToolError::Failed { tool: tool.to_owned(), message };
    let output = match run(tool, args, input) {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound && tool == NFT => {
            return Err(ToolError::Missing { tool: NFT });
        }
        Err(error) => return Err(failed(error.to_string())),
    };
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

fn run(tool: &str, args: &[&str], input: &str) -> io::Result<Output> {
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends early says why itself.
        let _ended = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}
