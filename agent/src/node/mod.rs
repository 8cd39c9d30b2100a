//! The machine around the agent: `prepare` readies it, `doctor` says what is wrong with it, `remove` leaves it as it was.

pub mod doctor;
mod links;
pub mod prepare;
pub mod remove;

use std::path::PathBuf;

use clap::Args;

/// The file that runtimes execute.
pub const PLUGIN: &str = "ferroflow-cni";

/// The file that some execute for the loopback interface; ours is a link to [`PLUGIN`].
pub use crate::cni::plugin::LOOPBACK;

/// Where container runtimes look for network plugins, and where the agent keeps what is its own.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Directory in which container runtimes look for network configurations
    #[arg(
        long = "cni-conf-dir",
        env = "FERROFLOW_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/etc/cni/net.d"
    )]
    pub conf_dir: PathBuf,

    /// Directory in which they look for the plugins' programs
    #[arg(
        long = "cni-bin-dir",
        env = "FERROFLOW_CNI_BIN_DIR",
        value_name = "DIR",
        default_value = "/opt/cni/bin"
    )]
    pub bin_dir: PathBuf,

    /// Directory for what outlives the agent and the machine
    #[arg(long, env = "FERROFLOW_STATE_DIR", value_name = "DIR", default_value = "/var/lib/ferroflow")]
    pub state_dir: PathBuf,

    /// Directory for what outlives the agent
    #[arg(long, env = "FERROFLOW_RUN_DIR", value_name = "DIR", default_value = "/run/ferroflow")]
    pub run_dir: PathBuf,
}

/// A network configuration that runtimes may take.
pub struct Configuration {
    pub path: PathBuf,
    /// It names our plugin.
    pub ours: bool,
}

impl Places {
    /// The network configurations, in the order in which runtimes look at them (libcni: by name, of three kinds).
    ///
    /// # Errors
    /// A directory that cannot be read; one that is not there has none.
    pub fn configurations(&self) -> std::io::Result<Vec<Configuration>> {
        let entries = match std::fs::read_dir(&self.conf_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let kind = |path: &PathBuf| {
            path.extension().is_some_and(|it| it == "conflist" || it == "conf" || it == "json")
        };
        let mut paths: Vec<_> = paths.filter(kind).collect();
        paths.sort();
        Ok(paths.into_iter().map(|path| Configuration { ours: names_plugin(&path), path }).collect())
    }
}

fn names_plugin(path: &std::path::Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let list: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    list["plugins"].as_array().is_some_and(|plugins| plugins.iter().any(|plugin| plugin["type"] == PLUGIN))
}
