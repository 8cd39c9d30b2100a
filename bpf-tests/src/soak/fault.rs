//! What goes wrong on purpose. Every fault here must cost the traffic nothing: those that do cost something by their
//! nature (programs of a pod that somebody detaches while it talks through a service) are in `tests/heal`, and here
//! happen to pods that nobody talks to.

use std::{
    fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;

use super::churn::Churn;
use crate::{
    apiserver::{Fault as ApiFault, Verb},
    netns::Prefix,
    patience::stretched,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// A list or a watch that fails, breaks off, hangs or makes no sense.
    Api,
    /// The history is gone: 410.
    Compacted,
    /// No server listens for a while.
    ApiAway,
    /// An agent that somebody kills, and that is started after a change it did not see.
    Killed,
    /// An agent that is asked to end, as an upgrade does, and started at once.
    Restarted,
    /// The same with tables of another size.
    Resized,
    /// The links of programs on an idle pod's interface are removed.
    Detached,
    /// The routes to an idle pod are removed.
    Unrouted,
    /// The pins of tables are removed.
    Unpinned,
}

impl Fault {
    pub(super) const ALL: [Self; 9] = [
        Self::Api,
        Self::Compacted,
        Self::ApiAway,
        Self::Killed,
        Self::Restarted,
        Self::Resized,
        Self::Detached,
        Self::Unrouted,
        Self::Unpinned,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Api => "API failed",
            Self::Compacted => "API history gone",
            Self::ApiAway => "API away",
            Self::Killed => "agent killed",
            Self::Restarted => "agent restarted",
            Self::Resized => "tables resized",
            Self::Detached => "programs detached",
            Self::Unrouted => "routes removed",
            Self::Unpinned => "pins removed",
        }
    }

    /// Whether the agent's process ends by it.
    pub(super) fn is_deadly(self) -> bool {
        match self {
            Self::Killed | Self::Restarted | Self::Resized => true,
            Self::Api
            | Self::Compacted
            | Self::ApiAway
            | Self::Detached
            | Self::Unrouted
            | Self::Unpinned => false,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Sizes of tables that take turns.
const SIZES: [&str; 2] = ["131072", "65536"];
/// What somebody removed is back after so long.
const HEALED: Duration = Duration::from_secs(10);

impl Churn {
    /// Does it to a node by chance.
    pub(super) fn suffer(&mut self, fault: Fault) -> Result<()> {
        let at = self.noise.below(self.world.agents.len());
        match fault {
            Fault::Api => self.fail_api(at),
            Fault::Compacted => {
                self.world.apis.get(at).context("no such API")?.server.compact();
                Ok(())
            }
            Fault::ApiAway => self.lose_api(at),
            Fault::Killed => self.kill(at),
            Fault::Restarted => self.restart(at, None),
            Fault::Resized => {
                let size = self.noise.pick(&SIZES);
                self.restart(at, Some(size))
            }
            Fault::Detached => self.detach(),
            Fault::Unrouted => self.unroute(),
            Fault::Unpinned => self.unpin(at),
        }
    }

    fn fail_api(&mut self, at: usize) -> Result<()> {
        let faults = [
            ApiFault::Status(500, None),
            ApiFault::Status(429, Some(1)),
            ApiFault::Status(401, None),
            ApiFault::ExpiredEvent,
            ApiFault::Cut(300),
            ApiFault::Garbage(200),
            ApiFault::Slow(Duration::from_millis(2)),
        ];
        let fault = faults[self.noise.below(faults.len())].clone();
        let verb = self.noise.pick(&[Verb::List, Verb::Watch]);
        self.world.apis.get(at).context("no such API")?.server.inject(verb, "", fault, 1);
        Ok(())
    }

    fn lose_api(&mut self, at: usize) -> Result<()> {
        let api = self.world.apis.get_mut(at).context("no such API")?;
        api.server.go_away();
        thread::sleep(Duration::from_millis(500));
        let node = self.world.cluster.nodes().get(at).context("no such node")?;
        api.come_back(node)
    }

    fn kill(&mut self, at: usize) -> Result<()> {
        self.world.agents.get_mut(at).context("no such agent")?.kill9()?;
        self.change_service()?;
        let agent = self.world.agents.get_mut(at).context("no such agent")?;
        agent.restart()?;
        agent.wait_synced().map(drop)
    }

    fn restart(&mut self, at: usize, size: Option<&str>) -> Result<()> {
        let agent = self.world.agents.get_mut(at).context("no such agent")?;
        let ended = agent.stop()?;
        ensure!(ended.success(), "the agent ended with {ended}\n{}", agent.log_tail());
        if let Some(size) = size {
            agent.set_flag("--max-endpoints", size);
        }
        agent.restart()?;
        agent.wait_synced().map(drop)
    }

    /// Of one pod of the churn, which nobody talks to. Before Linux 6.6 there are no links to remove.
    fn detach(&mut self) -> Result<()> {
        let Some((node, pod)) = self.any_pod() else { return Ok(()) };
        let interface = self.world.cluster.pod(&pod).interface.clone();
        let node = self.world.cluster.nodes().get(node).context("no such node")?;
        let index = node.netns.run(move |_| if_nametoindex(interface.as_str()))??;
        let suffix = format!("-{index}");
        let removed = remove_all(&node.bpffs.join("links"), |name| name.ends_with(&suffix))?;
        heals("programs", || Ok(removed.iter().all(|path| path.exists())))
    }

    fn unroute(&mut self) -> Result<()> {
        let Some((node, pod)) = self.any_pod() else { return Ok(()) };
        let pod = self.world.cluster.pod(&pod);
        let netns = &self.world.cluster.nodes().get(node).context("no such node")?.netns;
        for addr in [IpAddr::V4(pod.v4), IpAddr::V6(pod.v6)] {
            let to = Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } };
            netns.run(move |inside| inside.remove_route(to))??;
        }
        let (v4, v6) = (u32::from_ne_bytes(pod.v4.octets()), u128::from(pod.v6));
        let (v4, v6) = (format!("{v4:08X}"), format!("{v6:032x} 80"));
        heals("routes", || {
            Ok(netns.proc_net("route")?.contains(&v4) && netns.proc_net("ipv6_route")?.contains(&v6))
        })
    }

    fn unpin(&mut self, at: usize) -> Result<()> {
        let maps = self.world.cluster.nodes().get(at).context("no such node")?.bpffs.join("maps");
        let removed = remove_all(&maps, |_| true)?;
        ensure!(!removed.is_empty(), "no pins in {}", maps.display());
        heals("pins", || Ok(removed.iter().all(|path| path.exists())))
    }
}

fn remove_all(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
            removed.push(entry.path());
        }
    }
    Ok(removed)
}

fn heals(what: &str, healed: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + stretched(HEALED);
    while !healed()? {
        ensure!(Instant::now() < deadline, "{what} that somebody removed are not back after {HEALED:?}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
