//! The agent's side of the process that answers the health checks of services (rule 40): starts it, tells it what to
//! say, and starts it again should it be gone.
//!
//! The agent itself never listens on these ports: killed at any moment it would take connections with it that nobody has
//! answered yet. The process outlives it, and the next agent adopts it, or has its own build take over: the new process
//! listens on the same ports (`SO_REUSEPORT`) before it ends the old one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ferroflow_common::addr::Port;

use super::told::{Told, problems_path};
use super::{Check, Verdict};

/// Seconds between two words of an agent that has nothing new to say.
const HEARTBEAT: u32 = 5;

/// The verb of this binary that answers.
pub const VERB: &str = "health";

#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    /// The cgroup that the process moves to, so that it does not end with the agent's.
    cgroup: Option<PathBuf>,
    told: Told,
    /// It was written, and has not changed.
    written: bool,
    /// Where this agent started it: to be waited for.
    child: Option<Child>,
    problems: BTreeMap<u16, String>,
    /// Those of them that were not there before.
    news: Vec<(u16, String)>,
    /// Why the process cannot be told.
    refused: Option<String>,
}

impl Keeper {
    /// `dir` holds the file, and is made when there is something to answer.
    pub fn new(dir: &Path, cgroup: Option<PathBuf>) -> Self {
        let path = dir.join("health.json");
        let told = Told::read(&path).ok().flatten().unwrap_or_default();
        Self {
            path,
            cgroup,
            told,
            written: false,
            child: None,
            problems: BTreeMap::new(),
            news: Vec::new(),
            refused: None,
        }
    }

    /// Says what is answered from now on; to be called whenever something changed, and every few seconds.
    pub fn tell(&mut self, checks: &BTreeMap<Port, Check>, verdict: Verdict, now: u32) {
        if let Some(child) = &mut self.child
            && child.try_wait().is_ok_and(|ended| ended.is_some())
        {
            self.child = None;
        }
        let mut told = Told { healthy: verdict == Verdict::Healthy, ..self.told.clone() };
        told.set_checks(checks);
        let same = Told { stamp: self.told.stamp, ..told.clone() } == self.told;
        if same && self.written && now.saturating_sub(self.told.stamp) < HEARTBEAT {
            return;
        }
        told.stamp = now;
        let refused = self.try_tell(told).err().map(|error| error.to_string());
        self.written = refused.is_none();
        if let Some(error) = refused.as_ref().filter(|_| self.refused != refused) {
            tracing::warn!(
                path = %self.path.display(),
                "healthCheckNodePorts of Services are not answered as they should be: {error}; let --run-dir be a directory \
                 that can be written and has room; trying again"
            );
        }
        self.refused = refused;
        self.hear();
    }

    /// How many ports cannot be answered, and whether the process cannot be told.
    pub fn problems(&self) -> usize {
        self.problems.len() + usize::from(self.refused.is_some())
    }

    /// Ports that cannot be answered any more, and why, since this was last asked.
    pub fn take_news(&mut self) -> Vec<(u16, String)> {
        std::mem::take(&mut self.news)
    }

    fn try_tell(&mut self, told: Told) -> io::Result<()> {
        self.told = told;
        if self.told.is_empty() {
            // A file system that cannot be written refuses also what is not there.
            return if self.path.exists() { fs::remove_file(&self.path) } else { Ok(()) };
        }
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
        let build = build()?;
        let lives = is_one(self.told.pid, &self.path);
        if !lives || self.told.build != build {
            let before = lives.then_some(self.told.pid);
            self.told.build = build;
            // The new process reads what to answer before it knows that it is the one.
            self.told.write(&self.path)?;
            let child = self.start(before)?;
            self.told.pid = child.id();
            self.child = Some(child);
        }
        self.told.write(&self.path)
    }

    fn start(&self, before: Option<u32>) -> io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(VERB).arg("--state").arg(&self.path);
        if let Some(pid) = before {
            command.arg("--supersede").arg(pid.to_string());
        }
        if let Some(cgroup) = &self.cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    }

    /// Says what the process could not do, once.
    fn hear(&mut self) {
        let bytes = fs::read(problems_path(&self.path)).unwrap_or_default();
        let problems: BTreeMap<u16, String> = serde_json::from_slice(&bytes).unwrap_or_default();
        for (port, message) in problems.iter().filter(|it| !self.problems.contains_key(it.0)) {
            tracing::warn!(port, "FailedToStartServiceHealthcheck: {message}; trying again");
            self.news.push((*port, message.clone()));
        }
        self.problems = problems;
    }
}

/// Whether the process is one that answers from this file.
pub fn is_one(pid: u32, path: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0).skip(1);
    pid != 0
        && words.next() == Some(VERB.as_bytes())
        && words.any(|word| word == path.as_os_str().as_encoded_bytes())
}

/// What tells this binary from another one.
fn build() -> io::Result<String> {
    let file = fs::metadata("/proc/self/exe")?;
    Ok(format!("{} {} {}", env!("CARGO_PKG_VERSION"), file.len(), file.mtime()))
}
