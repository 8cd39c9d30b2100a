//! A hostPort in the demo: a pod of the first node that is reached by the node's addresses.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    checks::{Check, World, counts, loopback, tally},
    cluster::Family,
    pod::{DNS_PORT, HTTP_PORT},
    traffic::{Ask, Protocol},
};

const POD: &str = "a3";
const PORT: u16 = 8088;
const REQUESTS: u32 = 5;

/// Who asks, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// The host of the second node.
    Outside,
    Pod(&'static str),
    /// The pod's own host, by the loopback.
    Loopback,
}

impl World {
    /// Attaches the pod, with its ports for TCP and UDP.
    pub fn forward(&mut self) -> Result<()> {
        let mapping =
            |protocol: &str, to: u16| json!({ "hostPort": PORT, "containerPort": to, "protocol": protocol });
        let mappings = [mapping("tcp", HTTP_PORT), mapping("udp", DNS_PORT)];
        let runtime = self.runtimes.first().context("nobody attaches pods")?;
        self.cluster.attach_with("a", POD, runtime, json!({ "runtimeConfig": { "portMappings": mappings } }))
    }

    /// The pod answers as the node, and sees who asks.
    pub fn forwarded(&self, from: From, protocol: Protocol, family: Family) -> Check {
        let (node, outside) = (self.cluster.node("a"), self.cluster.node("b"));
        let addr = if from == From::Loopback { loopback(family) } else { node.ip(family) };
        let target = SocketAddr::new(addr, PORT);
        let ask = Ask::new(protocol, target).count(REQUESTS).strict();
        let (name, client, outcomes) = match from {
            From::Outside => ("host b", outside.ip(family), outside.ask(&ask)),
            From::Pod(name) => (name, self.cluster.pod(name).ip(family), self.cluster.pod(name).ask(&ask)),
            From::Loopback => ("host a", node.ip(family), node.ask(&ask)),
        };
        let seen = outcomes.and_then(|outcomes| tally(&outcomes, target, client)).and_then(|by| {
            ensure!(by.keys().eq([POD]), "{}", counts(&by));
            Ok(format!("{}; client {client}", counts(&by)))
        });
        Check {
            step: format!("hostPort, {protocol}"),
            from: name.into(),
            to: target.to_string(),
            expected: format!("{POD} answers"),
            seen,
        }
    }
}
