//! Traffic that runs while something else happens.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime},
};

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
    requests: Vec<(Kind, Client<Outcome>)>,
    streams: Vec<Client<Progress>>,
}

/// What an operator asks about when something was restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// One transfer that lasts.
    TcpLong,
    /// A connection for each request.
    TcpShort,
    /// A socket for each question, with a port that the kernel chooses.
    UdpRandom,
    /// A socket for each question, all of them with one port.
    UdpFixed,
}

/// What became of one kind.
#[derive(Clone, Debug, Default)]
pub struct Total {
    /// Requests, or bytes of transfers.
    pub done: u64,
    /// Requests without their answer, and transfers that broke off: one without a byte for five seconds has.
    pub lost: usize,
    /// The longest time in which a transfer stood still; what is sent again has taken a while.
    pub longest_gap: Duration,
    /// Of the first that was lost, and how many like it.
    pub why: Option<String>,
    /// When requests were made that have no answer.
    pub lost_at: Vec<SystemTime>,
}

const LONGEST_GAP: Duration = Duration::from_secs(1);

/// Of the questions that all come from one, over IPv4; over IPv6 from the next: a socket of IPv6 takes both.
const FIXED_PORT: u16 = 5300;

impl Traffic {
    pub fn start(cluster: &Cluster, web: &Service) -> Result<Self> {
        let (mut requests, mut streams) = (Vec::new(), Vec::new());
        for from in ["a1", "b1"] {
            let pod = cluster.pod(from);
            for family in Family::BOTH {
                for (kind, protocol, port) in [
                    (Kind::TcpShort, Protocol::Http, 0),
                    (Kind::UdpRandom, Protocol::Dns, 0),
                    (Kind::UdpFixed, Protocol::Dns, FIXED_PORT + u16::from(family == Family::V6)),
                ] {
                    let ask = Ask::new(protocol, target(web, protocol, family)).source_port(port);
                    let client = pod.keep_asking(&ask.interval(Duration::from_millis(10)))?;
                    requests.push((kind, client));
                }
                streams.push(pod.stream((web.ip(family), ECHO_SERVICE_PORT).into())?);
            }
        }
        Ok(Self { requests, streams })
    }

    /// All of it goes on: something new comes everywhere.
    pub fn flows(&self) -> Result<()> {
        let limit = Duration::from_secs(5);
        for (kind, client) in &self.requests {
            let before = client.count();
            client.wait(limit, |outcomes| outcomes.len() > before + 10).with_context(|| kind.to_string())?;
        }
        for stream in &self.streams {
            let before = stream.last().map_or(0, |progress| progress.verified);
            stream
                .wait(limit, |seen| {
                    seen.last().is_some_and(|last| last.verified > before || last.ended.is_some())
                })
                .with_context(|| Kind::TcpLong.to_string())?;
        }
        Ok(())
    }

    /// Ends it.
    pub fn totals(self) -> Result<BTreeMap<Kind, Total>> {
        let mut totals: BTreeMap<Kind, Total> = BTreeMap::new();
        for (kind, client) in self.requests {
            let outcomes = client.stop()?;
            let total = totals.entry(kind).or_default();
            total.done += outcomes.len() as u64;
            if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
                let lost = outcomes.iter().filter(|outcome| outcome.failure().is_some());
                total.lost_at.extend(lost.map(|outcome| outcome.started()));
                total.lost = total.lost_at.len();
                total.why.get_or_insert_with(|| format!("{failure}; {}", failures(&outcomes)));
            }
        }
        for stream in self.streams {
            let last = stream.stop()?.pop().context("a stream said nothing")?;
            let total = totals.entry(Kind::TcpLong).or_default();
            total.done += last.verified;
            total.longest_gap = total.longest_gap.max(Duration::from_micros(last.longest_gap_us));
            if last.ended != Some(Ok(())) {
                total.lost += 1;
                total.why.get_or_insert_with(|| format!("{last:?}"));
            }
        }
        Ok(totals)
    }

    /// Ends it; an error where anything was lost, or stood still for a second.
    pub fn finish(self) -> Result<()> {
        for (kind, total) in self.totals()? {
            total.verdict().with_context(|| kind.to_string())?;
        }
        Ok(())
    }
}

impl Total {
    /// What came through; an error where anything was lost, or stood still for a second.
    pub fn verdict(&self) -> Result<String> {
        let Self { done, lost, longest_gap, why, lost_at: _ } = self;
        ensure!(*done > 0, "nothing was asked");
        if let Some(why) = why {
            bail!("{lost} lost of {done}: {why}");
        }
        ensure!(*longest_gap < stretched(LONGEST_GAP), "{longest_gap:?} without a byte");
        if longest_gap.is_zero() {
            return Ok(format!("{done} requests, none lost"));
        }
        Ok(format!("{done} bytes, none lost; {longest_gap:?} the longest pause"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TcpLong => "TCP, long-lived",
            Self::TcpShort => "TCP, short",
            Self::UdpRandom => "UDP, random ports",
            Self::UdpFixed => "UDP, one port",
        })
    }
}
