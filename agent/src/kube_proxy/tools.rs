//! The host's tools for packet filter rules.

use std::env;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use super::rules::Table;

const NFT: &str = "nft";

/// One kind and family of iptables: its commands are this name with `-save` and `-restore`.
#[derive(Debug)]
pub(super) struct Iptables {
    pub(super) name: &'static str,
}

/// Both kinds, because a host may have had rules of either. (The plain name is one of the two.)
pub(super) const IPTABLES: [Iptables; 4] = [
    Iptables { name: "iptables-nft" },
    Iptables { name: "ip6tables-nft" },
    Iptables { name: "iptables-legacy" },
    Iptables { name: "ip6tables-legacy" },
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

    /// Whether the chain is there that both of its modes with iptables have.
    pub(super) fn has_services(&self) -> bool {
        // One rule of it: the chain may have tens of thousands.
        run(self.name, &["-w", "5", "-t", "nat", "-S", "KUBE-SERVICES", "1"], "")
            .is_ok_and(|output| output.status.success())
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
