//! What upstream's sig-network specs ask of the choice among endpoints, on nodes with the chart's own settings: affinity,
//! hints of zones and nodes, and Services of other proxies.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    checks,
    cluster::Family,
    installed::{
        Expect::{Each, Fails},
        From::{self, Host, Pod},
        Installed, SOON,
    },
    manifests::{Endpoint, Service, State},
    patience::stretched,
    pod::Outcome,
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("e2e_rule_29_affinity_holds_and_is_switched", affinity),
        ("e2e_rule_29_affinity_runs_out", affinity_timeout),
        ("e2e_rules_4_and_6_hints_of_zones_and_nodes_lead_there", hints),
        ("e2e_rule_12_services_of_other_proxies_come_and_go", services_of_others),
    ])
}

const NODE_PORT: u16 = 30_080;
const READY: State = State::Ready;

fn web(more: &str) -> Service {
    Service { more: more.to_owned(), ..checks::service("web", 10) }
}

fn exposed(web: &Service) -> String {
    web.exposed("NodePort", &[(80, NODE_PORT)])
}

/// Who answers, each time over a connection of its own.
fn answer(it: &Installed, from: From, target: SocketAddr, count: u32) -> Result<BTreeSet<String>> {
    let outcomes = it.ask(from, &Ask::new(Protocol::Http, target).count(count).strict())?;
    if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
        bail!("{from} to {target}: {failure}");
    }
    Ok(outcomes.iter().filter_map(Outcome::answer).map(|it| it.by.clone()).collect())
}

const AFFINE: [&str; 3] = ["a2", "b1", "b2"];
const TIMEOUT: Duration = Duration::from_secs(3);

/// Whom each asks whether it is given one pod: a cluster IP, and NodePorts of the own node and of another.
fn affine(it: &Installed, web: &Service) -> Vec<(From, SocketAddr)> {
    let of = |family| {
        let [a, b] = ["a", "b"].map(|name| SocketAddr::new(it.node(name, family), NODE_PORT));
        let cluster_ip = checks::target(web, Protocol::Http, family);
        [
            (Pod("a1"), cluster_ip),
            (Pod("a1"), a),
            (Pod("a1"), b),
            (Host("a"), cluster_ip),
            (Host("a"), b),
            (Host("c"), a),
        ]
    };
    Family::BOTH.into_iter().flat_map(of).collect()
}

/// "should have session affinity work for ..", "should be able to switch session affinity for ..", each for a cluster IP
/// and for NodePorts: fifteen answers of one pod.
fn affinity(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let (none, sticky) = (web(""), web("  sessionAffinity: ClientIP\n"));
        it.serve(&none, &exposed(&none), &AFFINE.map(|name| (name, READY)))?;
        for _ in 0..2 {
            it.cluster.manifests().write("service-web", &exposed(&none))?;
            for (from, target) in affine(it, &none) {
                it.becomes(from, Protocol::Http, target, Each(&AFFINE))?;
            }
            it.cluster.manifests().write("service-web", &exposed(&sticky))?;
            for (from, target) in affine(it, &sticky) {
                let deadline = Instant::now() + stretched(SOON);
                while let by = answer(it, from, target, 15)?
                    && by.len() != 1
                {
                    ensure!(Instant::now() < deadline, "{from} to {target}: {by:?}");
                }
            }
        }
        Ok(())
    })
}

/// "should have session affinity timeout work for ..": once the client has been silent for the timeout, sooner or later
/// another pod answers.
fn affinity_timeout(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let sticky = web(&format!(
            "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {}}}}}\n",
            TIMEOUT.as_secs()
        ));
        it.serve(&sticky, &exposed(&sticky), &AFFINE.map(|name| (name, READY)))?;
        let mut first = Vec::new();
        for (from, target) in affine(it, &sticky) {
            let deadline = Instant::now() + stretched(SOON);
            let by = loop {
                match answer(it, from, target, 15) {
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                    Ok(by) => break by,
                }
            };
            ensure!(by.len() == 1, "{from} to {target}: {by:?}");
            first.push((from, target, by));
        }
        let deadline = Instant::now() + stretched(SOON);
        while !first.is_empty() {
            thread::sleep(TIMEOUT + Duration::from_secs(1));
            let mut same = Vec::new();
            for (from, target, by) in first {
                if answer(it, from, target, 1)? == by {
                    same.push((from, target, by));
                }
            }
            ensure!(Instant::now() < deadline, "never another's: {same:?}");
            first = same;
        }
        Ok(())
    })
}

/// "PreferClose", "PreferSameZone", "PreferSameNode" and "Topology Hints": a node goes where the hints say so for it, and
/// anywhere where none does.
fn hints(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let path = it.cluster.manifests().path().join("nodes.yaml");
        let nodes = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let zone = |name: &str| format!("    topology.kubernetes.io/zone: zone-of-{name}\n");
        let zoned: String = nodes
            .lines()
            .map(|line| match line.split_once("kubernetes.io/hostname: ") {
                Some((_, name)) => format!("{line}\n{}", zone(name)),
                None => format!("{line}\n"),
            })
            .collect();
        it.cluster.manifests().write("nodes", &zoned)?;
        let service = web("");
        it.cluster.manifests().write("service-web", &exposed(&service))?;
        let endpoints = |it: &Installed, names: &[&str], hint: &dyn Fn(&str) -> String| -> Result<()> {
            let ready = Endpoint::ready(names.iter().map(|name| it.cluster.pod(name)));
            let slices = service.slices(&ready);
            let hinted: String = slices
                .lines()
                .map(|line| match line.split_once("nodeName: ") {
                    Some((_, node)) => format!("{line}\n{}", hint(node)),
                    None => format!("{line}\n"),
                })
                .collect();
            it.cluster.manifests().write("endpoints-web", &hinted)
        };
        let ask = |it: &Installed, at_a: &[&str], at_b: &[&str]| -> Result<()> {
            for family in Family::BOTH {
                let cluster_ip = checks::target(&service, Protocol::Http, family);
                let node = |name| SocketAddr::new(it.node(name, family), NODE_PORT);
                for (from, target, by) in [
                    (Pod("a1"), cluster_ip, at_a),
                    (Host("a"), cluster_ip, at_a),
                    (Host("c"), node("a"), at_a),
                    (Pod("b1"), cluster_ip, at_b),
                    (Host("b"), cluster_ip, at_b),
                    (Host("c"), node("b"), at_b),
                ] {
                    it.becomes(from, Protocol::Http, target, Each(by))?;
                }
            }
            Ok(())
        };
        let of_zone = |node: &str| {
            format!("  zone: zone-of-{node}\n  hints: {{forZones: [{{name: zone-of-{node}}}]}}\n")
        };
        let of_node =
            |node: &str| format!("  hints: {{forZones: [{{name: other}}], forNodes: [{{name: {node}}}]}}\n");
        let everybody = |_: &str| String::new();
        endpoints(it, &["a2", "b2"], &everybody)?;
        ask(it, &["a2", "b2"], &["a2", "b2"])?;
        for hint in [&of_zone as &dyn Fn(&str) -> String, &of_node] {
            endpoints(it, &["a2", "b2"], hint)?;
            ask(it, &["a2"], &["b2"]).with_context(|| hint("NODE"))?;
            // The zone, or the node, loses its last endpoint.
            endpoints(it, &["b1", "b2"], hint)?;
            ask(it, &["b1", "b2"], &["b1", "b2"]).with_context(|| format!("{}, alone", hint("NODE")))?;
        }
        endpoints(it, &["a2", "b2"], &everybody)?;
        ask(it, &["a2", "b2"], &["a2", "b2"])
    })
}

/// "should implement service.kubernetes.io/service-proxy-name", "should implement service.kubernetes.io/headless".
fn services_of_others(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let service = web("");
        for label in ["service-proxy-name: foo-bar", "headless: \"\""] {
            let labelled = service.yaml().replacen(
                "  namespace: default\n",
                &format!("  namespace: default\n  labels: {{service.kubernetes.io/{label}}}\n"),
                1,
            );
            for (yaml, expect) in
                [(&labelled, Fails), (&service.yaml(), Each(&["a2", "b2"])), (&labelled, Fails)]
            {
                it.serve(&service, yaml, &[("a2", READY), ("b2", READY)])?;
                for (family, from) in
                    Family::BOTH.into_iter().flat_map(|family| [(family, Host("a")), (family, Pod("b1"))])
                {
                    let target = checks::target(&service, Protocol::Http, family);
                    it.becomes(from, Protocol::Http, target, expect).with_context(|| label.to_owned())?;
                }
            }
        }
        Ok(())
    })
}
