//! `ferroflow health`: the process that answers the health checks of services, whether an agent runs or not.
//!
//! It reads what to say from a file that agents replace (see [`super::told`]). It ends when that file is removed, when the
//! process that takes over tells it to (SIGTERM), and when no agent has said anything for a long time.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use tokio::signal::unix::{SignalKind, signal};

use super::keeper::is_one;
use super::server::Services;
use super::told::{Told, problems_path, replace};
use crate::clock;

/// How often the file is looked at.
const TURN: Duration = Duration::from_millis(100);

/// Seconds without a word of an agent after which it ends: nobody will come back.
const ABANDONED: u32 = 600;

/// Cgroup of the process, so that it does not end with the agent's container or unit.
const CGROUP: &str = "ferroflow-health";

/// What the process is told when it starts.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// File that says what to answer
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,

    /// Process that answers at present; it is told to end once this one listens
    #[arg(long, value_name = "PID")]
    pub supersede: Option<u32>,

    /// Directory of the cgroup2 hierarchy in which to make a cgroup of its own
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
}

/// Answers until there is nothing left to answer.
///
/// # Errors
/// Where it cannot start.
pub async fn run(options: &Options) -> io::Result<()> {
    // A group leader already has what this gives.
    let _own_session = setsid();
    if let Some(cgroup) = &options.cgroup
        && let Err(error) = enter(&cgroup.join(CGROUP))
    {
        tracing::warn!(%error, "stays in the agent's cgroup, and may end with it");
    }
    let mut told_to_end = signal(SignalKind::terminate())?;
    let mut services = Services::default();
    let mut supersede = options.supersede;
    let mut said = BTreeMap::new();
    loop {
        match Told::read(&options.state) {
            Ok(None) => break,
            Ok(Some(told)) if clock::seconds().saturating_sub(told.stamp) > ABANDONED => break,
            Ok(Some(told)) => services.set(&told),
            Err(error) => tracing::warn!(%error, "cannot read what to answer"),
        }
        if let Some(pid) = supersede.filter(|_| services.are_ready()) {
            end(pid, &options.state);
            supersede = None;
        }
        let problems = services.problems();
        if problems != said {
            say(&options.state, &problems);
            said = problems;
        }
        tokio::select! {
            _ = told_to_end.recv() => {
                services.finish().await;
                return Ok(());
            }
            () = tokio::time::sleep(TURN) => {}
        }
    }
    let _gone = fs::remove_file(problems_path(&options.state));
    Ok(())
}

/// Only a process like this one, of the same file: the number may be another's by now.
fn end(pid: u32, state: &Path) {
    if let (true, Ok(number)) = (is_one(pid, state), i32::try_from(pid)) {
        // That it is gone is what was wanted.
        let _gone = kill(Pid::from_raw(number), Signal::SIGTERM);
    }
}

fn say(state: &Path, problems: &BTreeMap<u16, String>) {
    let written = serde_json::to_vec(problems).map_err(io::Error::from);
    if let Err(error) = written.and_then(|bytes| replace(&problems_path(state), &bytes)) {
        tracing::warn!(%error, "cannot say what is wrong");
    }
}

fn enter(cgroup: &Path) -> io::Result<()> {
    fs::create_dir_all(cgroup)?;
    fs::write(cgroup.join("cgroup.procs"), "0")
}
