//! Pods that selectors do not mean, and those that they mean again.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::World,
    cluster::Family,
    probe::{Answering, Probe, Transport, answered},
    sandbox::Sandbox,
};
use serde_json::json;

use crate::objects::{Objects, PORTS, app, policy};

/// A pod of the host's network is the host to everybody; one that is finished is nobody, though its object and its address are
/// still there; one without an address is nobody yet.
pub(crate) fn rules_50_and_51_who_selectors_do_not_mean(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        let anybody = json!([{"from": [{"namespaceSelector": {}}]}]);
        objects.apply(&policy("shop", "pods", json!({"podSelector": app("db"), "ingress": anybody})))?;
        objects.agree().context("all pods")?;

        let mut finished = objects.pod("b1", "client");
        finished["status"]["phase"] = "Succeeded".into();
        objects.apply(&finished)?;
        objects.agree().context("a pod is finished")?;
        let mut unplaced = objects.pod("b1", "client");
        unplaced["status"] = json!({"phase": "Pending"});
        objects.apply(&unplaced)?;
        objects.agree().context("a pod has no address yet")?;
        objects.apply(&objects.pod("b1", "client"))?;
        objects.agree().context("it has")?;

        let node = world.cluster.node("b");
        let mut hosted = objects.pod("b1", "hosted");
        hosted["metadata"]["name"] = "hosted".into();
        hosted["metadata"]["namespace"] = "shop".into();
        hosted["spec"]["hostNetwork"] = true.into();
        hosted["status"] =
            json!({"phase": "Running", "podIP": node.v4, "podIPs": [{"ip": node.v4}, {"ip": node.v6}]});
        objects.apply(&hosted)?;
        objects.agree().context("a pod of the host's network is a peer")?;
        let both = json!(["Ingress", "Egress"]);
        objects.apply(&policy(
            "shop",
            "hosted",
            json!({"podSelector": app("hosted"), "policyTypes": both}),
        ))?;
        objects.agree().context("a pod of the host's network is selected")?;
        let _answering = Answering::start(&node.netns, &PORTS)?;
        let to_host = Family::BOTH.map(|family| Probe {
            transport: Transport::Udp,
            target: SocketAddr::new(node.ip(family), PORTS[0]),
        });
        let passed = answered(&world.cluster.pod("a1").netns, &to_host)?;
        ensure!(passed == [true, true], "policies are in the way of a host's own sockets: {passed:?}");
        Ok(())
    })
}
