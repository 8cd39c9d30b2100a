//! What the demo and the tests show of NodePorts, of the policy `Local` and of session affinity: whom a client from
//! outside reaches, and as whom it is seen. The host of node b is that client; node a is whom it asks.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    checks::{
        Check, DEMO_NODE_PORT, REQUESTS, WEB_PORT, World, counts, every_backend, family_name, tally, target,
    },
    cluster::Family,
    pod::Outcome,
    traffic::{Ask, Client, Protocol},
};

/// How many requests in a row say that a change has arrived.
const SETTLED: usize = 20;
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(5);

impl World {
    /// A NodePort reaches every backend, and stands in for the client.
    pub fn node_port(&self, family: Family) -> Check {
        let (node, target) = self.asked(family);
        Check {
            step: format!("from outside, {}", family_name(family)),
            from: "host b".into(),
            to: target.to_string(),
            expected: "a2 and b2, client is node a".into(),
            seen: self.ask_outside(target, "", &["a2", "b2"], node),
        }
    }

    /// With the policy `Local` it reaches those of its own node, who see the client.
    pub fn local_policy(&self, family: Family) -> Check {
        let (_node, target) = self.asked(family);
        let client = self.cluster.node("b").ip(family);
        Check {
            step: format!("Local over {}", family_name(family)),
            from: "host b".into(),
            to: target.to_string(),
            expected: "a2 only, client is host b".into(),
            seen: self.ask_outside(target, "  externalTrafficPolicy: Local\n", &["a2"], client),
        }
    }

    /// With session affinity a client stays with one backend, and without it does not. The service is as it was then.
    pub fn affinity(&self, family: Family) -> Check {
        let target = target(&self.web, Protocol::Http, family);
        Check {
            step: format!("affinity over {}", family_name(family)),
            from: "a1".into(),
            to: target.to_string(),
            expected: "one answers, then both".into(),
            seen: self.ask_with_affinity(target, family),
        }
    }

    /// Node a's address, and its NodePort.
    fn asked(&self, family: Family) -> (IpAddr, SocketAddr) {
        let node = self.cluster.node("a").ip(family);
        (node, SocketAddr::new(node, DEMO_NODE_PORT))
    }

    /// The service as a NodePort, with more lines in its `spec`.
    fn expose(&self, more: &str) -> Result<()> {
        let mut web = self.web.clone();
        more.clone_into(&mut web.more);
        let yaml = web.exposed("NodePort", &[(WEB_PORT, DEMO_NODE_PORT)]);
        self.cluster.manifests().write("service-web", &yaml)
    }

    fn ask_outside(
        &self,
        target: SocketAddr,
        more: &str,
        backends: &[&str],
        seen_as: IpAddr,
    ) -> Result<String> {
        self.expose(more)?;
        let host = self.cluster.node("b");
        let settled = |outcomes: &[Outcome]| {
            outcomes.iter().all(|it| it.answer().is_some_and(|answer| answer.client.ip() == seen_as))
        };
        settle(&host.keep_asking(&Ask::http(target).interval(INTERVAL))?, settled)?;
        let by = tally(&host.ask(&Ask::http(target).count(REQUESTS).strict())?, target, seen_as)?;
        ensure!(by.keys().map(String::as_str).eq(backends.iter().copied()), "{by:?}");
        Ok(format!("{}; client {seen_as}", counts(&by)))
    }

    fn ask_with_affinity(&self, target: SocketAddr, family: Family) -> Result<String> {
        let pod = self.cluster.pod("a1");
        let asking = || pod.keep_asking(&Ask::http(target).interval(INTERVAL));
        let ask = || tally(&pod.ask(&Ask::http(target).count(REQUESTS).strict())?, target, pod.ip(family));
        self.expose("  sessionAffinity: ClientIP\n")?;
        settle(&asking()?, |outcomes| names(outcomes) == 1)?;
        let by = ask()?;
        ensure!(by.len() == 1, "{by:?}");
        let one = counts(&by);
        self.expose("")?;
        settle(&asking()?, |outcomes| names(outcomes) == 2)?;
        Ok(format!("{one}; then {}", every_backend(&ask()?)?))
    }
}

/// How many pods answered; none where a request failed.
fn names(outcomes: &[Outcome]) -> usize {
    let names: Option<BTreeSet<_>> =
        outcomes.iter().map(|it| it.answer().map(|answer| answer.by.as_str())).collect();
    names.map_or(0, |names| names.len())
}

/// Waits until `is` holds for so many of the last requests.
fn settle(client: &Client<Outcome>, is: impl Fn(&[Outcome]) -> bool) -> Result<()> {
    client
        .wait_until(SETTLE_LIMIT, |outcomes| outcomes.last_chunk::<SETTLED>().is_some_and(|last| is(last)))
        .map(drop)
}
