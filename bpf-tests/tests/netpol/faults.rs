//! Policies that are huge, that exceed the tables, or that make no sense: over a Kubernetes API, on whose objects it is said.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{checks::World, patience::stretched, sandbox::Sandbox};
use serde_json::{Value, json};

use crate::objects::{Objects, SOON, app, policy};

/// As many as fit, and are no ranges: every other one.
const PORTS: u16 = 10_000;
/// Parts of the world that a block leaves out.
const EXCEPT: usize = 1_000;
/// With the ports once for each there are more than `port_ranges` has rows.
const BLOCKS: u16 = 14;

pub(crate) fn huge_policies_are_enforced_and_what_exceeds_the_tables_closes_its_pods_alone(
    sandbox: &Sandbox,
) -> Result<()> {
    over_api(sandbox, |world, objects| {
        let except = (1..EXCEPT).map(|it| format!("172.16.{}.{}/32", it / 250, it % 250));
        let except: Vec<_> = except.chain([format!("{}/32", world.cluster.pod("b1").v4)]).collect();
        let world_but = json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": except}});
        let spec = json!({"podSelector": app("db"), "ingress": [
            {"ports": every_other(0)},
            {"from": [world_but], "ports": [{"protocol": "UDP", "port": 8053}]},
        ]});
        objects.apply(&policy("shop", "huge", spec))?;
        objects.agree().context("a huge policy")?;

        let block = |it: u16| json!({"ipBlock": {"cidr": format!("172.20.{it}.0/24")}});
        let blocks: Vec<_> = (0..BLOCKS).map(block).collect();
        let own = |it| json!({"from": [block(it)], "ports": [{"port": 30_000 + 2 * it}]});
        let rules =
            [json!({"from": blocks, "ports": every_other(1)})].into_iter().chain((0..BLOCKS).map(own));
        let exceeds = |rules: Vec<Value>| {
            policy("shop", "exceeds", json!({"podSelector": app("client"), "ingress": rules}))
        };
        // What is in force in its place.
        objects.apply_as(&exceeds(rules.collect()), &exceeds(Vec::new()))?;
        let told = ("NetworkPolicy", "exceeds", "PolicyOverflow");
        let addr = world.cluster.pod("a1").v4.to_string();
        said(world, told, &["table `port_ranges` has no room", &addr, "NetworkPolicy shop/exceeds"])?;
        objects.agree().context("what exceeds the tables closes its pods, and no others")?;
        objects.apply(&exceeds(vec![json!({"from": [{"podSelector": {}}]})]))?;
        objects.agree().map(drop).context("made smaller")
    })
}

pub(crate) fn policies_that_make_no_sense_close_their_pods_and_are_told(sandbox: &Sandbox) -> Result<()> {
    over_api(sandbox, |world, objects| {
        let bad = json!({"podSelector": app("db"), "ingress": [{"ports": [{"port": 70_000}]}]});
        let closed = json!({"podSelector": app("db"), "policyTypes": ["Ingress", "Egress"]});
        objects.apply_as(&policy("shop", "bad", bad), &policy("shop", "bad", closed))?;
        let told = ("NetworkPolicy", "bad", "InvalidObject");
        said(world, told, &["spec.ingress[0].ports[0].port: 70000 is not a port (1-65535)"])?;
        objects.agree().context("nothing passes what a bad policy selects")?;
        objects.delete(&policy("shop", "bad", json!({})))?;
        objects.agree()?;

        // A peer that is not supported: what denies it denies all, and what accepts it accepts nothing.
        let of_cluster = |name: &str, rules: Value| {
            let subject = json!({"namespaces": {"matchLabels": {"team": "shop"}}});
            json!({
                "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                "metadata": {"name": name},
                "spec": {"tier": "Admin", "priority": 7, "subject": subject, "egress": rules},
            })
        };
        let everything = json!([{"networks": ["0.0.0.0/0", "::/0"]}]);
        let denies = |to: Value| json!({"action": "Deny", "to": to});
        for (name, peer) in
            [("nodes", json!({"nodes": {}})), ("domains", json!({"domainNames": ["example.com"]}))]
        {
            let accepts = json!({"action": "Accept", "to": [peer]});
            let written = of_cluster(name, json!([accepts.clone(), denies(json!([peer]))]));
            objects.apply_as(&written, &of_cluster(name, json!([denies(everything.clone())])))?;
            let field = if name == "nodes" { "nodes" } else { "domainNames" };
            let message =
                format!("spec.egress[0].to[0].{field}: is not supported: name their addresses in networks");
            said(world, ("ClusterNetworkPolicy", name, "InvalidObject"), &[&message])?;
            objects.agree().with_context(|| message.clone())?;
            objects.delete(&written)?;
            // Alone it changes nothing.
            let written = of_cluster(&format!("accepts-{name}"), json!([accepts]));
            objects.apply_as(&written, &of_cluster(&format!("accepts-{name}"), json!([])))?;
            said(world, ("ClusterNetworkPolicy", &format!("accepts-{name}"), "InvalidObject"), &[&message])?;
            objects.agree().with_context(|| format!("accepts {field}"))?;
            objects.delete(&written)?;
        }
        Ok(())
    })
}

fn over_api(sandbox: &Sandbox, test: impl FnOnce(&World, &mut Objects<'_>) -> Result<()>) -> Result<()> {
    let (world, _runtimes) = World::attached_over_api(sandbox, &[])?;
    let mut objects = Objects::new(&world)?;
    let tested = objects.agree().map(drop).and_then(|()| test(&world, &mut objects));
    tested.map_err(|error| error.context(world.logs()))
}

/// Ports of TCP from this one on: 8000 is among the even ones.
fn every_other(first: u16) -> Vec<Value> {
    (1..=PORTS).map(|it| json!({"port": it * 2 + first})).collect()
}

/// Soon the first node's agent has posted an event about the object that has these words.
fn said(world: &World, (kind, name, reason): (&str, &str, &str), words: &[&str]) -> Result<()> {
    let deadline = Instant::now() + stretched(SOON * 2);
    loop {
        let requests = world.apis[0].server.requests();
        let bodies = requests.iter().map(|it| &it.body);
        let about = bodies.filter(|it| it["regarding"]["kind"] == kind && it["regarding"]["name"] == name);
        let notes: Vec<_> = about.filter(|it| it["reason"] == reason).map(|it| it["note"].clone()).collect();
        let fits = |note: &Value| words.iter().all(|word| note.as_str().is_some_and(|it| it.contains(word)));
        if notes.iter().any(fits) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no event {reason} on {kind} {name} says {words:?}: {notes:?}");
        thread::sleep(Duration::from_millis(50));
    }
}
