//! Traffic that runs while something else happens.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    checks::{ECHO_SERVICE_PORT, failures, target},
    cluster::{Cluster, Family},
    manifests::Service,
    patience::stretched,
    pod::{Outcome, Progress},
    traffic::{Ask, Client, Protocol},
};

/// Requests and transfers that run from pods of both nodes, in both families.
#[derive(Debug)]
pub struct Traffic {
    requests: Vec<Client<Outcome>>,
    streams: Vec<Client<Progress>>,
}

const LONGEST_GAP: Duration = Duration::from_secs(1);

impl Traffic {
    pub fn start(cluster: &Cluster, web: &Service) -> Result<Self> {
        let (mut requests, mut streams) = (Vec::new(), Vec::new());
        for from in ["a1", "b1"] {
            let pod = cluster.pod(from);
            for family in Family::BOTH {
                for protocol in [Protocol::Http, Protocol::Dns] {
                    let ask = Ask::new(protocol, target(web, protocol, family));
                    requests.push(pod.keep_asking(&ask.interval(Duration::from_millis(10)))?);
                }
                streams.push(pod.stream((web.ip(family), ECHO_SERVICE_PORT).into())?);
            }
        }
        Ok(Self { requests, streams })
    }

    /// All of it goes on: something new comes everywhere.
    pub fn flows(&self) -> Result<()> {
        let limit = Duration::from_secs(5);
        for client in &self.requests {
            let before = client.seen().len();
            client.wait_until(limit, |outcomes| outcomes.len() > before + 10)?;
        }
        for stream in &self.streams {
            let before = stream.seen().last().map_or(0, |progress| progress.verified);
            stream.wait_until(limit, |seen| {
                seen.last().is_some_and(|last| last.verified > before || last.ended.is_some())
            })?;
        }
        Ok(())
    }

    pub fn finish(self) -> Result<()> {
        for client in self.requests {
            let outcomes = client.stop()?;
            if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
                bail!("{failure}; {}", failures(&outcomes));
            }
        }
        for stream in self.streams {
            let last = stream.stop()?.pop().context("a stream said nothing")?;
            ensure!(last.ended == Some(Ok(())), "{last:?}");
            ensure!(Duration::from_micros(last.longest_gap_us) < stretched(LONGEST_GAP), "{last:?}");
        }
        Ok(())
    }
}
