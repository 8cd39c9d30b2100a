//! A NetworkPolicy in the demo: one that lets nobody to a pod, but for one client.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{
    checks::{Check, World, pod_target},
    cluster::Family,
    patience::stretched,
    pod::{FailureKind, Outcome},
    traffic::{Ask, Protocol},
};

/// What the policy makes of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    Dropped,
}

/// The pod that is guarded, and who may reach it. The other clients are of the same node and of another.
const POD: &str = "a2";
const FRIEND: &str = "a1";
/// Until the agent has read the policy.
const SOON: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_millis(300);

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  podSelector: {matchLabels: {pod: a2}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {pod: a1}}}]
    ports: [{protocol: TCP, port: 8080}]
";

impl World {
    /// A request of the client to the guarded pod; the policy is there from now on.
    pub fn guarded(&self, from: &str, protocol: Protocol, family: Family) -> Check {
        let target = pod_target(self.cluster.pod(POD), protocol, family);
        let fate = if from == FRIEND && protocol == Protocol::Http { Fate::Answered } else { Fate::Dropped };
        let expected = match fate {
            Fate::Answered => "a2 answers",
            Fate::Dropped => "dropped",
        };
        let written = self.cluster.manifests().write("policy-guard", POLICY);
        let ask = Ask::new(protocol, target).timeout(PATIENCE);
        Check {
            step: format!("policy, {protocol}"),
            from: from.into(),
            to: target.to_string(),
            expected: expected.into(),
            seen: written.and_then(|()| self.becomes(from, &ask, fate)),
        }
    }

    fn becomes(&self, from: &str, ask: &Ask, fate: Fate) -> Result<String> {
        let deadline = Instant::now() + stretched(SOON);
        loop {
            let outcomes = self.cluster.pod(from).ask(ask)?;
            let seen = outcomes.last().map(|outcome| seen(outcome, fate));
            match seen {
                Some(Ok(seen)) => return Ok(seen),
                Some(Err(wrong)) if Instant::now() > deadline => bail!(wrong),
                Some(Err(_)) | None => {}
            }
        }
    }
}

/// What was seen, or what was seen instead.
fn seen(outcome: &Outcome, fate: Fate) -> Result<String, String> {
    let text = match &outcome.result {
        Ok(answer) => format!("{} answered", answer.by),
        Err(failure) => failure.to_string(),
    };
    let found = match &outcome.result {
        Ok(_) => Some(Fate::Answered),
        Err(failure) => (failure.kind == FailureKind::TimedOut).then_some(Fate::Dropped),
    };
    if found == Some(fate) { Ok(text) } else { Err(text) }
}
